r"""How is a stationary point reached? A trust-region Newton method on F(C) = max over Ct of F(C, Ct).

The step in C minimises the reduced quadratic model within the trust region (conjugate gradients of Steihaug), Ct follows to
first order and is corrected until it belongs to the new C. Descent leaves saddles unless a symmetry holds it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from scipy.linalg import eigh_tridiagonal

from bayeskernel.meanfield.saddle import Point, Saddle
from bayeskernel.problem import Floats, Problem

Progress = Callable[[str, int, float], None]
# Terms c x x^T of unit x that are added to a Hessian, as pairs (c, x).
Corrections = Sequence[tuple[float, Floats]]

# Hessians with up to this many coordinates are made dense.
DENSE = 600
# Share of the tolerance that a Newton step need not go below.
_ENOUGH = 0.03
# Most Krylov vectors and relative accuracy of the lowest eigenvalue beyond.
_KRYLOV, _RITZ = 40, 0.02


class Status(StrEnum):
    """How a solver ended."""

    CONVERGED = "converged"
    MAX_STEPS = "the residual did not reach the tolerance within the allowed steps"
    BREAKDOWN = "the kernel lost positive definiteness to rounding errors"
    UNCOVERED = "the law left the nodes that it was computed on"
    STALLED = "rounding errors stopped the descent before the residual reached the tolerance"


class Descent(NamedTuple):
    """Where a descent ended, and how."""

    saddle: Saddle
    status: Status


@dataclass(frozen=True)
class Newton:
    """The solver and its constants.

    Attributes
    ----------
    tolerance
        On the largest violation of the saddle-point equations.
    max_steps
        Newton steps.
    radius, largest
        First trust region, and the largest as a multiple of the root of the number of sites; in
        standard deviations of one unit.
    smallest
        A trust region below this means that rounding errors rule.
    overlap, least_overlap
        Below this effective fraction nodes are drawn anew, below that a step is refused.
    matched
        Norm of the mismatch below which Ct counts as belonging to C.
    corrections
        Of Ct after a step, each of at most unit length.
    renew
        Whether nodes follow the law.
    """

    tolerance: float
    max_steps: int
    radius: float = 0.5
    largest: float = 1.0
    smallest: float = 1e-9
    overlap: float = 0.5
    least_overlap: float = 0.05
    matched: float = 0.3
    corrections: int = 4
    renew: bool = True

    def descend(
        self,
        problem: Problem,
        point: Point,
        rng: np.random.Generator,
        report: Callable[[int, float], None] | None = None,
    ) -> Descent:
        """Follow F downhill from a point."""
        saddle, radius = Saddle(problem, point), self.radius
        for step in range(self.max_steps + 1):
            try:
                saddle = self._settled(saddle, rng)
            except np.linalg.LinAlgError:
                covered = saddle.effective > self.least_overlap
                return Descent(saddle, Status.BREAKDOWN if covered else Status.UNCOVERED)
            if report is not None:
                report(step, saddle.residual)
            if not saddle.residual < np.inf:
                return Descent(saddle, Status.BREAKDOWN)
            # A law on a handful of nodes has few directions, and no residual beyond them.
            if not saddle.effective > self.least_overlap:
                return Descent(saddle, Status.UNCOVERED)
            if saddle.residual < self.tolerance:
                return Descent(saddle, Status.CONVERGED)
            if step == self.max_steps:
                break
            trial, radius = self._step(saddle, radius)
            if trial is None:
                return Descent(saddle, Status.STALLED)
            saddle = trial
        return Descent(saddle, Status.MAX_STEPS)

    def _settled(self, saddle: Saddle, rng: np.random.Generator) -> Saddle:
        """The same C but for null directions on nodes that cover the law, with the Ct that belongs to it."""
        for _ in range(self.max_steps):
            if self.renew and saddle.effective < self.overlap:
                saddle = Saddle(saddle.problem, renewed(saddle, rng))
            if saddle.point.random and (point := saddle.settled()) is not saddle.point:
                saddle = Saddle(saddle.problem, point)
            if not np.linalg.norm(saddle.mismatch) > self.matched:
                break
            saddle = _corrected(saddle)
        return saddle

    def _step(self, saddle: Saddle, radius: float) -> tuple[Saddle | None, float]:
        """The next point, None where there is none, and the radius of the trust region there."""
        slope, most = saddle.reduced_slope, self.largest * np.sqrt(saddle.problem.size)

        def product(x: Floats) -> Floats:
            return saddle.product(x) + saddle.bent(x)

        while radius > self.smallest:
            x, predicted, length = steihaug(product, slope, radius, _ENOUGH * self.tolerance)
            trial = self._matched(saddle, x)
            gain = -1.0
            if trial is not None and predicted > 0:
                gain = 2 * (saddle.reduced_value - trial.reduced_value) / predicted
                # Close to the solution both decreases drown in the rounding errors of F.
                if predicted < 1e-11 * (1 + abs(saddle.value)):
                    gain = 1.0 if trial.residual < saddle.residual else -1.0
            if gain > 0.75 and length > 0.9 * radius:
                radius = min(2 * radius, most)
            elif not gain >= 0.25:
                radius = 0.25 * min(radius, length)
            if gain > 0.05:
                return trial, radius
        return None, radius

    def _matched(self, saddle: Saddle, x: Floats) -> Saddle | None:
        """The point after a step, Ct corrected; None outside the domain or the nodes' reach."""
        try:
            trial = Saddle(saddle.problem, saddle.moved(x, saddle.mismatch + saddle.followed(x)))
            for _ in range(self.corrections):
                if np.linalg.norm(trial.mismatch) < self.matched:
                    break
                trial = _corrected(trial)
        except np.linalg.LinAlgError:
            return None
        matched = np.linalg.norm(trial.mismatch) < self.matched
        return trial if matched and trial.effective > self.least_overlap else None


