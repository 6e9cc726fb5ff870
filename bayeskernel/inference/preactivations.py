r"""The posterior over pre-activations: weights integrated out exactly, at any width.

Given C, the N units are independent Gaussians with covariance K(C), and K at a node needs C at earlier
nodes only (docs/theory, section 2H; of a chain nodes are steps). With standard normal z and the causal root A A^T = K,

    h = A z                        row n of A from K[n, <= n], that is from C at earlier nodes

carries N(0, 1) to the prior of the network, so the density to sample is

    N(z; 0, 1)  prod_o N(y_o; 0, S(C(z)) / N)        (standard scaling: S in place of S / N)

in N T P dimensions instead of N^2. Where K is singular (duplicate patterns, more patterns than the
directions inputs and earlier units can reach) a node keeps only *pivots*: sites whose innovations are
linearly independent. The other sites follow from them without error, and no jitter is added. What is conditioned, d x d
numbers, is in float64 whatever the units' type: rounded to float32 a K of hundreds of correlated sites is not positive. So
functions here must not be vectorised by `jax.vmap`, whose rules would see float64 outside of its context.

The gradient is written by hand, last node first: from dC through phi to the rows of A, and through the
Cholesky factor L of K on the pivots, dL = L Phi(L^-1 dK L^-T) with Phi half of the diagonal and what is
below it (Murray 2016, arXiv 1602.07527), to K and so to C of the nodes before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from bayeskernel.inference import readout
from bayeskernel.inference.coordinates import Coordinates, Data, Sites
from bayeskernel.inference.triangular import factor, factor_adjoint, pick, place


class Node(NamedTuple):
    """A node of the map from z to C.

    Attributes
    ----------
    h, activities
        Shape (P, N).
    pull
        Adjoint of phi at h.
    loadings, exact
        Rows of A on the pivots of this and earlier nodes, in the units' type and in float64.
    overlaps
        C with this and earlier nodes, shape (P, (n + 1) P).
    """

    h: jax.Array
    activities: jax.Array
    pull: Callable[[jax.Array], tuple[jax.Array]]
    loadings: jax.Array
    exact: jax.Array
    overlaps: jax.Array


def unfold(
    z: jax.Array, coordinates: Coordinates, data: Data
) -> tuple[list[Node], jax.Array, list[int]]:
    """All nodes of the map from z (rank, N), the inverse of L, and the sites of its rows."""
    P, nodes = coordinates.patterns, list[Node]()
    sites = list[int]()
    with jax.enable_x64(True):
        inverse = jnp.zeros((0, 0))
    for n, pivots in enumerate(coordinates.pivots):
        with jax.enable_x64(True):
            rows = data.input_kernel[n * P : (n + 1) * P, : (n + 1) * P]
            if coordinates.sources[n]:
                rows = rows + _fed(nodes, coordinates, data)
            exact, inverse = _condition(rows, pivots, sites, inverse)
            loadings = exact.astype(z.dtype)
        sites += [n * P + a for a in pivots]
        h = loadings @ z[: len(sites)]
        activities, pull = jax.vjp(coordinates.phi, h)
        # Plain products of matrices: contractions over more axes cost XLA three times as much.
        earlier = jnp.concatenate([*(node.activities for node in nodes), activities])
        overlaps = activities @ earlier.T / data.width
        nodes.append(Node(h, activities, pull, loadings, exact, overlaps))
    return nodes, inverse, sites


def _fed(nodes: Sequence[Node], coordinates: Coordinates, data: Data) -> jax.Array:
    """Rows of sum_l G_l C G_l^T at the node after some, shape (P, (n + 1) P); in float64."""
    n, P = len(nodes), coordinates.patterns
    if coordinates.chain:
        gain = jnp.repeat(data.recurrent[n, 1 : n + 1], P)
        return jnp.pad(gain * nodes[-1].overlaps.astype(float), ((0, 0), (P, 0)))
    C = readout.symmetric(lower_kernel(nodes).astype(float), coordinates).reshape(n, P, n, P)
    K = jnp.einsum("mpq,paqb->amb", data.recurrent[n, : n + 1, :n, :n], C)
    return K.reshape(P, -1)


def _fed_adjoint(of_rows: jax.Array, n: int, coordinates: Coordinates, data: Data) -> jax.Array:
    """Adjoint of `_fed` in C of the nodes before n, from that of its rows: of a chain one row of blocks, else (n P, n P)."""
    P = coordinates.patterns
    if coordinates.chain:
        return jnp.repeat(data.recurrent[n, 1 : n + 1], P) * of_rows[:, P:]
    gain = data.recurrent[n, : n + 1, :n, :n]
    return jnp.einsum("mpq,amb->paqb", gain, of_rows.reshape(P, n + 1, P)).reshape(n * P, n * P)


def _condition(
    rows: jax.Array, pivots: Sites, sites: list[int], inverse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Rows of A at a node and the inverse of L grown by its pivots, from K[n, <= n]."""
    patterns, others = len(rows), _others(pivots, len(rows))
    own = [rows.shape[1] - patterns + a for a in pivots]
    of_pivots = pick(rows, pivots)
    past = pick(of_pivots, sites, 1) @ inverse.T
    root, unroot = factor(pick(of_pivots, own, 1) - past @ past.T)
    loadings = jnp.concatenate([past, root], 1)
    grown = jnp.concatenate([-(unroot @ past) @ inverse, unroot], 1)
    inverse = jnp.concatenate([jnp.pad(inverse, ((0, 0), (0, len(pivots)))), grown])
    if others:
        following = pick(pick(rows, others), sites + own, 1) @ inverse.T
        loadings = _in_order(pivots, others, loadings, following)
    return loadings, inverse


