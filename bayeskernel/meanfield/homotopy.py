r"""Where do stationary kernels come from? Along the signal, from the prior.

Newton's method at one signal (`descend`), carried from the prior up to the signal asked for (`follow`), and
converged on clouds of full size (`polish`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bayeskernel.meanfield.gaussian import Progress, Status
from bayeskernel.meanfield.prior import prior_recursion
from bayeskernel.meanfield.problem import Problem, entries, matrix, pivot_kernels
from bayeskernel.meanfield.saddle import (
    Expansion,
    Point,
    completed,
    expand,
    laws,
    moved_by,
    units,
)
from bayeskernel.meanfield.single_unit import (
    GRID_DIMENSIONS,
    Cloud,
    Grid,
    activity,
    grid,
    log_normaliser,
    particles_at,
    prior_particles,
    renew,
)

Floats = NDArray[np.float64]

# Fewest and most particles while the signal is raised; least and most snapshots of them in the last
# cloud, and how many numbers its statistics may hold.
_PARTICLES = (4096, 16384)
_SNAPSHOTS = (4, 16)
_STATISTICS = 15_000_000
# A Newton step may move kernels by this many standard deviations of one unit.
_RADIUS = 0.5
_SMALLEST_RADIUS = 1e-3
# On the way down, the least curvature a step counts on, so that flat directions are not overshot.
_FLATTEST = 0.02
# How far a saddle is left along its unstable direction, in the same unit as the radius.
_PUSH = 0.3
# Below this effective fraction particles are drawn anew.
_OVERLAP = 0.5
_STEPS_PER_STAGE = 60
# A stage of the homotopy ends here, the solution at the caller's tolerance.
_ROUGHLY = 0.03
# A residual that has grown by this factor does not come back.
_RUNAWAY = 100.0
FLAT = 1e-6
# A residual below this share of its Monte-Carlo error is as good as none.
_SHARE_OF_NOISE = 0.02


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
    error: Floats
    free_energy_error: float
    status: Status


def start(problem: Problem, rng: np.random.Generator) -> Point:
    """The prior, where Ct = 0."""
    prior = prior_recursion(problem.phi, problem.data.map_)
    m = entries(prior.reshape(problem.size, -1), problem)
    clouds: list[Cloud] = []
    for group, K in zip(problem.groups, pivot_kernels(m, problem), strict=True):
        if len(K) <= GRID_DIMENSIONS:
            clouds.append(grid(problem.phi, group.reduction, K))
        else:
            clouds.append(prior_particles(len(K), _particles(problem), rng))
    return Point(m, np.zeros_like(m), tuple(clouds), symmetric=True)


def from_draws(conjugate: Floats, h: Floats, problem: Problem, *, symmetric: bool) -> Point:
    """A point from a conjugate kernel (T, P, T, P) and draws of q (M, T, P)."""
    flat = h.reshape(len(h), -1)
    phi = activity(problem.phi, flat)
    # C of the draws is positive definite, as a mixture with more exact entries need not be.
    C, Ct = phi.T @ phi / len(phi), conjugate.reshape(problem.size, -1)
    parity = problem.parity if symmetric else 0 * problem.parity
    m, natural = (np.where(parity, 0, entries(a, problem)) for a in (C, Ct))
    point = Point(m, natural, (), symmetric)
    clouds: list[Cloud] = []
    for unit, group in zip(units(point, problem), problem.groups, strict=True):
        now = flat[:, group.pivots]
        if len(group.pivots) <= GRID_DIMENSIONS:
            clouds.append(grid(problem.phi, unit.sites, now.T @ now / len(now)))
        else:
            clouds.append(particles_at(now, unit))
    return point._replace(clouds=tuple(clouds))


def newton_step(at: Expansion, *, downhill: bool, radius: float) -> tuple[Floats, Floats]:
    """Changes of (m, natural conjugate); ``downhill`` turns negative curvature round."""
    slope = at.slope_m + at.mixed @ at.slope_l
    values, vectors = np.linalg.eigh(at.reduced)
    if downhill:
        values = np.maximum(np.abs(values), _FLATTEST)
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
    at, reached = _NOTHING, None
    for step in range(max_steps + 1):
        try:
            at = expand(point, problem)
            if not frozen and at.effective < _OVERLAP:
                point = refresh(point, problem, rng)
                at = expand(point, problem)
        except np.linalg.LinAlgError:
            # The step left the domain: back, and take a shorter one.
            radius /= 4
            if reached is None or radius < _SMALLEST_RADIUS:
                return point, at, Status.BREAKDOWN
            point, at = reached
        else:
            first = min(first, max(1.0, at.residual))
            if report is not None:
                report(step, at.residual)
            if at.residual < tolerance:
                return point, at, Status.CONVERGED
            if not at.residual < _RUNAWAY * first:
                return point, at, Status.DIVERGED
            # Overshooting shows as a growing residual.
            radius = radius / 2 if at.residual > 2 * best else min(_RADIUS, 1.5 * radius)
            best = min(best, at.residual) if at.residual <= 2 * best else at.residual
            reached = point, at
        if step == max_steps:
            break
        change, conjugate = newton_step(at, downhill=downhill, radius=radius)
        if (
            point.symmetric
        ):  # rounding errors of odd entries, whose slopes are set to zero, would grow
            change, conjugate = (np.where(problem.parity, 0, x) for x in (change, conjugate))
        point = moved_by(point, problem, change, conjugate)
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
                direction = at.unit @ vectors[:, 0]
                breaking = np.linalg.norm(np.where(now.parity, direction, 0))
                pushed = point._replace(
                    m=point.m + _PUSH * direction,
                    symmetric=point.symmetric and bool(breaking < np.linalg.norm(direction) / 2),
                )
                point, at, status = descend(pushed, now, rng, **options)
        if status is not Status.CONVERGED:
            return point, status
        point = refresh(point, now, rng)
    return point, Status.CONVERGED


def polish(
    point: Point,
    problem: Problem,
    every_entry: Problem,
    rng: np.random.Generator,
    *,
    reached: Status,
    tolerance: float,
    max_steps: int,
    downhill: bool = True,
    progress: Progress | None = None,
) -> Solution:
    """Converge on clouds of full size and tell how far to trust the result.

    Solved for are the entries of ``problem``; the solution has those of ``every_entry``.
    """
    if reached is not Status.CONVERGED:
        return _failed(point, _NOTHING, reached, problem, every_entry)
    report = None if progress is None else partial(progress, "polish")
    options: dict[str, Any] = {"max_steps": max_steps, "downhill": downhill, "report": report}
    point, at, status = descend(point, problem, rng, tolerance=_ROUGHLY, **options)
    if status is not Status.CONVERGED:
        return _failed(point, at, status, problem, every_entry)
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
        return _failed(point, at, status, problem, every_entry)
    # Entries that nothing reads follow without an equation of their own.
    residual = at.residual
    point, problem = completed(point, problem, every_entry), every_entry
    at = expand(point, problem, noise=True)
    # The solution moves by -response of the noise of the slopes.
    response = np.asarray(np.linalg.solve(at.hessian, at.noise), np.float64)
    value, error = _free_energy(point, at, response, problem, rng.spawn(1)[0])
    curvature = float(np.linalg.eigvalsh(at.reduced)[0])
    return Solution(point, at, value, residual, curvature, _error(at, response), error, status)


def _free_energy(
    point: Point, at: Expansion, response: Floats, problem: Problem, rng: np.random.Generator
) -> tuple[float, float]:
    """F and its standard error.

    F is stationary, so noise n of the slopes enters as n^T H^-1 n / 2 only, whose mean is taken off; what is
    left to know well is ln Z at these kernels.
    """
    found = [
        log_normaliser(cloud, unit, rng)
        for cloud, unit in zip(point.clouds, units(point, problem), strict=True)
    ]
    pairs = zip(laws(point, problem), found, strict=True)
    value = at.value + sum(own.log_normaliser - better for own, (better, _) in pairs)
    variance = sum(variance for _, variance in found) + np.trace(response @ response) / 2
    return float(value - np.trace(response) / 2), float(np.sqrt(variance))


def _failed(
    point: Point, at: Expansion, status: Status, problem: Problem, every_entry: Problem
) -> Solution:
    m, conjugate = (entries(matrix(a, problem), every_entry) for a in (point.m, point.conjugate))
    point = point._replace(m=m, conjugate=conjugate)
    error = np.full((len(m),) * 2, np.nan)
    return Solution(point, at, np.nan, at.residual, np.nan, error, np.nan, status)


def _particles(problem: Problem) -> int:
    """Enough to invert the covariance of their statistics."""
    most = max(len(g.pairs.first) for g in problem.groups)
    return int(np.clip(5 * most, *_PARTICLES))


def _snapshots(problem: Problem) -> int:
    most = max(1, *(len(g.pairs.first) + len(g.moving.first) for g in problem.groups))
    return int(np.clip(_STATISTICS // (most * _particles(problem)), *_SNAPSHOTS))


def _error(at: Expansion, response: Floats) -> Floats:
    """Covariance of m, from H^-1 times the covariance of the slopes' noise."""
    k = at.unit.shape[1]
    covariance = np.linalg.solve(at.hessian, response.T)[:k, :k]
    return np.asarray(at.unit @ covariance @ at.unit.T)
