"""Which coordinates can a posterior be sampled in, and what does each need? One table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bayeskernel._precision import jit
from bayeskernel.inference import kernel_space, preactivations, readout, weights
from bayeskernel.inference.coordinates import Coordinates, Data
from bayeskernel.inference.hmc import Likelihood, Position
from bayeskernel.kernels import representational_kernel

Values = dict[str, jax.Array]
_UNITS = ("preactivations",)


class Space(NamedTuple):
    """One exact parametrisation of the posterior.

    Attributes
    ----------
    model
        NumPyro model of one argument, the data; its sites are standard normal under the prior, up to factors.
    likelihood
        (position, data) -> ln p(y | position) and its gradient. None where the prior has factors: then NUTS,
        and not HMC, samples it.
    draw_prior
        (rng_key, data) -> position: a draw of all sites from the prior, where chains start.
    observe
        (rng_key, position, data, keep) -> what is stored of a draw: ``kernel`` (T, P, T, P),
        ``output`` (T, P, O), and what ``keep`` names. The key draws what the space integrates out.
    can_keep
        Names that ``keep`` may hold.
    units
        (rng_key, position, data) -> what ``observe`` gives, with ``preactivation`` and ``readout_weights``: all that
        can be known of one draw.
    """

    model: Callable[..., None]
    likelihood: Likelihood | None
    draw_prior: Callable[[jax.Array, Any], Position]
    observe: Callable[[jax.Array, Position, Any, tuple[str, ...]], Values]
    can_keep: tuple[str, ...]
    units: Callable[[jax.Array, Position, Any], Values]


def weight_space(net: weights.Structure) -> Space:
    """The posterior over weights (docs/theory, section 2W)."""

    def observe(
        rng_key: jax.Array, z: Position, data: weights.Data, keep: tuple[str, ...]
    ) -> Values:
        h = weights.preactivations(z, net, data)
        values = {
            "kernel": representational_kernel(net.phi(h)),
            "output": weights.outputs(z, h, net, data),
        }
        scaled = {f"{name}_weights": w for name, w in weights.scale_sites(z, net, data).items()}
        if "weights" in keep:
            values |= scaled
        if "preactivations" in keep:
            values |= {"preactivation": h, "readout_weights": scaled["readout_weights"]}
        return values

    return Space(
        partial(weights.model, net),
        jax.value_and_grad(partial(weights.log_likelihood, net)),
        lambda key, data: weights.draw_prior(key, net, data),
        observe,
        ("preactivations", "weights"),
        jit(lambda key, z, data: observe(key, z, data, _UNITS)),
    )


def preactivation_space(coordinates: Coordinates) -> Space:
    """The posterior over pre-activations (docs/theory, section 2H)."""

    def likelihood(position: Position, data: Data) -> tuple[jax.Array, Position]:
        value, gradient = preactivations.log_likelihood_and_gradient(
            position["z"], coordinates, data
        )
        return value, {"z": gradient}

    def draw_prior(rng_key: jax.Array, data: Data) -> Position:
        shape = (coordinates.rank, coordinates.width)
        return {"z": jax.random.normal(rng_key, shape, data.noise.dtype)}

    return Space(
        partial(preactivations.model, coordinates),
        likelihood,
        draw_prior,
        lambda key, z, data, keep: _observed(key, z["z"], coordinates, data, keep),
        ("preactivations",),
        jit(lambda key, z, data: _observed(key, z["z"], coordinates, data, _UNITS)),
    )


def kernels_of_linear_networks(coordinates: Coordinates) -> Space:
    """The posterior over kernels of a linear network (docs/theory, section 2C); in float64."""

    def observe(key: jax.Array, z: Position, data: Data, keep: tuple[str, ...]) -> Values:
        return _observed(key, kernel_space.factor(z, coordinates, data), coordinates, data, keep)

    @jit
    def framed(key: jax.Array, z: Position, frame: jax.Array, data: Data) -> Values:
        B = kernel_space.factor(z, coordinates, data)
        return _observed(key, B @ frame, coordinates, data, _UNITS)

    def units(key: jax.Array, z: Position, data: Data) -> Values:
        key_frame, key_readout = jax.random.split(key)
        return framed(key_readout, z, kernel_space.frame(key_frame, coordinates, data), data)

    return Space(
        partial(kernel_space.model, coordinates),
        None,
        lambda key, data: kernel_space.draw_prior(key, coordinates, data),
        observe,
        (),
        units,
    )


def _observed(
    rng_key: jax.Array, z: jax.Array, coordinates: Coordinates, data: Data, keep: tuple[str, ...]
) -> Values:
    nodes, _, _ = preactivations.unfold(z, coordinates, data)
    activities = jnp.stack([node.activities for node in nodes])
    v = readout.draw(rng_key, activities, coordinates, data)
    values = {
        "kernel": preactivations.full_kernel(nodes, coordinates),
        "output": readout.outputs(v, activities, coordinates, data),
    }
    kept = {"preactivation": jnp.stack([node.h for node in nodes]), "readout_weights": v}
    return values | (kept if keep else {})


SPACES: dict[str, Callable[[Any], Space]] = {
    "weights": weight_space,
    "preactivations": preactivation_space,
    "kernels": kernels_of_linear_networks,
}
