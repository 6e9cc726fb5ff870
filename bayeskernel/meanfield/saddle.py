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

from collections.abc import Callable
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
from bayeskernel.meanfield.gaussian import Progress, Status
from bayeskernel.meanfield.prior import prior_recursion
from bayeskernel.meanfield.single_unit import (
    GRID_DIMENSIONS,
    Cloud,
    Grid,
    Law,
    Particles,
    Sites,
    Unit,
    all_pairs,
    derivatives,
    find_sites,
    grid,
    law,
    log_normaliser_variance,
    prior_particles,
    renew,
)
from bayeskernel.network import Network
from bayeskernel.tasks import Task

Floats = NDArray[np.float64]

# Fewest and most particles while the signal is raised; least and most snapshots of them in the last
# cloud, and how many numbers its statistics may hold.
_PARTICLES = (4096, 16384)
_SNAPSHOTS = (4, 48)
_STATISTICS = 15_000_000
# A Newton step may move kernels by this many standard deviations of one unit.
_RADIUS = 0.5
# Below this effective fraction particles are drawn anew.
_OVERLAP = 0.5
_STAGES = 8
_STEPS_PER_STAGE = 60
# A stage of the homotopy ends here, the solution at the caller's tolerance.
_ROUGHLY = 0.03
# A residual that has grown by this factor does not come back.
_RUNAWAY = 100.0
FLAT = 1e-6
# A residual below this share of its Monte-Carlo error is as good as none.
_SHARE_OF_NOISE = 0.02
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


def start(problem: Problem, rng: np.random.Generator) -> Point:
    """The prior, where Ct = 0."""
    prior = prior_recursion(problem.phi, problem.data.map_)
    m = entries(prior.reshape(problem.size, -1), problem)
    clouds: list[Cloud] = []
    for reduction, K in zip(problem.reduction, pivot_kernels(m, problem), strict=True):
        if len(K) <= GRID_DIMENSIONS:
            clouds.append(grid(problem.phi, reduction, K))
        else:
            clouds.append(prior_particles(len(K), _particles(problem), rng))
    return Point(m, np.zeros_like(m), tuple(clouds))


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
    natural = _multiplicity(problem) * point.conjugate
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


def _multiplicity(problem: Problem) -> Floats:
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
        m=point.m + change, conjugate=point.conjugate + conjugate / _multiplicity(problem)
    )
    found = [
        derivatives(cloud, unit, second=False)
        for cloud, unit in zip(moved.clouds, units(moved, problem), strict=True)
    ]
    _, slope, _ = _data_part(jnp.asarray(moved.m), problem.data, problem.groups)
    pulled = problem.reads.T @ np.concatenate([f.slope for f in found])
    slope_m = np.asarray(slope) + _multiplicity(problem) * moved.conjugate - pulled
    return np.concatenate([slope_m, moved.m - np.concatenate([f.mean for f in found])])


def thinned(point: Point) -> Point:
    """A point on fewer particles, for what needs many evaluations and little accuracy."""
    clouds: list[Cloud] = []
    for cloud in point.clouds:
        if isinstance(cloud, Particles) and len(cloud.z) > _PARTICLES[0]:
            stride = len(cloud.z) // _PARTICLES[0]
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


class Solution(NamedTuple):
    """A stationary point of F.

    Attributes
    ----------
    point
        Kernels and clouds.
    expansion
        F around it.
    free_energy
        F, nats per unit.
    residual
        Largest violation of the saddle-point equations on the clouds, in standard deviations of a unit.
    curvature
        Lowest eigenvalue of the reduced Hessian.
    direction
        Change of m along it.
    error
        Covariance of m over clouds, shape (n, n).
    free_energy_error
        Standard error of F from sampling.
    status
        How the solver ended.
    """

    point: Point
    expansion: Expansion
    free_energy: float
    residual: float
    curvature: float
    direction: Floats
    error: Floats
    free_energy_error: float
    status: Status


