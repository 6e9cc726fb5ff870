r"""Outputs and targets given the representation: the readout integrated out, or drawn.

Given activities, the outputs of a reading (a group supervised at the same sites) are Gaussian with covariance
S(C) / N, S = sv^2 M_V o C + kappa 1 (standard scaling: S), see docs/theory, section 1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from bayeskernel.inference.coordinates import Coordinates, Data, Sites
from bayeskernel.inference.triangular import factor, pick, place
from bayeskernel.likelihood import output_covariance


def log_likelihood_and_slope(
    lower_kernel: jax.Array, coordinates: Coordinates, data: Data
) -> tuple[jax.Array, jax.Array]:
    """Ln p(y | C) up to constants, and its symmetric derivative by C; from the lower half of C (d, d)."""
    count = coordinates.width if coordinates.mean_field else 1
    value, slope = jnp.zeros((), lower_kernel.dtype), jnp.zeros_like(lower_kernel)
    for (sites, outputs), targets in zip(coordinates.readings, data.targets, strict=True):
        prior = _prior_variance(sites, coordinates, data)
        root, inverse = _factor(lower_kernel, prior, sites, data)
        white = inverse @ targets
        dual = inverse.T @ white
        determinant = len(outputs) * jnp.sum(jnp.log(jnp.diagonal(root)))
        value = value - count / 2 * jnp.sum(white**2) - determinant
        own = prior * (count * dual @ dual.T - len(outputs) * inverse.T @ inverse) / 2
        d = len(slope)
        slope = slope + place(place(own, sites, d, 0), sites, d, 1)
    return value, slope


def draw(
    rng_key: jax.Array, activities: jax.Array, coordinates: Coordinates, data: Data
) -> jax.Array:
    """Readout weights v given activities (T, P, N) and targets; shape (T, O, N), one row a label.

    Matheron's rule: a prior draw, corrected by what it misses of the targets,
    v_l = v0_l + c sum_{supervised (t,a), label l} [S^-1 (y - y0)]_(t,a) phi[t,a], with c = sv^2 in
    mean-field and sv^2 / sqrt(N) in standard scaling. Rows beyond the number of labels are not used: with
    as many as steps, all sharing patterns run the same code.
    """
    T, P, columns = activities.shape
    width, outputs_ = coordinates.width, coordinates.outputs
    flat = activities.reshape(T * P, columns)
    normal = jax.random.normal(rng_key, (T * columns + T * P, outputs_), flat.dtype)
    variance = data.readout[0, 0]
    prior = jnp.sqrt(variance) * normal[: T * columns].T.reshape(outputs_, T, columns).swapaxes(
        0, 1
    )
    temperature = data.noise / (width if coordinates.mean_field else 1)
    noise = jnp.sqrt(temperature) * normal[T * columns :]
    y0 = outputs(prior, activities, coordinates, data).reshape(T * P, outputs_) + noise
    lower = flat @ flat.T / width
    dual = jnp.zeros_like(y0)
    for (sites, which), targets in zip(coordinates.readings, data.targets, strict=True):
        own = _prior_variance(sites, coordinates, data)
        _, inverse = _factor(lower, own, sites, data)
        missed = inverse.T @ (inverse @ (targets - pick(pick(y0, sites), which, 1)))
        dual = dual + place(place(missed, sites, T * P, 0), which, outputs_, 1)
    gain = variance if coordinates.mean_field else variance / np.sqrt(width)
    change = jnp.einsum("tao,tai->toi", dual.reshape(T, P, outputs_), activities)
    return prior + gain * jnp.tensordot(data.labels, change, 1)


def outputs(v: jax.Array, activities: jax.Array, coordinates: Coordinates, data: Data) -> jax.Array:
    """F of shape (T, P, O) from readout weights (T, O, N), one row a label."""
    norm = coordinates.width if coordinates.mean_field else np.sqrt(coordinates.width)
    return jnp.einsum("tai,toi->tao", activities, jnp.tensordot(data.labels.T, v, 1)) / norm


def _prior_variance(sites: Sites, coordinates: Coordinates, data: Data) -> jax.Array:
    """sv^2 M_V at pairs of sites."""
    steps = [site // coordinates.patterns for site in sites]
    if len(set(steps)) == 1:
        return data.readout[0, 0]
    return pick(pick(data.readout, steps), steps, 1)


def _factor(
    lower_kernel: jax.Array, prior: jax.Array, sites: Sites, data: Data
) -> tuple[jax.Array, jax.Array]:
    kernel = pick(pick(lower_kernel, sites), sites, 1)
    identity = jnp.eye(len(sites), dtype=kernel.dtype)
    return factor(output_covariance(kernel, prior, data.noise, identity))
