"""What a posterior must provide to be sampled: one small interface for every choice of coordinates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from bayeskernel.inference import kernel_space, preactivations, weights
from bayeskernel.inference.preactivations import Coordinates
from bayeskernel.kernels import representational_kernel

Position = dict[str, jax.Array]
Values = dict[str, jax.Array]


class Space(NamedTuple):
    """One exact parametrisation of the posterior.

    Attributes
    ----------
    model
        NumPyro model of one argument, the data; all its sites are standard normal under the prior,
        up to factors.
    draw_prior
        (rng_key, data) -> position: a draw of all sites from the prior, where chains start.
    observe
        (rng_key, position, data, keep) -> what is stored of a draw: ``kernel`` (T, P, T, P),
        ``output`` (T, P, O), and what ``keep`` names. The key draws what the space integrates out.
    can_keep
        Names that ``keep`` may hold.
    """

    model: Callable[..., None]
    draw_prior: Callable[[jax.Array, Any], Position]
    observe: Callable[[jax.Array, Position, Any, tuple[str, ...]], Values]
    can_keep: tuple[str, ...]


def weight_space(net: weights.Structure) -> Space:
    """The posterior over weights (docs/theory, section 2W)."""

    def observe(
        rng_key: jax.Array, z: Position, given: weights.Data, keep: tuple[str, ...]
    ) -> Values:
        activities, output = weights.forward(z, net, given)
        values = {"kernel": representational_kernel(activities), "output": output}
        scaled = {f"{name}_weights": w for name, w in weights.scale_sites(z, net, given).items()}
        if "weights" in keep:
            values |= scaled
        if "preactivations" in keep:
            values["preactivation"] = weights.preactivations(z, net, given)
            values["readout_weights"] = scaled["readout_weights"]
        return values

    return Space(
        partial(weights.model, net),
        lambda key, given: weights.draw_prior(key, net, given),
        observe,
        ("preactivations", "weights"),
    )


def preactivation_space(at: Coordinates) -> Space:
    """The posterior over pre-activations (docs/theory, section 2H)."""

    def draw_prior(rng_key: jax.Array, given: preactivations.Data) -> Position:
        shape = (at.rank, at.width)
        return {"z": jax.random.normal(rng_key, shape, given.map_.input.dtype)}

    def observe(
        rng_key: jax.Array, z: Position, given: preactivations.Data, keep: tuple[str, ...]
    ) -> Values:
        h = preactivations.preactivations(z["z"], at, given)
        values, readout = _with_readout(rng_key, at.phi(h), at, given)
        return values | ({"preactivation": h, "readout_weights": readout} if keep else {})

    return Space(partial(preactivations.model, at), draw_prior, observe, ("preactivations",))


def kernels_of_linear_networks(at: Coordinates) -> Space:
    """The posterior over kernels of a linear network (docs/theory, section 2C)."""
    kernel_space.check(at)

    def observe(
        rng_key: jax.Array, position: Position, given: preactivations.Data, keep: tuple[str, ...]
    ) -> Values:
        B = kernel_space.factor(position, at)
        return _with_readout(rng_key, preactivations.preactivations(B, at, given), at, given)[0]

    return Space(
        partial(kernel_space.model, at),
        lambda key, given: kernel_space.draw_prior(key, at),
        observe,
        (),
    )


def _with_readout(
    rng_key: jax.Array, activities: jax.Array, at: Coordinates, given: preactivations.Data
) -> tuple[Values, jax.Array]:
    readout = preactivations.draw_readout(rng_key, activities, at, given)
    output = preactivations.outputs(readout, activities, at, given)
    return {"kernel": preactivations.kernel_of(activities, at), "output": output}, readout
