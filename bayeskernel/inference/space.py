"""What a posterior must provide to be sampled: one small interface for every choice of coordinates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from bayeskernel.inference import weights
from bayeskernel.kernels import representational_kernel

Position = dict[str, jax.Array]


class Space(NamedTuple):
    """One exact parametrisation of the posterior.

    Attributes
    ----------
    name
        "weights".
    model
        NumPyro model; its only argument is `weights.Data`.
    draw_prior
        (rng_key, data) -> position: a draw of all sites from the prior, where chains start.
    observe
        (position, data) -> dict with ``kernel`` (T, P, T, P) and ``output`` (T, P, O).
    extras
        What can be kept besides: name -> function (position, data) -> dict of arrays.
    """

    name: str
    model: Callable[..., None]
    draw_prior: Callable[[jax.Array, weights.Data], Position]
    observe: Callable[[Position, weights.Data], dict[str, jax.Array]]
    extras: dict[str, Callable[[Position, weights.Data], dict[str, jax.Array]]]


def weight_space(net: weights.Structure) -> Space:
    """The posterior over weights (docs/theory, section 2W)."""

    def model(given: weights.Data) -> None:
        weights.model(net, given)

    def observe(z: Position, given: weights.Data) -> dict[str, Any]:
        activities, output = weights.forward(z, net, given)
        return {"kernel": representational_kernel(activities), "output": output}

    def keep_weights(z: Position, given: weights.Data) -> dict[str, Any]:
        return {f"{name}_weights": w for name, w in weights.scale_sites(z, net, given).items()}

    def keep_preactivations(z: Position, given: weights.Data) -> dict[str, Any]:
        return {"preactivation": weights.preactivations(z, net, given)}

    return Space(
        "weights",
        model,
        lambda key, given: weights.draw_prior(key, net, given),
        observe,
        {"weights": keep_weights, "preactivations": keep_preactivations},
    )