def lower_kernel(nodes: Sequence[Node]) -> jax.Array:
    """C at pairs (later or equal node, node), zero else; shape (d, d)."""
    rows = [node.overlaps for node in nodes]
    size = rows[-1].shape[1]
    return jnp.concatenate([jnp.pad(row, ((0, 0), (0, size - row.shape[1]))) for row in rows])


def log_likelihood_and_gradient(
    z: jax.Array, coordinates: Coordinates, data: Data
) -> tuple[jax.Array, jax.Array]:
    """Ln p(y | C(z)), up to constants, and its gradient by z."""
    nodes, inverse, sites = unfold(z, coordinates, data)
    value, slope = readout.log_likelihood_and_slope(lower_kernel(nodes), coordinates, data)
    P, reach = coordinates.patterns, _reach(coordinates)
    activities = jnp.concatenate([node.activities for node in nodes])
    slopes: dict[
        int, jax.Array
    ] = {}  # of C, through K of later nodes; by the last node whose row it holds
    fields: list[jax.Array] = []  # adjoint of h, last node first
    with jax.enable_x64(True):
        of_factor = jnp.zeros_like(inverse)
    for n in reversed(range(len(nodes))):
        start, stop = reach[n]
        row = 2 * slope[n * P : (n + 1) * P, start:stop]
        if any(k >= n for k in slopes):
            through = _symmetric_row(slopes, n, coordinates)
            row = row + jnp.pad(through, ((0, 0), (0, stop - start - through.shape[1])))
        field = nodes[n].pull((row / data.width) @ activities[start:stop])[0]
        fields.append(field)
        of_loadings = field @ z[: nodes[n].loadings.shape[1]].T
        with jax.enable_x64(True):
            of_rows, of_factor = _condition_adjoint(
                of_loadings.astype(float),
                of_factor,
                nodes[n].exact,
                inverse,
                coordinates.pivots[n],
            )
            of_rows = of_rows.astype(z.dtype)
        if coordinates.sources[n]:
            size, reached = (n + 1) * P, sites[: nodes[n].loadings.shape[1]]
            slopes[n - 1] = _fed_adjoint(place(of_rows, reached, size, 1), n, coordinates, data)
    return value, _collect(fields[::-1], nodes, coordinates)