def _corrected(saddle: Saddle) -> Saddle:
    """A step of Newton's method in Ct alone, in which F is concave."""
    step = saddle.mismatch / max(1.0, float(np.linalg.norm(saddle.mismatch)))
    return Saddle(saddle.problem, saddle.moved(np.zeros_like(step), step))


def renewed(saddle: Saddle, rng: np.random.Generator, times: int = 0) -> Point:
    """The point with nodes drawn anew for its laws; see `laws.Nodes`."""
    point = saddle.point
    nodes = tuple(
        own.renewed(law, saddle.K[own.sites.block], point.Ct[own.sites.block], rng, times)
        for own, law in zip(point.nodes, saddle.laws, strict=True)
    )
    return point._replace(nodes=nodes)


def steihaug(
    product: Callable[[Floats], Floats],
    slope: Floats,
    radius: float,
    enough: float = 0.0,
    share: float = 0.1,
) -> tuple[Floats, float, float]:
    """Minimise g.p + p.H.p / 2 within |p| <= radius by conjugate gradients, until the slope is below ``enough`` or a share.

    Returns p, the decrease it should bring, and |p|.
    """
    norm = float(np.linalg.norm(slope))
    target = max(min(share, np.sqrt(norm)) * norm, enough)
    most = min(len(slope) + 10, 300)
    p = Hp = np.zeros_like(slope)
    r, d = slope, -slope
    for _ in range(most):
        if not np.any(d):
            break
        Hd = product(d)
        curvature, rr = float(d @ Hd), float(r @ r)
        outside = curvature <= 0 or np.linalg.norm(p + rr / curvature * d) >= radius
        alpha = _to_boundary(p, d, radius) if outside else rr / curvature
        p, Hp, r = p + alpha * d, Hp + alpha * Hd, r + alpha * Hd
        if outside or np.linalg.norm(r) <= target:
            break
        d = -r + float(r @ r) / rr * d
    return p, float(-p @ slope - p @ Hp / 2), float(np.linalg.norm(p))


def _to_boundary(p: Floats, d: Floats, radius: float) -> float:
    dd, pd, gap = float(d @ d), float(p @ d), radius**2 - float(p @ p)
    return float((-pd + np.sqrt(max(pd**2 + dd * gap, 0.0))) / dd)


def corrected_product(saddle: Saddle, y: Floats, corrections: Corrections) -> Floats:
    """The reduced Hessian of 2 F times y, with corrections."""
    return sum((c * (x @ y) * x for c, x in corrections), saddle.product(y))


def lowest_curvature(saddle: Saddle, corrections: Corrections = ()) -> tuple[float, Floats]:
    """Lowest eigenvalue of the reduced Hessian of 2 F with corrections, and its eigenvector in whitened coordinates.

    Beyond `DENSE` coordinates the lowest Ritz pair: to a few percent, and never below the eigenvalue.
    """
    if saddle.size <= DENSE:
        hessian = sum((c * np.outer(x, x) for c, x in corrections), saddle.dense()[1])
        values, vectors = np.linalg.eigh(hessian)
        return (float(values[0]), vectors[:, 0]) if len(values) else (np.inf, np.zeros(0))
    basis, diagonal, beside = list[Floats](), list[float](), list[float]()
    v = np.random.default_rng(0).standard_normal(saddle.size)
    for _ in range(_KRYLOV):
        basis.append(v / np.linalg.norm(v))
        v = corrected_product(saddle, basis[-1], corrections)
        diagonal.append(float(v @ basis[-1]))
        for b in basis:
            v = v - (v @ b) * b
        values, vectors = eigh_tridiagonal(np.array(diagonal), np.array(beside))
        beside.append(float(np.linalg.norm(v)))
        # The residual of the Ritz pair bounds its distance to an eigenvalue.
        if beside[-1] * abs(vectors[-1, 0]) < _RITZ * abs(values[0]):
            break
    return float(values[0]), sum(
        (c * b for c, b in zip(vectors[:, 0], basis, strict=True)), 0.0 * v
    )
