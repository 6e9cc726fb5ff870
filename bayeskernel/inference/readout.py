r"""Outputs and targets given the representation: the readout integrated out, or drawn.

Given activities, the outputs of a reading (a group supervised at the same sites) are Gaussian with covariance
S(C) / N, S = Q(C) + kappa 1 (standard scaling: S), see docs/theory, section 1. Q is a sum over what an output reads, of a
chain one node a step.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bayeskernel.inference.coordinates import Coordinates, Data, Sites
from bayeskernel.inference.triangular import factor, pick, place


def log_likelihood_and_slope(
    lower_kernel: jax.Array, coordinates: Coordinates, data: Data
) -> tuple[jax.Array, jax.Array]:
    """Ln p(y | C) up to constants, and its symmetric derivative by C; from the lower half of C (d, d)."""
    count = data.width if coordinates.mean_field else 1
    value, slope = jnp.zeros((), lower_kernel.dtype), jnp.zeros_like(lower_kernel)
    C = lower_kernel if coordinates.plain else symmetric(lower_kernel, coordinates)
    for (sites, outputs), targets in zip(coordinates.readings, data.targets, strict=True):
        own = _Read.at(sites, coordinates, data)
        root, inverse = own.factor(C, data)
        white = inverse @ targets
        dual = inverse.T @ white
        determinant = len(outputs) * jnp.sum(jnp.log(jnp.diagonal(root)))
        value = value - count / 2 * jnp.sum(white**2) - determinant
        pull = (count * dual @ dual.T - len(outputs) * inverse.T @ inverse) / 2
        slope = slope + own.adjoint(pull, len(slope))
    return value, slope


def draw(
    rng_key: jax.Array, activities: jax.Array, coordinates: Coordinates, data: Data
) -> jax.Array:
    """Readout weights v given activities (nodes, P, N) and targets; shape (reads, O, N), one row a label.

    Matheron's rule: a prior draw, corrected by what it misses of the targets,
    v_l = v0_l + c_l sum_{supervised (t,a), label l} [S^-1 (y - y0)]_(t,a) phi[t,a], with c = sv^2 in
    mean-field and sv^2 / sqrt(N) in standard scaling. Rows beyond the number of labels are not used: with
    as many as reads, all sharing patterns run the same code.
    """
    P, columns = activities.shape[1:]
    T, reads = coordinates.steps, len(coordinates.reads)
    width, outputs_ = data.width, coordinates.outputs
    flat = activities.reshape(-1, columns)
    normal = jax.random.normal(rng_key, (reads * columns + T * P, outputs_), flat.dtype)
    variance = jnp.max(data.labels * jnp.diagonal(data.readout), axis=1)[:, None, None]
    prior = normal[: reads * columns].T.reshape(outputs_, reads, columns).swapaxes(0, 1)
    prior = jnp.sqrt(variance) * prior
    temperature = data.noise / (width if coordinates.mean_field else 1)
    noise = jnp.sqrt(temperature) * normal[reads * columns :]
    y0 = outputs(prior, activities, coordinates, data).reshape(T * P, outputs_) + noise
    C = flat @ flat.T / width
    dual = jnp.zeros_like(y0)
    for (sites, which), targets in zip(coordinates.readings, data.targets, strict=True):
        _, inverse = _Read.at(sites, coordinates, data).factor(C, data)
        missed = inverse.T @ (inverse @ (targets - pick(pick(y0, sites), which, 1)))
        dual = dual + place(place(missed, sites, T * P, 0), which, outputs_, 1)
    gain = variance if coordinates.mean_field else variance / jnp.sqrt(width)
    steps, nodes = _ends(coordinates)
    own = pick(dual.reshape(T, P, outputs_), steps)
    change = jnp.einsum("eao,eai->eoi", own, pick(activities, nodes))
    return prior + gain * jnp.tensordot(data.labels, change, 1)


def outputs(v: jax.Array, activities: jax.Array, coordinates: Coordinates, data: Data) -> jax.Array:
    """F of shape (T, P, O) from readout weights (reads, O, N), one row a label."""
    norm = data.width if coordinates.mean_field else jnp.sqrt(data.width)
    steps, nodes = _ends(coordinates)
    weights = jnp.tensordot(data.labels.T, v, 1)
    read = jnp.einsum("eai,eoi->eao", pick(activities, nodes), weights) / norm
    if steps == list(range(coordinates.steps)):
        return read
    goes = np.arange(coordinates.steps)[:, None] == np.array(steps)
    return jnp.tensordot(jnp.asarray(goes, read.dtype), read, 1)


def symmetric(lower_kernel: jax.Array, coordinates: Coordinates) -> jax.Array:
    """C (d, d) from its entries at pairs (later or equal node, node)."""
    P = coordinates.patterns
    own = np.kron(np.eye(len(lower_kernel) // P), np.ones((P, P))) > 0
    return lower_kernel + jnp.where(own, 0, lower_kernel.T)


def _ends(coordinates: Coordinates) -> tuple[list[int], list[int]]:
    """Steps and nodes of all reads."""
    return [step for step, _ in coordinates.reads], [node for _, node in coordinates.reads]


class _Read(NamedTuple):
    """What the outputs at some sites read of C.

    Attributes
    ----------
    nodes
        Sites of C, one for every read of an output.
    prior
        sv^2 M_V at pairs of them.
    sums
        Which reads an output sums, (outputs, reads); None where each has one.
    """

    nodes: list[int]
    prior: jax.Array
    sums: NDArray[np.float64] | None

    @staticmethod
    def at(sites: Sites, coordinates: Coordinates, data: Data) -> _Read:
        P, reads = coordinates.patterns, coordinates.reads
        found = [
            (k, e, node * P + site % P)
            for k, site in enumerate(sites)
            for e, (step, node) in enumerate(reads)
            if step == site // P
        ]
        edges, nodes = [e for _, e, _ in found], [node for _, _, node in found]
        one_label = len(set(edges)) == 1
        prior = (
            data.readout[edges[0], edges[0]]
            if one_label
            else pick(pick(data.readout, edges), edges, 1)
        )
        if coordinates.plain:
            return _Read(nodes, prior, None)
        return _Read(nodes, prior, np.eye(len(sites))[:, [k for k, _, _ in found]])

    def factor(self, C: jax.Array, data: Data) -> tuple[jax.Array, jax.Array]:
        """Cholesky factor of S and its inverse."""
        Q = self.prior * pick(pick(C, self.nodes), self.nodes, 1)
        if self.sums is not None:
            Q = jnp.asarray(self.sums, Q.dtype) @ Q @ jnp.asarray(self.sums.T, Q.dtype)
        return factor(Q + data.noise * jnp.eye(len(Q), dtype=Q.dtype))

    def adjoint(self, of_Q: jax.Array, size: int) -> jax.Array:
        """The adjoint of Q in C, shape (size, size)."""
        if self.sums is None:
            return place(place(self.prior * of_Q, self.nodes, size, 0), self.nodes, size, 1)
        # Outputs may read a node more than once.
        sums, nodes = (jnp.asarray(a, of_Q.dtype) for a in (self.sums, np.eye(size)[self.nodes]))
        return nodes.T @ (self.prior * (sums.T @ of_Q @ sums)) @ nodes