def _reach(coordinates: Coordinates) -> list[tuple[int, int]]:
    """First and last column of C whose entries in the rows of a node act on K or targets."""
    m, P = coordinates.nodes, coordinates.patterns
    acts = np.ones((m, m), bool)
    if coordinates.chain:
        acts[-1] = acts[:, -1] = False
        for sites, _ in coordinates.readings:
            steps = np.unique(np.array(sites) // P)
            read = [node for step, node in coordinates.reads if step in steps]
            acts[np.ix_(read, read)] = True
    columns = [np.flatnonzero(row) for row in acts]
    return [(c[0] * P, (c[-1] + 1) * P) if len(c) else (0, 0) for c in columns]


def _symmetric_row(slopes: dict[int, jax.Array], n: int, coordinates: Coordinates) -> jax.Array:
    """Rows of node n of slopes + slopes^T."""
    P = coordinates.patterns
    own = slice(n * P, (n + 1) * P)
    if not coordinates.chain:
        last = max(slopes)
        grown = ((0, (last - k) * P) for k in slopes)
        padded = [jnp.pad(part, (by, by)) for part, by in zip(slopes.values(), grown, strict=True)]
        total = jnp.sum(jnp.stack(padded), axis=0)
        return total[own] + total[:, own].T
    rows, diagonal = slopes[n][:, : own.start], slopes[n][:, own]
    later = [slopes[k][:, own].T for k in sorted(slopes) if k > n]
    return jnp.concatenate([rows, diagonal + diagonal.T, *later], 1)


def _condition_adjoint(
    of_loadings: jax.Array,
    of_factor: jax.Array,
    loadings: jax.Array,
    inverse: jax.Array,
    pivots: Sites,
) -> tuple[jax.Array, jax.Array]:
    """Adjoint of K[n, pivots <= n] and of L without the node's rows, from those of its loadings and of L."""
    patterns, used = loadings.shape
    before, others = used - len(pivots), _others(pivots, patterns)
    inverse = inverse[:used, :used]
    following = pick(of_loadings, others) @ inverse
    if others:
        of_factor = of_factor - following.T @ pick(loadings, others)
    rows = pick(loadings, pivots)
    past, root = rows[:, :before], rows[:, before:]
    of_rows = of_factor[before:] + pick(of_loadings, pivots)
    own = factor_adjoint(root, inverse[before:, before:], of_rows[:, before:])
    earlier = (of_rows[:, :before] - 2 * own @ past) @ inverse[:before, :before]
    of_factor = of_factor[:before, :before] - earlier.T @ past
    out = _in_order(pivots, others, jnp.concatenate([earlier, own], 1), following)
    return out, of_factor


def _collect(fields: list[jax.Array], nodes: Sequence[Node], coordinates: Coordinates) -> jax.Array:
    """A^T fields, shape (rank, N), without the zeros of A."""
    parts, first = [], 0
    for n, pivots in enumerate(coordinates.pivots):
        own = slice(first, first + len(pivots))
        column = jnp.concatenate([node.loadings[:, own] for node in nodes[n:]])
        parts.append(column.T @ jnp.concatenate(fields[n:]))
        first = own.stop
    return jnp.concatenate(parts)


def _others(pivots: Sites, patterns: int) -> list[int]:
    return [a for a in range(patterns) if a not in pivots]


def _in_order(
    pivots: Sites, others: list[int], of_pivots: jax.Array, of_others: jax.Array
) -> jax.Array:
    """Rows of pivots and of other patterns, in the order of patterns."""
    if not others:
        return of_pivots
    order = np.argsort([*pivots, *others]).tolist()
    return pick(jnp.concatenate([of_pivots, of_others]), order)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def log_likelihood(z: jax.Array, coordinates: Coordinates, data: Data) -> jax.Array:
    """Ln p(y | C(z)), up to constants; differentiable by z."""
    return log_likelihood_and_gradient(z, coordinates, data)[0]


log_likelihood.defvjp(log_likelihood_and_gradient, lambda _, pulled, slope: (pulled * slope, None))


def full_kernel(nodes: Sequence[Node], coordinates: Coordinates) -> jax.Array:
    """C, shape (nodes, P, nodes, P)."""
    shape = 2 * (len(nodes), coordinates.patterns)
    return readout.symmetric(lower_kernel(nodes), coordinates).reshape(shape)


def model(coordinates: Coordinates, data: Data) -> None:
    """Define the NumPyro model: z of shape (rank, N), and the likelihood of its kernel."""
    shape = (coordinates.rank, coordinates.width)
    z = numpyro.sample("z", dist.Normal(0, 1).expand(shape).to_event(2))
    numpyro.deterministic("kernel", full_kernel(unfold(z, coordinates, data)[0], coordinates))
    numpyro.factor("targets", log_likelihood(z, coordinates, data))