def newton_step(at: Expansion, *, downhill: bool, radius: float) -> tuple[Floats, Floats]:
    """Changes of (m, natural conjugate); ``downhill`` turns negative curvature round."""
    slope = at.slope_m + at.mixed @ at.slope_l
    values, vectors = np.linalg.eigh(at.reduced)
    if downhill:
        values = np.maximum(np.abs(values), 0.02)
    x = -vectors @ ((vectors.T @ slope) / values)
    shrink = min(1.0, radius / max(float(np.linalg.norm(x)), 1e-300))
    x = shrink * x
    conjugate = at.slope_l + at.mixed.T @ x
    shrink = min(1.0, 2 * radius / max(float(np.linalg.norm(conjugate)), 1e-300))
    return at.unit @ (shrink * x) - at.outside, at.inverse.T @ (shrink * conjugate)


def descend(
    point: Point,
    problem: Problem,
    rng: np.random.Generator,
    *,
    tolerance: float,
    max_steps: int,
    downhill: bool = True,
    frozen: bool = False,
    report: Callable[[int, float], None] | None = None,
) -> tuple[Point, Expansion, Status]:
    """Newton's method; clouds follow the law unless ``frozen``."""
    radius, best, first = _RADIUS, np.inf, np.inf
    at = _NOTHING
    for step in range(max_steps + 1):
        try:
            at = expand(point, problem)
            if not frozen and at.effective < _OVERLAP:
                point = refresh(point, problem, rng)
                at = expand(point, problem)
        except np.linalg.LinAlgError:
            return point, at, Status.BREAKDOWN
        first = min(first, max(1.0, at.residual))
        if report is not None:
            report(step, at.residual)
        if at.residual < tolerance:
            return point, at, Status.CONVERGED
        if step == max_steps:
            break
        if not at.residual < _RUNAWAY * first:
            return point, at, Status.DIVERGED
        # Overshooting shows as a growing residual.
        radius = radius / 2 if at.residual > 2 * best else min(_RADIUS, 1.5 * radius)
        best = min(best, at.residual) if at.residual <= 2 * best else at.residual
        change, conjugate = newton_step(at, downhill=downhill, radius=radius)
        point = point._replace(
            m=point.m + change, conjugate=point.conjugate + conjugate / _multiplicity(problem)
        )
    return point, at, Status.MAX_STEPS


# An expansion that says nothing.
_NONE = np.zeros((0, 0))
_NOTHING = Expansion(
    np.nan,
    np.full(1, np.nan),
    np.full(1, np.nan),
    _NONE,
    _NONE,
    _NONE,
    _NONE,
    np.zeros(0),
    0.0,
    _NONE,
)


def refresh(
    point: Point,
    problem: Problem,
    rng: np.random.Generator,
    *,
    transitions: int = 3,
    snapshots: int = 1,
) -> Point:
    """New clouds for the law at a point."""
    clouds = tuple(
        renew(cloud, unit, rng, transitions=transitions, snapshots=snapshots)
        for cloud, unit in zip(point.clouds, units(point, problem), strict=True)
    )
    return point._replace(clouds=clouds)


def follow(
    point: Point,
    problem: Problem,
    signals: Floats,
    rng: np.random.Generator,
    progress: Progress | None,
    *,
    leave_saddles: bool = True,
) -> tuple[Point, Status]:
    """Carry a point along a path of signals, leaving saddles down their unstable direction.

    Stops where a stage does not converge, and says so.
    """
    for signal in signals:
        now = problem.scaled(float(signal))
        report = None if progress is None else partial(progress, f"signal {signal:.2f}")
        options: dict[str, Any] = {"tolerance": _ROUGHLY, "max_steps": _STEPS_PER_STAGE}
        options |= {"downhill": leave_saddles, "report": report}
        point, at, status = descend(point, now, rng, **options)
        if status is Status.CONVERGED and leave_saddles:
            values, vectors = np.linalg.eigh(at.reduced)
            if values[0] < -FLAT:
                pushed = point._replace(m=point.m + 0.3 * at.unit @ vectors[:, 0])
                point, at, status = descend(pushed, now, rng, **options)
        if status is not Status.CONVERGED:
            return point, status
        point = refresh(point, now, rng)
    return point, Status.CONVERGED


