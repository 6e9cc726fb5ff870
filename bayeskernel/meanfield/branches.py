r"""Which solutions are there? Descents from the prior, from a stronger signal, and down the unstable directions of saddles.

The prior keeps every sign symmetry, and so does a descent from it. Where the solution it leads to turns out to be a saddle,
descent goes on along the unstable direction; the saddle is kept as a branch. Another descent comes down from the solution at
a stronger signal, which finds the coherent branch where it coexists with the incoherent one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from bayeskernel.gauge import canonical_signs, distance
from bayeskernel.meanfield.errors import monte_carlo
from bayeskernel.meanfield.newton import (
    Descent,
    Newton,
    Progress,
    Status,
    lowest_curvature,
    renewed,
)
from bayeskernel.meanfield.saddle import Point, Saddle, inside
from bayeskernel.meanfield.sites import read_blocks
from bayeskernel.meanfield.starts import first_point, prior_point
from bayeskernel.problem import Floats, Problem

# A stronger signal, from which a second descent comes, and the residual at which it is solved.
_STRONG_SIGNAL, _STRONGLY = 2.0, 1e-3
# Up to so many sites it is made even where no symmetry can break.
_SEARCHED = 128
# How far a saddle is left along its unstable direction, in standard deviations of one unit.
PUSH = 0.4
# Curvature above -this is stable within the solver's accuracy, and on random nodes.
_FLAT, NOISY = 2e-6, 0.05
# Times as many nodes as else where it is below that noise.
_MORE = 4
# Residual at which nodes are replaced by those of full accuracy, and steps after which their noise is enough.
_ROUGHLY, _ROUGH_STEPS = 0.03, 50
# A residual below this share of its Monte-Carlo error is as good as none.
_SHARE_OF_NOISE = 0.02
# Two kernels closer than this, or than their Monte-Carlo errors allow, are one solution.
_SAME, _SIGMAS = 1e-4, 5.0
# Where rounding errors rule saddles lead to saddles without end.
_MOST_DESCENTS = 32
# Stages of a signal that cannot be reached at once.
_STAGES = 8
# A share of K that no law knows of: more than this is more than the error of particles.
_STRAYED = 1e-3


class Solution(NamedTuple):
    """A stationary point of F.

    Attributes
    ----------
    saddle
        F around it, all entries of C among its coordinates.
    free_energy
        F, nats per unit.
    residual
        Largest violation of the saddle-point equations on the nodes, in standard deviations of a unit.
    curvature
        Lowest eigenvalue of the Hessian of the reduced F, in the same units.
    error
        Standard error of C from sampling, shape (d, d).
    free_energy_error
        Likewise.
    status
        How the solver ended.
    start
        A point close by from which further descents go.
    """

    saddle: Saddle
    free_energy: float
    residual: float
    curvature: float
    error: Floats
    free_energy_error: float
    status: Status
    start: Point

    @property
    def stable(self) -> bool:
        """Whether it is a minimum, as far as random nodes tell."""
        return not _bends(2 * self.curvature, self.saddle.point)

    @property
    def kernel(self) -> Floats:
        """C, shape (d, d)."""
        return self.saddle.point.C


class Search(NamedTuple):
    """A problem and how it is solved."""

    problem: Problem
    newton: Newton
    rng: np.random.Generator
    progress: Progress | None = None

    def solutions(self, *, every_branch: bool) -> list[Solution]:
        """All branches found, lowest F first; or those that the prior leads to."""
        first = first_point(self.problem, self.rng, self._report("quasi-Newton"))
        kept = self._descended([first])
        best = kept[0]
        unbroken = best.start.symmetric and not np.all(self.problem.even)
        small = self.problem.size <= _SEARCHED and not best.start.random
        targets = self.problem.mean_field and any(np.any(r.targets) for r in self.problem.readings)
        if every_branch and targets and (unbroken or small) and best.status is Status.CONVERGED:
            # Noise of particles alone would leave a symmetric start in any direction.
            leant = _leant(Saddle(self.problem, best.start))[1][:1]
            above = [self._scaled(_STRONG_SIGNAL)._strong(point) for point in leant]
            kept = self._descended([point for point in above if point is not None], kept)
        return [self._canonical(solution) for solution in kept]

    def along(self, signals: Sequence[float]) -> Iterator[list[Solution]]:
        """Solutions at one signal after the other, each descended to from the one before."""
        point = prior_point(self.problem, self.rng)
        for signal in signals:
            search = self._scaled(signal)
            kept = search._descended([point])
            if kept[0].status is Status.CONVERGED:
                point = kept[0].start
            yield [search._canonical(solution) for solution in kept]

    def solution(self, start: Point) -> Solution:
        """The solution that a point leads to."""
        return self._converged(self._rough(start))

    def _rough(self, start: Point) -> Descent:
        """Where a descent leads, not yet on nodes of full accuracy; in stages of the signal where it gets stuck."""
        descent = self._roughly(self.problem, start, "descent")
        for stage in range(1, _STAGES + 1):
            if descent.status in (Status.CONVERGED, Status.MAX_STEPS):
                break
            part = self.problem.scaled(stage / _STAGES)
            staged = self._roughly(part, start, f"stage {stage}")
            if staged.status is not Status.CONVERGED:
                break
            start, descent = staged.saddle.point, staged if stage == _STAGES else descent
        return descent

    def _roughly(self, problem: Problem, start: Point, stage: str) -> Descent:
        """Where a descent leads as far as its nodes tell: random ones have a residual of their own."""
        newton = replace(self.newton, tolerance=max(self.newton.tolerance, _ROUGHLY))
        if start.random:
            newton = replace(newton, max_steps=min(newton.max_steps, _ROUGH_STEPS))
        descent = newton.descend(problem, start, self.rng, self._report(stage))
        stopped = start.random and descent.status in (Status.MAX_STEPS, Status.STALLED)
        if stopped and descent.saddle.residual < monte_carlo(descent.saddle).residual:
            return descent._replace(status=Status.CONVERGED)
        return descent

    def _converged(self, rough: Descent) -> Solution:
        """Converge on nodes of full accuracy."""
        if rough.status is not Status.CONVERGED:
            return _failed(rough)
        point = _refined(rough.saddle, self.rng)
        try:
            descent = self._last(point).descend(
                self.problem, point, self.rng, self._report("polish")
            )
        except np.linalg.LinAlgError:
            return _failed(rough._replace(status=Status.BREAKDOWN))
        if descent.status in (Status.BREAKDOWN, Status.UNCOVERED):
            return _failed(descent)
        if strayed(descent.saddle) > _STRAYED:
            return _failed(descent._replace(status=Status.UNCOVERED))
        return self._finished(descent, (rough if point.random else descent).saddle.point)

    def _descended(self, starts: list[Point], kept: Sequence[Solution] = ()) -> list[Solution]:
        """Solutions reached from some points and from every saddle met on the way, beside those kept."""
        queue, reached = list(starts), list(kept)
        for _ in range(_MOST_DESCENTS):
            if not queue:
                break
            rough = self._rough(queue.pop(0))
            converged = rough.status is Status.CONVERGED
            if converged and rough.saddle.point.random and (beside := _beside(rough.saddle)):
                queue += beside  # a saddle is not worth its particles
                continue
            solution = self._converged(rough)
            if any(_same(solution, other) for other in reached):
                continue
            reached.append(solution)
            # Where a descent got stuck its curvature leads nowhere, and would without end.
            if solution.status is Status.CONVERGED and not solution.stable:
                queue += _beside(Saddle(self.problem, solution.start))
        return sorted(reached, key=_rank)

    def _strong(self, start: Point) -> Point | None:
        """A point close to a stable solution of this problem; None where there is none."""
        newton = replace(self.newton, tolerance=_STRONGLY)
        for _ in range(4):
            descent = newton.descend(self.problem, start, self.rng, self._report("strong signal"))
            if descent.status is not Status.CONVERGED:
                return None
            beside = _beside(descent.saddle)
            if not beside:
                break
            start = beside[0]
        return descent.saddle.point

    def _last(self, point: Point) -> Newton:
        """The solver on nodes that stay; no more accurate than kinks of phi on random nodes allow."""
        newton = replace(self.newton, renew=False)
        if self.problem.phi.smooth or not point.random:
            return newton
        noise = monte_carlo(Saddle(self.problem, point)).residual
        return replace(newton, tolerance=max(newton.tolerance, _SHARE_OF_NOISE * noise))

    def _finished(self, descent: Descent, start: Point) -> Solution:
        """A solution with all entries of C, and how far to trust it."""
        saddle = completed(descent.saddle)
        noise = monte_carlo(saddle)
        value, variance = saddle.value - noise.excess, noise.variance
        for law, nodes in zip(saddle.laws, saddle.point.nodes, strict=True):
            kernels = saddle.K[nodes.sites.block], saddle.point.Ct[nodes.sites.block]
            better, own = nodes.log_normaliser(law, *kernels, self.rng.spawn(1)[0])
            value, variance = value + law.log_normaliser - better, variance + own
        return Solution(
            saddle,
            float(value),
            descent.saddle.residual,
            lowest_curvature(saddle)[0] / 2,
            noise.error,
            float(np.sqrt(variance)),
            descent.status,
            start,
        )

    def _canonical(self, solution: Solution) -> Solution:
        """The solution with steps as positively correlated as can be."""
        if not np.isfinite(solution.free_energy):
            return solution  # a failed run is returned as it ended
        signs = canonical_signs(self.problem.tensor(solution.kernel), self.problem.symmetry)
        if np.all(signs == 1):
            return solution
        flipped = solution.saddle.point.flipped(
            np.repeat(signs, self.problem.patterns).astype(float)
        )
        return solution._replace(saddle=Saddle(self.problem, flipped))

    def _report(self, stage: str) -> partial[None] | None:
        return None if self.progress is None else partial(self.progress, stage)

    def _scaled(self, signal: float) -> Search:
        return self._replace(problem=self.problem.scaled(signal))


def _same(one: Solution, two: Solution) -> bool:
    """Whether their kernels are one, within their standard errors and up to signs that are free."""
    problem = one.saddle.problem
    error = np.linalg.norm(np.stack([one.error, two.error]))
    apart = distance(problem.tensor(one.kernel), problem.tensor(two.kernel), problem.symmetry)
    return bool(apart < _SAME * np.linalg.norm(two.kernel) + _SIGMAS * error)


def strayed(saddle: Saddle) -> float:
    """How far sites without pivots are from following as they do before training, as a share of K's variances.

    Directions that are null there may grow as kernels are learned, and laws know nothing of them.
    """
    most = 0.0
    for nodes in saddle.point.nodes:
        sites, K = nodes.sites, saddle.K[nodes.sites.block]
        followed = sites.spread @ K[np.ix_(sites.pivots, sites.pivots)] @ sites.spread.T
        size = np.sqrt(np.diag(K))
        allowed = np.outer(size, size)
        apart = np.divide(abs(K - followed), allowed, out=np.zeros_like(K), where=allowed > 0)
        most = max(most, float(np.max(apart)))
    return most


def completed(saddle: Saddle) -> Saddle:
    """The same point with the entries of C that nothing reads, which follow as averages."""
    point, problem = saddle.point, saddle.problem
    read = np.asarray(problem.over_sites(read_blocks(problem)))
    C = np.where(read, point.C, saddle.average)
    return Saddle(problem, point._replace(C=C, nodes=tuple(n.completed() for n in point.nodes)))


def _failed(descent: Descent) -> Solution:
    nan, saddle = float("nan"), descent.saddle
    error = np.full_like(saddle.K, np.nan)
    return Solution(saddle, nan, saddle.residual, nan, error, nan, descent.status, saddle.point)


def _rank(solution: Solution) -> tuple[bool, bool, float]:
    """Converged before not, stable before saddles, lowest F first."""
    failed = solution.status is not Status.CONVERGED
    return failed, not solution.stable, float(np.nan_to_num(solution.free_energy))


def _refined(saddle: Saddle, rng: np.random.Generator) -> Point:
    """The point on nodes of full accuracy, more of them where their noise could hide a minimum."""
    soft = saddle.point.random and lowest_curvature(saddle)[0] < NOISY
    return renewed(saddle, rng, _MORE if soft else 1)


def _beside(saddle: Saddle) -> list[Point]:
    """Points beside a saddle along its unstable direction; none where it is stable."""
    curvature, points = _leant(saddle)
    return points if _bends(curvature, saddle.point) else []


def _bends(curvature: float, point: Point) -> bool:
    """Whether a lowest curvature of 2 F is that of a saddle; NaN is."""
    return not curvature >= -(NOISY if point.random else _FLAT)


def _leant(saddle: Saddle) -> tuple[float, list[Point]]:
    """The lowest curvature, and points beside along its direction that lie in the domain of F."""
    curvature, x = lowest_curvature(saddle)
    one, two = (displaced(saddle, way * x) for way in (PUSH, -PUSH))
    # Where a symmetry breaks, both ways are mirror images.
    points = [one, two] if one.symmetric == saddle.point.symmetric else [one]
    return curvature, [point for point in points if inside(saddle.problem, point)]


def displaced(saddle: Saddle, x: Floats) -> Point:
    """The point moved by x, and symmetric as before unless x is mainly not."""
    point, problem = saddle.point, saddle.problem
    dC, dCt = saddle.spread(x), saddle.tilt(saddle.followed(x))
    odd = np.where(np.asarray(problem.over_sites(problem.even)), 0.0, dC)
    kept = point.symmetric and bool(np.linalg.norm(odd) <= np.linalg.norm(dC) / 2)
    return point._replace(C=point.C + dC, Ct=point.Ct + dCt, symmetric=kept)
