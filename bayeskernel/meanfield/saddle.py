r"""Which kernels are stationary when the law of one unit is not Gaussian?

    F(C, Ct) = 1/2 sum_o y_o^T S_o(C)^-1 y_o + 1/2 tr(Ct C) - ln Z(K(C), Ct)

is maximal in Ct (ln Z is convex) and stationary in C (docs/theory, section 4). With m the entries of C and l
those of Ct, Newton's method needs ln Z to second order (see `single_unit`). Eliminating l leaves the reduced
Hessian

    R = F_mm + F_ml cov(phi phi)^-1 F_lm

whose lowest eigenvalue says whether a solution is a minimum. m is measured in units of the spread of phi phi
over units, which makes R dimensionless. Steps that share no weights and no target are independent under q; each
such *group* of sites has a cloud of its own.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import block_diag

from bayeskernel.activations import Activation
from bayeskernel.kernels import (
    KernelMap,
    Supervision,
    kernel_map,
    preactivation_kernel,
    supervision,
)
from bayeskernel.meanfield.free_energy import Data, data_energy, output_log_determinant
from bayeskernel.meanfield.prior import prior_recursion
from bayeskernel.meanfield.single_unit import (
    Cloud,
    Grid,
    Law,
    Particles,
    Sites,
    Unit,
    all_pairs,
    derivatives,
    find_sites,
    law,
)
from bayeskernel.network import Network
from bayeskernel.tasks import Task

Floats = NDArray[np.float64]

# Particles that a thinned cloud keeps.
_THINNED = 4096
# Directions in which the statistics vary less than this, relative to their scale, are null.
_NULL = 1e-11


class Group(NamedTuple):
    """Sites that are correlated under q."""

    sites: tuple[int, ...]
    pivots: tuple[int, ...]


class Problem(NamedTuple):
    """What the saddle point depends on.

    Attributes
    ----------
    phi
        Activation.
    data
        Definitions of K and S, and the targets.
    groups
        Independent groups of sites.
    reduction
        For every group how its sites follow from its pivots.
    reads
        dK/dC between entries, group by group, shape (q, n): K is linear in C.
    """

    phi: Activation
    data: Data
    groups: tuple[Group, ...]
    reduction: tuple[Sites, ...]
    reads: Floats

    @property
    def size(self) -> int:
        """Number of sites, d = T P."""
        return sum(len(g.sites) for g in self.groups)

    def scaled(self, factor: float) -> Problem:
        """The same problem with all targets multiplied."""
        given = self.data.data
        targets = np.asarray(given.targets) * factor
        return self._replace(data=self.data._replace(data=given._replace(targets=targets)))


class Point(NamedTuple):
    """Kernels with the clouds they were computed on.

    Attributes
    ----------
    m
        Entries of C, group by group, shape (n,).
    conjugate
        Entries of Ct, shape (n,).
    clouds
        One for every group.
    """

    m: Floats
    conjugate: Floats
    clouds: tuple[Cloud, ...]


class Expansion(NamedTuple):
    """F around a point to second order, in whitened coordinates m = unit x, Ct = unit^-T l.

    Attributes
    ----------
    value
        F.
    slope_m, slope_l
        Gradient; its largest entry is the residual.
    mixed
        F_ml, shape (k, k).
    reduced
        R, shape (k, k).
    unit, inverse
        Root of cov(phi phi) and its pseudo-inverse, shapes (n, k) and (k, n).
    outside
        What m misses of the moments in directions that do not vary, shape (n,).
    effective
        Smallest effective fraction of the clouds.
    noise
        Covariance of the two slopes over clouds, shape (2k, 2k); zero on grids.
    """

    value: float
    slope_m: Floats
    slope_l: Floats
    mixed: Floats
    reduced: Floats
    unit: Floats
    inverse: Floats
    outside: Floats
    effective: float
    noise: Floats

    @property
    def residual(self) -> float:
        """Largest violation of the two saddle-point equations."""
        parts = (self.slope_m, self.slope_l, self.outside)
        return float(max(np.max(np.abs(p), initial=0.0) for p in parts))


def saddle_problem(network: Network, task: Task) -> Problem:
    """Collect the arrays of a network on a task; 64-bit JAX must be enabled."""
    map_, given = kernel_map(network, task), supervision(task)
    steps, patterns = np.shape(map_.input)[:2]
    prior = prior_recursion(network.phi, map_)
    K = np.asarray(preactivation_kernel(jnp.asarray(prior), map_)).reshape(steps * patterns, -1)
    groups, reduction = list[Group](), list[Sites]()
    for sites in _independent_groups(map_, given):
        found = find_sites(K[np.ix_(sites, sites)])
        reduction.append(found)
        groups.append(Group(tuple(sites), tuple(np.asarray(sites)[found.pivots])))
    reads = _reads(map_, tuple(groups))
    return Problem(network.phi, Data(map_, given), tuple(groups), tuple(reduction), reads)


def _reads(map_: KernelMap, groups: tuple[Group, ...]) -> Floats:
    steps, patterns = np.shape(map_.input)[:2]
    index = np.full((steps * patterns,) * 2, -1)
    count = 0
    for group in groups:
        sites, pairs = np.array(group.sites), all_pairs(len(group.sites))
        now = count + np.arange(len(pairs.first))
        index[sites[pairs.first], sites[pairs.second]] = now
        index[sites[pairs.second], sites[pairs.first]] = now
        count += len(now)
    rows = []
    for group in groups:
        sites, pairs = np.array(group.pivots, int), all_pairs(len(group.pivots))
        first, second = sites[pairs.first], sites[pairs.second]
        gain = np.asarray(map_.recurrent)[first // patterns, 0, second // patterns, 0]
        late = (first >= patterns) & (second >= patterns) & (gain > 0)
        block = np.zeros((len(first), count))
        entry = np.flatnonzero(late)
        block[entry, index[first[late] - patterns, second[late] - patterns]] = gain[late]
        rows.append(block)
    return np.concatenate(rows)


def _independent_groups(map_: KernelMap, given: Supervision) -> list[list[int]]:
    """Join steps that share recurrent weights, correlated inputs or a readout with targets."""
    steps, patterns = np.shape(map_.input)[:2]
    joined = np.asarray(map_.recurrent)[:, 0, :, 0] > 0
    joined[0] = joined[:, 0] = False  # W first acts at step 2
    joined |= np.any(np.asarray(map_.input) != 0, axis=(1, 3)) | np.eye(steps, dtype=bool)
    at = np.zeros((steps, given.mask.shape[1]))
    np.maximum.at(at, given.sites // patterns, given.mask)
    joined |= (np.asarray(map_.readout)[:, 0, :, 0] > 0) & (at @ at.T > 0)
    # Where K couples C[t-1,s-1] the steps t, s are joined; their predecessors are when Ct couples them.
    joined[:-1, :-1] |= np.asarray(map_.recurrent)[1:, 0, 1:, 0] > 0
    for _ in range(steps):
        joined = joined @ joined
    groups, seen = list[list[int]](), set[int]()
    for t in range(steps):
        if t not in seen:
            members = np.flatnonzero(joined[t])
            seen |= set(members.tolist())
            groups.append([int(s) * patterns + a for s in members for a in range(patterns)])
    return groups


def matrix(entries: Floats, problem: Problem) -> Floats:
    """A symmetric (d, d) matrix from entries group by group, zero between groups."""
    out, used = np.zeros((problem.size, problem.size)), 0
    for group in problem.groups:
        sites, pairs = np.array(group.sites), all_pairs(len(group.sites))
        now = entries[used : used + len(pairs.first)]
        out[sites[pairs.first], sites[pairs.second]] = now
        out[sites[pairs.second], sites[pairs.first]] = now
        used += len(pairs.first)
    return out


def entries(kernel: Floats, problem: Problem) -> Floats:
    """The entries within groups of a (d, d) matrix."""
    parts = []
    for group in problem.groups:
        sites, pairs = np.array(group.sites), all_pairs(len(group.sites))
        parts.append(kernel[sites[pairs.first], sites[pairs.second]])
    return np.concatenate(parts)


def pivot_kernels(m: Floats, problem: Problem) -> list[Floats]:
    """K at the pivots of every group."""
    shape = np.shape(problem.data.map_.input)
    C = jnp.asarray(matrix(m, problem).reshape(shape))
    K = np.asarray(preactivation_kernel(C, problem.data.map_)).reshape(problem.size, -1)
    return [K[np.ix_(g.pivots, g.pivots)] for g in problem.groups]


def units(point: Point, problem: Problem) -> list[Unit]:
    """The law of one unit, group by group."""
    Ct = matrix(point.conjugate, problem)
    return [
        Unit(problem.phi, sites, K, Ct[np.ix_(g.sites, g.sites)])
        for sites, K, g in zip(
            problem.reduction, pivot_kernels(point.m, problem), problem.groups, strict=True
        )
    ]


def laws(point: Point, problem: Problem) -> list[Law]:
    """The tilted law of every group on its cloud."""
    return [law(c, u) for c, u in zip(point.clouds, units(point, problem), strict=True)]


def expand(point: Point, problem: Problem, *, noise: bool = False) -> Expansion:
    """F to second order around a point."""
    found = [
        derivatives(cloud, unit, noise=noise)
        for cloud, unit in zip(point.clouds, units(point, problem), strict=True)
    ]
    roots = [_root(f.covariance) for f in found]
    unit, inverse = block_diag(*(r[0] for r in roots)), block_diag(*(r[1] for r in roots))
    energy, slope, hessian = (
        np.asarray(a) for a in _data_part(jnp.asarray(point.m), problem.data, problem.groups)
    )
    natural = multiplicity(problem) * point.conjugate
    mean = np.concatenate([f.mean for f in found])
    # ln Z depends on C through K: its derivatives in K, pulled back.
    pull = problem.reads @ unit
    slope_m = unit.T @ (slope + natural) - pull.T @ np.concatenate([f.slope for f in found])
    curved = unit.T @ hessian @ unit - pull.T @ block_diag(*(f.curvature for f in found)) @ pull
    cross = block_diag(*(f.cross for f in found))
    mixed = unit.T @ inverse.T - pull.T @ cross.T @ inverse.T
    reduced = curved + mixed @ mixed.T
    missed = point.m - mean
    return Expansion(
        value=float(energy + natural @ point.m - sum(f.log_normaliser for f in found)),
        slope_m=slope_m,
        slope_l=inverse @ missed,
        mixed=mixed,
        reduced=(reduced + reduced.T) / 2,
        unit=unit,
        inverse=inverse,
        outside=missed - unit @ (inverse @ missed),
        effective=min(f.effective for f in found),
        noise=_noise([f.noise for f in found], [len(f.mean) for f in found], -pull.T, -inverse),
    )


def _noise(blocks: list[Floats], sizes: list[int], to_m: Floats, to_l: Floats) -> Floats:
    """Covariance of the slopes from those of (mean, slope of ln Z) of every group."""
    split = list(zip(blocks, sizes, strict=True))
    means = block_diag(*(b[:n, :n] for b, n in split))
    slopes = block_diag(*(b[n:, n:] for b, n in split))
    cross = block_diag(*(b[n:, :n] for b, n in split))
    joint = np.block([[slopes, cross], [cross.T, means]])
    to = block_diag(to_m, to_l)
    return np.asarray(to @ joint @ to.T)


def multiplicity(problem: Problem) -> Floats:
    """Multiplicity of every entry."""
    return np.concatenate([all_pairs(len(g.sites)).multiplicity for g in problem.groups])


def _root(covariance: Floats) -> tuple[Floats, Floats]:
    """(unit, inverse) with unit unit^T = covariance on its range."""
    scale = np.sqrt(np.diag(covariance))
    inverse_scale = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    values, vectors = np.linalg.eigh(inverse_scale[:, None] * covariance * inverse_scale)
    keep = values > _NULL * len(values)
    root = vectors[:, keep] * np.sqrt(values[keep])
    inverse = (vectors[:, keep] / np.sqrt(values[keep])).T
    return scale[:, None] * root, inverse * inverse_scale


def gradient(
    point: Point, problem: Problem, change: Floats | float = 0.0, conjugate: Floats | float = 0.0
) -> Floats:
    """(dF/dm, dF/dl) at a displaced point, on the same nodes; l are entries with multiplicity."""
    moved = point._replace(
        m=point.m + change, conjugate=point.conjugate + conjugate / multiplicity(problem)
    )
    found = [
        derivatives(cloud, unit, second=False)
        for cloud, unit in zip(moved.clouds, units(moved, problem), strict=True)
    ]
    _, slope, _ = _data_part(jnp.asarray(moved.m), problem.data, problem.groups)
    pulled = problem.reads.T @ np.concatenate([f.slope for f in found])
    slope_m = np.asarray(slope) + multiplicity(problem) * moved.conjugate - pulled
    return np.concatenate([slope_m, moved.m - np.concatenate([f.mean for f in found])])


def thinned(point: Point) -> Point:
    """A point on fewer particles, for what needs many evaluations and little accuracy."""
    clouds: list[Cloud] = []
    for cloud in point.clouds:
        if isinstance(cloud, Particles) and len(cloud.z) > _THINNED:
            stride = len(cloud.z) // _THINNED
            cloud = Particles(cloud.z[::stride], cloud.log_weight[::stride] + np.log(stride), 0.0)
        clouds.append(cloud)
    return point._replace(clouds=tuple(clouds))


def correction_slope(m: Floats, problem: Problem, *, lazy: bool) -> Floats:
    """Gradient in m of 1/2 sum_o ln det S_o, with the data energy where data act at order 1/N only."""
    value = _correction_slope(jnp.asarray(m), problem.data, problem.groups, lazy)
    return np.asarray(value)


def _assemble(m: jax.Array, data: Data, groups: tuple[Group, ...]) -> jax.Array:
    shape = np.shape(data.map_.input)
    C, used = jnp.zeros((shape[0] * shape[1],) * 2), 0
    for group in groups:
        sites, pairs = np.array(group.sites), all_pairs(len(group.sites))
        first, second = sites[pairs.first], sites[pairs.second]
        now = m[used : used + len(first)]
        C = C.at[first, second].set(now).at[second, first].set(now)
        used += len(first)
    return C.reshape(shape)


@partial(jax.jit, static_argnums=(2, 3))
def _correction_slope(m: jax.Array, data: Data, groups: tuple[Group, ...], lazy: bool) -> jax.Array:
    def correction(m: jax.Array) -> jax.Array:
        C = _assemble(m, data, groups)
        return output_log_determinant(C, data) + lazy * data_energy(C, data)

    return jax.grad(correction)(m)


@partial(jax.jit, static_argnums=2)
def _data_part(m: jax.Array, data: Data, groups: tuple[Group, ...]) -> Any:
    """The data energy, its gradient and its Hessian in m."""

    def energy(m: jax.Array) -> jax.Array:
        return data_energy(_assemble(m, data, groups), data)

    value, slope = jax.value_and_grad(energy)(m)
    return value, slope, jax.hessian(energy)(m)


def flip(point: Point, problem: Problem, signs: NDArray[np.int64]) -> Point:
    """h[t] -> s_t h[t] for odd phi; ``signs`` (T,)."""
    patterns = np.shape(problem.data.map_.input)[1]
    at = np.repeat(signs, patterns).astype(np.float64)
    both = at[:, None] * at
    clouds: list[Cloud] = []
    for cloud, group in zip(point.clouds, problem.groups, strict=True):
        pivots, sites = at[list(group.pivots)], at[list(group.sites)]
        if isinstance(cloud, Grid):
            clouds.append(cloud._replace(h=cloud.h * pivots, phi=cloud.phi * sites))
        else:
            clouds.append(cloud._replace(z=cloud.z * pivots))
    return Point(
        entries(both * matrix(point.m, problem), problem),
        entries(both * matrix(point.conjugate, problem), problem),
        tuple(clouds),
    )


def kernel_of(point: Point, problem: Problem) -> Floats:
    """C of shape (T, P, T, P); between groups the product of means, which is zero for odd phi."""
    C = matrix(point.m, problem)
    if len(problem.groups) > 1 and not problem.phi.odd and _is_positive(point.m, problem):
        mean, label = np.zeros(len(C)), np.zeros(len(C), int)
        for i, (at, group) in enumerate(zip(laws(point, problem), problem.groups, strict=True)):
            mean[list(group.sites)], label[list(group.sites)] = at.weights @ at.phi, i
        C = np.where(label[:, None] == label, C, np.outer(mean, mean))
    return C.reshape(np.shape(problem.data.map_.input))


def _is_positive(m: Floats, problem: Problem) -> bool:
    """Whether K is positive definite, which it may not be where a solver broke down."""
    try:
        return all(np.all(np.isfinite(np.linalg.cholesky(K))) for K in pivot_kernels(m, problem))
    except np.linalg.LinAlgError:
        return False