def polish(
    point: Point,
    problem: Problem,
    rng: np.random.Generator,
    *,
    reached: Status,
    tolerance: float,
    max_steps: int,
    downhill: bool = True,
    progress: Progress | None = None,
) -> Solution:
    """Converge on clouds of full size and tell how far to trust the result."""
    if reached is not Status.CONVERGED:
        return _failed(point, _NOTHING, reached)
    report = None if progress is None else partial(progress, "polish")
    options: dict[str, Any] = {"max_steps": max_steps, "downhill": downhill, "report": report}
    point, at, status = descend(point, problem, rng, tolerance=_ROUGHLY, **options)
    if status is not Status.CONVERGED:
        return _failed(point, at, status)
    point = refresh(point, problem, rng, transitions=10)
    point = refresh(point, problem, rng, transitions=5, snapshots=_snapshots(problem))
    if not problem.phi.smooth:
        # Slopes jump as particles cross kinks; no need to converge further than within their noise.
        noise = expand(point, problem, noise=True).noise
        spread = float(np.sqrt(np.max(np.diag(noise), initial=0.0)))
        tolerance = max(tolerance, _SHARE_OF_NOISE * spread)
    point, at, status = descend(point, problem, rng, tolerance=tolerance, frozen=True, **options)
    if all(isinstance(cloud, Grid) for cloud in point.clouds) and status is Status.CONVERGED:
        # A grid matched to the solution instead of to the start.
        point, at, status = descend(
            refresh(point, problem, rng), problem, rng, tolerance=tolerance, frozen=True, **options
        )
    if status in (Status.BREAKDOWN, Status.DIVERGED):
        return _failed(point, at, status)
    at = expand(point, problem, noise=True)
    values, vectors = np.linalg.eigh(at.reduced)
    return Solution(
        point,
        at,
        at.value,
        at.residual,
        float(values[0]),
        at.unit @ vectors[:, 0],
        _error(at),
        np.sqrt(
            sum(
                log_normaliser_variance(c, u)
                for c, u in zip(point.clouds, units(point, problem), strict=True)
            )
        ),
        status,
    )


def _failed(point: Point, at: Expansion, status: Status) -> Solution:
    nan = np.full_like(point.m, np.nan)
    error = np.full((len(nan),) * 2, np.nan)
    return Solution(point, at, np.nan, at.residual, np.nan, nan, error, np.nan, status)


def _particles(problem: Problem) -> int:
    """Enough to invert the covariance of their statistics."""
    most = max(len(g.sites) * (len(g.sites) + 1) // 2 for g in problem.groups)
    return int(np.clip(5 * most, *_PARTICLES))


def _snapshots(problem: Problem) -> int:
    most = max(len(g.sites) * (len(g.sites) + 1) for g in problem.groups)
    return int(np.clip(_STATISTICS // (most * _particles(problem)), *_SNAPSHOTS))


def _error(at: Expansion) -> Floats:
    """Covariance of m: the solution moves by -H^-1 times the noise of the slopes."""
    k = at.unit.shape[1]
    hessian = np.block([[at.reduced - at.mixed @ at.mixed.T, at.mixed], [at.mixed.T, -np.eye(k)]])
    response = np.linalg.solve(hessian, at.noise)
    covariance = np.linalg.solve(hessian, response.T)[:k, :k]
    return np.asarray(at.unit @ covariance @ at.unit.T)


def kernel_of(point: Point, problem: Problem) -> Floats:
    """C of shape (T, P, T, P); between groups the product of means, which is zero for odd phi."""
    C = matrix(point.m, problem)
    if len(problem.groups) > 1 and not problem.phi.odd:
        mean, label = np.zeros(len(C)), np.zeros(len(C), int)
        for i, (at, group) in enumerate(zip(laws(point, problem), problem.groups, strict=True)):
            mean[list(group.sites)], label[list(group.sites)] = at.weights @ at.phi, i
        C = np.where(label[:, None] == label, C, np.outer(mean, mean))
    return C.reshape(np.shape(problem.data.map_.input))
