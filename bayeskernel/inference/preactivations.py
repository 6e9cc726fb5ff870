r"""The posterior over pre-activations: weights integrated out exactly, at any width.

Given C, the N units are independent Gaussians with covariance K(C), and K at a step needs C at earlier
steps only (docs/theory, section 2H). With standard normal z and the causal root A A^T = K,

    h = A z                        row t of A from K[t, <= t], that is from C at earlier steps

carries N(0, 1) to the prior of the network, so the density to sample is

    N(z; 0, 1)  prod_o N(y_o; 0, S(C(z)) / N)        (standard scaling: S in place of S / N)

in N T P dimensions instead of N^2. Where K is singular (duplicate patterns, more patterns than the
directions inputs and earlier units can reach) a step keeps only *pivots*: sites whose innovations are
linearly independent. The other sites follow from them without error, and no jitter is added.

The gradient is written by hand, last step first: from dC through phi to the rows of A, and through the
Cholesky factor L of K on the pivots, dL = L Phi(L^-1 dK L^-T) with Phi half of the diagonal and what is
below it (Murray 2016, arXiv 1602.07527), to K and so to C of the step before.
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


class Step(NamedTuple):
    """A step of the map from z to C.

    Attributes
    ----------
    h, activities
        Shape (P, N).
    pull
        Adjoint of phi at h.
    loadings
        Rows of A on the pivots of this and earlier steps.
    overlaps
        C with this and earlier steps, shape (P, (t + 1) P).
    """

    h: jax.Array
    activities: jax.Array
    pull: Callable[[jax.Array], tuple[jax.Array]]
    loadings: jax.Array
    overlaps: jax.Array


def unfold(
    z: jax.Array, coordinates: Coordinates, data: Data
) -> tuple[list[Step], jax.Array, list[int]]:
    """All steps of the map from z (rank, N), the inverse of L, and the sites of its rows."""
    P, steps = coordinates.patterns, list[Step]()
    inverse, sites = jnp.zeros((0, 0), z.dtype), list[int]()
    for t, pivots in enumerate(coordinates.pivots):
        rows = data.input_kernel[t * P : (t + 1) * P, : (t + 1) * P]
        if t:
            gain = jnp.repeat(data.recurrent[t, 1 : t + 1], P)
            rows = rows + jnp.pad(gain * steps[-1].overlaps, ((0, 0), (P, 0)))
        loadings, inverse = _condition(rows, pivots, sites, inverse)
        sites += [t * P + a for a in pivots]
        h = loadings @ z[: len(sites)]
        activities, pull = jax.vjp(coordinates.phi, h)
        # Plain products of matrices: contractions over more axes cost XLA three times as much.
        earlier = jnp.concatenate([*(step.activities for step in steps), activities])
        overlaps = activities @ earlier.T / coordinates.width
        steps.append(Step(h, activities, pull, loadings, overlaps))
    return steps, inverse, sites


def _condition(
    rows: jax.Array, pivots: Sites, sites: list[int], inverse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Rows of A at a step and the inverse of L grown by its pivots, from K[t, <= t]."""
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


def lower_kernel(steps: Sequence[Step]) -> jax.Array:
    """C at pairs (later or equal step, step), zero else; shape (d, d)."""
    rows = [step.overlaps for step in steps]
    size = rows[-1].shape[1]
    return jnp.concatenate([jnp.pad(row, ((0, 0), (0, size - row.shape[1]))) for row in rows])


def log_likelihood_and_gradient(
    z: jax.Array, coordinates: Coordinates, data: Data
) -> tuple[jax.Array, jax.Array]:
    """Ln p(y | C(z)), up to constants, and its gradient by z."""
    steps, inverse, sites = unfold(z, coordinates, data)
    value, slope = readout.log_likelihood_and_slope(lower_kernel(steps), coordinates, data)
    P, reach = coordinates.patterns, _reach(coordinates)
    activities = jnp.concatenate([step.activities for step in steps])
    slopes: dict[int, jax.Array] = {}  # of C[t, <= t], through K of later steps
    fields: list[jax.Array] = []  # adjoint of h, last step first
    of_factor = jnp.zeros_like(inverse)
    for t in reversed(range(len(steps))):
        start, stop = reach[t]
        row = 2 * slope[t * P : (t + 1) * P, start:stop]
        if t in slopes:
            through = _symmetric_row(slopes, t, P)
            row = row + jnp.pad(through, ((0, 0), (0, stop - start - through.shape[1])))
        field = steps[t].pull((row / coordinates.width) @ activities[start:stop])[0]
        fields.append(field)
        of_loadings = field @ z[: steps[t].loadings.shape[1]].T
        of_rows, of_factor = _condition_adjoint(
            of_loadings, of_factor, steps[t].loadings, inverse, coordinates.pivots[t]
        )
        if t:
            size, reached = (t + 1) * P, sites[: steps[t].loadings.shape[1]]
            of_rows = place(of_rows, reached, size, 1)
            slopes[t - 1] = jnp.repeat(data.recurrent[t, 1 : t + 1], P) * of_rows[:, P:]
    return value, _collect(fields[::-1], steps, coordinates)


def _reach(coordinates: Coordinates) -> list[tuple[int, int]]:
    """First and last column of C whose entries in the rows of a step act on K or targets."""
    steps, P = coordinates.steps, coordinates.patterns
    acts = np.zeros((steps, steps), bool)
    acts[:-1, :-1] = True
    for sites, _ in coordinates.readings:
        supervised = np.unique(np.array(sites) // P)
        acts[np.ix_(supervised, supervised)] = True
    columns = [np.flatnonzero(row) for row in acts]
    return [(c[0] * P, (c[-1] + 1) * P) if len(c) else (0, 0) for c in columns]


def _symmetric_row(slopes: dict[int, jax.Array], t: int, patterns: int) -> jax.Array:
    """Rows of step t of slopes + slopes^T, from the rows of slopes at t and later steps."""
    own = slice(t * patterns, (t + 1) * patterns)
    rows, diagonal = slopes[t][:, : own.start], slopes[t][:, own]
    later = [slopes[s][:, own].T for s in sorted(slopes) if s > t]
    return jnp.concatenate([rows, diagonal + diagonal.T, *later], 1)


def _condition_adjoint(
    of_loadings: jax.Array,
    of_factor: jax.Array,
    loadings: jax.Array,
    inverse: jax.Array,
    pivots: Sites,
) -> tuple[jax.Array, jax.Array]:
    """Adjoint of K[t, pivots <= t] and of L without the step's rows, from those of its loadings and of L."""
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


def _collect(fields: list[jax.Array], steps: Sequence[Step], coordinates: Coordinates) -> jax.Array:
    """A^T fields, shape (rank, N), without the zeros of A."""
    parts, first = [], 0
    for s, pivots in enumerate(coordinates.pivots):
        own = slice(first, first + len(pivots))
        column = jnp.concatenate([step.loadings[:, own] for step in steps[s:]])
        parts.append(column.T @ jnp.concatenate(fields[s:]))
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


def _pull(_: Coordinates, gradient: jax.Array, slope: jax.Array) -> tuple[jax.Array, None]:
    return slope * gradient, None


log_likelihood.defvjp(log_likelihood_and_gradient, _pull)


def full_kernel(steps: Sequence[Step]) -> jax.Array:
    """C, shape (T, P, T, P)."""
    T, P = len(steps), len(steps[0].h)
    lower = lower_kernel(steps)
    own = np.kron(np.eye(T), np.ones((P, P))) > 0
    return (lower + jnp.where(own, 0, lower.T)).reshape(T, P, T, P)


def model(coordinates: Coordinates, data: Data) -> None:
    """Define the NumPyro model: z of shape (rank, N), and the likelihood of its kernel."""
    shape = (coordinates.rank, coordinates.width)
    z = numpyro.sample("z", dist.Normal(0, 1).expand(shape).to_event(2))
    numpyro.deterministic("kernel", full_kernel(unfold(z, coordinates, data)[0]))
    numpyro.factor("targets", log_likelihood(z, coordinates, data))
