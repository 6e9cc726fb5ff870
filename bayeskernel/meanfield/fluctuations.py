r"""How far does the kernel of a network of finite width stray from the mean-field kernel?

The joint density of (C, Ct), Ct along the imaginary axis, is exp(-N F(C, Ct) - A(C)) with a flat measure and
A = 1/2 sum_o ln det S_o (in standard scaling with the energy of the data too, which is then no part of F). With H the Hessian
of 2 F in whitened (x, l) and Q the inverse of its reduced part (docs/theory, section 6, derived here)

    cov C = 2 R Q R^T / N,      <C> - C* = -[H^-1 (2 grad A + d^3 (2 F) : H^-1)]_C / N,

    H^-1 = sum_i (v_i, E v_i)(v_i, E v_i)^T / lambda_i - sum_j (0, e_j)(0, e_j)^T

over the eigenpairs of the reduced Hessian. Third derivatives are second differences of the gradient along these directions.
In many dimensions Q comes from random directions, and conjugate gradients solve for it.

Mean outputs are functions of C, given which outputs are Gaussian: that adds their conditional variance.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, cg

from bayeskernel.errors import BayesKernelError
from bayeskernel.likelihood import (
    Stiffness,
    dual_targets,
    force,
    log_determinant_slope,
    mean_output,
    output_variance,
)
from bayeskernel.meanfield.branches import Solution
from bayeskernel.meanfield.crowd import Crowd
from bayeskernel.meanfield.newton import DENSE, Status
from bayeskernel.meanfield.particles import Particles
from bayeskernel.meanfield.saddle import Point, Saddle, Stationarity, within_groups
from bayeskernel.problem import Floats, Ints, Problem

# Up to so many coordinates, a kernel of rank 64, all directions are taken.
MOST_COORDINATES = 64 * 65 // 2
# And, as every coordinate costs products of matrices of all sites, up to so many sites.
_MOST_SITES = 256
# Random directions beyond: what data change of variances is known to about a fifth. Accuracy and number of products of a solve.
_PROBES, _SOLVED, _PRODUCTS = 48, 1e-2, 200
# Accuracy of the solve for one output.
_EXACTLY = 1e-4
# Displacement for second differences of the gradient, in standard deviations of one unit, and number M of particles they are
# averaged over. Particles that cross a kink make noise, as M^(-1/2) times the displacement to the power of -3/2.
_SMOOTH, _ACROSS_KINKS = (0.01, 4096), (0.1, 65536)
_SEED = 0
_AT_A_SADDLE = (
    "fluctuations exist around a minimum; this solution is a saddle, or Wick's law sees one"
)


class FluctuationError(BayesKernelError):
    """Fluctuations around this solution are not available; the message says why."""


class Leading(NamedTuple):
    """What holds of every entry of C (d, d) and of every output (d, O) at leading order."""

    kernel: Floats
    output: Floats


class Fluctuations:
    """Expansion around a minimum.

    Parameters
    ----------
    solution
        A converged minimum. Activities of independent groups must have mean zero: phi is odd, or there is one group.

    Raises
    ------
    FluctuationError
        At a saddle, or for a solution that did not converge.
    """

    def __init__(self, solution: Solution) -> None:
        if solution.status is not Status.CONVERGED:
            raise FluctuationError(f"fluctuations exist around a solution; {solution.status}")
        if solution.curvature <= 0:
            raise FluctuationError(_AT_A_SADDLE)
        self._saddle, self._problem = _accurate(solution.saddle), solution.saddle.problem
        self._outputs = _Outputs(self._saddle.point.C, self._problem)
        self._within = within_groups(self._saddle.point)
        self._few = self._saddle.size <= MOST_COORDINATES and self._problem.size <= _MOST_SITES

    def spread(self) -> Leading:
        """Standard deviations times sqrt(N); of outputs in standard scaling, of order one, themselves."""
        C, problem = self._saddle.point.C, self._problem
        variance, of_output = self._summed() if self._few else self._probed()
        # Between independent groups C is a mean of N products of independent factors.
        variance = np.where(self._within, variance, np.outer(np.diag(C), np.diag(C)))
        output = output_variance(C, problem)
        if problem.mean_field:
            output = output + of_output + self._outputs.apart(~self._within)
        return Leading(np.sqrt(np.maximum(variance, 0)), np.sqrt(np.maximum(output, 0)))

    def outputs_at(self, sites: Ints) -> Floats:
        """Standard deviations of the outputs at some pairs t P + a, as of `spread`; shape (n, O)."""
        variance = output_variance(self._saddle.point.C, self._problem)[sites]
        if self._problem.mean_field:
            variance += self._outputs.apart(~self._within)[sites]
            for i, o in np.ndindex(variance.shape):
                x = self._saddle.gathered(self._outputs.gradient(int(sites[i]), o))
                variance[i, o] += 2 * x @ self._solved(x, _EXACTLY)
        return np.sqrt(np.maximum(variance, 0))

    def shift(self) -> Leading:
        """N times the shifts of the means; FluctuationError beyond a kernel of rank 64."""
        if not self._few or any(isinstance(n, Crowd) for n in self._saddle.point.nodes):
            raise FluctuationError(
                f"shifts need at most {MOST_COORDINATES} coordinates and {_MOST_SITES} sites, "
                f"here are {self._saddle.size} and {self._problem.size}"
            )
        kernel = self._drift()
        output = self._outputs.slope(kernel)
        for value, x in zip(*self._eigenpairs, strict=True):
            output = output + self._outputs.bend(self._saddle.spread(x)) / value
        return Leading(kernel, output)

    @cached_property
    def _dense(self) -> tuple[Floats, Floats]:
        """E and the reduced Hessian."""
        return self._saddle.dense()

    @cached_property
    def _eigenpairs(self) -> tuple[Floats, Floats]:
        """Eigenvalues of the reduced Hessian (k,), and eigenvectors as rows."""
        values, vectors = np.linalg.eigh(self._dense[1])
        if np.any(values <= 0):  # as more particles tell
            raise FluctuationError(_AT_A_SADDLE)
        return values, vectors.T

    def _summed(self) -> tuple[Floats, Floats]:
        """Variances of C and of mean outputs, sums over all directions."""
        kernel, output = np.zeros_like(self._saddle.K), np.zeros_like(self._outputs.dual)
        for value, x in zip(*self._eigenpairs, strict=True):
            dC = self._saddle.spread(x)
            kernel += 2 / value * dC**2
            output += 2 / value * self._outputs.slope(dC) ** 2
        return kernel, output

    def _probed(self) -> tuple[Floats, Floats]:
        """The same from random directions: Q = 1 + (Q - 1), the first part known."""
        saddle, rng = self._saddle, np.random.default_rng(_SEED)
        kernel, output = np.zeros_like(saddle.K), np.zeros_like(self._outputs.dual)
        for law, nodes in zip(saddle.laws, saddle.point.nodes, strict=True):
            # 2 R R^T of Wick's law.
            size = np.diag(law.C)
            kernel[nodes.sites.block] = np.outer(size, size) + law.C**2
        for _ in range(_PROBES):
            x = rng.standard_normal(saddle.size)
            one, change = saddle.spread(x), saddle.spread(self._solved(x, _SOLVED) - x)
            kernel += 2 * one * change / _PROBES
            output += 2 * self._outputs.slope(one) * self._outputs.slope(one + change) / _PROBES
        return kernel, output

    def _solved(self, x: Floats, accuracy: float) -> Floats:
        """Q x."""
        if len(x) <= DENSE:
            values, vectors = self._eigenpairs
            return vectors.T @ ((vectors @ x) / values)
        operator = LinearOperator(2 * x.shape, matvec=self._saddle.product, dtype=np.float64)
        solved, failed = cg(operator, x, rtol=accuracy, maxiter=_PRODUCTS)
        if failed:
            raise FluctuationError("conjugate gradients did not converge around this solution")
        return np.asarray(solved)

    def _drift(self) -> Floats:
        """N (<C> - C*), shape (d, d)."""
        saddle, problem, k = self._saddle, self._problem, self._saddle.size
        crossed = saddle.point.random and not problem.phi.smooth
        displacement, count = _ACROSS_KINKS if crossed else _SMOOTH
        # Displacements may break a symmetry.
        point = _thinned(saddle.point, count)._replace(symmetric=False)
        centre, total = self._gradient(point, np.zeros(2 * k)), np.zeros(2 * k)
        for weight, direction in self._directions():
            step = displacement * direction
            second = self._gradient(point, step) + self._gradient(point, -step) - 2 * centre
            total += weight * second / displacement**2
        slope = 2 * log_determinant_slope(saddle.point.C, problem)
        if not problem.mean_field:
            slope = slope - force(saddle.point.C, problem)
        total[:k] += saddle.gathered(slope)
        pulled, (values, vectors) = total[:k] + self._dense[0].T @ total[k:], self._eigenpairs
        drift = saddle.spread(-vectors.T @ ((vectors @ pulled) / values))
        even = np.asarray(problem.over_sites(problem.even)) | (not saddle.point.symmetric)
        return np.where(even, drift, 0.0)

    def _directions(self) -> list[tuple[float, Floats]]:
        """Unit vectors w in (x, l) and weights whose sum of w w^T is H^-1."""
        k, out = self._saddle.size, list[tuple[float, Floats]]()
        for value, x in zip(*self._eigenpairs, strict=True):
            both = np.concatenate([x, self._dense[0] @ x])
            norm = float(np.linalg.norm(both))
            out.append((norm**2 / value, both / norm))
        return out + [(-1.0, unit) for unit in np.eye(2 * k)[k:]]

    def _gradient(self, point: Point, step: Floats) -> Floats:
        """Gradient of 2 F in the coordinates of the solution, at a displaced point on the same nodes."""
        saddle, k = self._saddle, self._saddle.size
        C, Ct = point.C + saddle.spread(step[:k]), point.Ct + saddle.tilt(step[k:])
        # No whitened coordinates of its own: they would take most of the time.
        moved = Stationarity(self._problem, point._replace(C=C, Ct=Ct))
        return np.concatenate(
            [saddle.gathered(Ct - moved.conjugate), saddle.whitened(C - moved.average)]
        )


class _Outputs:
    """Derivatives of the mean outputs f = Q(C) S^-1 y in C."""

    def __init__(self, C: Floats, problem: Problem) -> None:
        self._C, self._problem = C, problem
        self.dual, self._stiffness = dual_targets(C, problem), Stiffness(C, problem)

    def slope(self, dC: Floats) -> Floats:
        """Along dC, shape (d, O)."""
        return self._read(dC, self.dual) - self._read(
            self._C, self._stiffness.solved(dC, self.dual)
        )

    def bend(self, dC: Floats) -> Floats:
        """The second derivative along dC."""
        first = -self._stiffness.solved(dC, self.dual)
        second = -2 * self._stiffness.solved(dC, first)
        return 2 * self._read(dC, first) + self._read(self._C, second)

    def gradient(self, site: int, output: int) -> Floats:
        """Of one output in C, shape (d, d)."""
        unit = np.zeros_like(self.dual)
        unit[site, output] = 1
        left = (unit - self._stiffness.solved(self._C, unit))[:, output]
        pull = np.outer(left, self.dual[:, output]) / 2
        return self._problem.read_back(pull + pull.T)

    def apart(self, apart: NDArray[np.bool_]) -> Floats:
        """Variance of outputs that read, through a shared readout, targets of an independent group."""
        problem, T, P = self._problem, self._problem.steps, self._problem.patterns
        weights = problem.readout.toarray().reshape(T, T, problem.nodes, problem.nodes)
        weights = weights * apart[::P, ::P]
        if not np.any(weights):
            return np.zeros_like(self.dual)
        # What multiplies C[(n, a), (m, b)] in the output at step t; C there is a mean of N independent products.
        pull = np.einsum("tsnm,sbo->tonmb", weights, self.dual.reshape(T, P, -1), optimize=True)
        pull = pull.reshape(*pull.shape[:3], -1)
        through = pull @ self._C
        own = np.einsum("naka->ank", problem.tensor(self._C))
        pairs = np.einsum("ank,tonk->tao", own, through @ pull.swapaxes(2, 3), optimize=True)
        crossed = through.reshape(*through.shape[:3], -1, P)
        pairs += np.einsum("tokna,tonka->tao", crossed, crossed, optimize=True)
        return pairs.reshape(self.dual.shape)

    def _read(self, C: Floats, dual: Floats) -> Floats:
        return mean_output(C, dual, self._problem)


def _accurate(saddle: Saddle) -> Saddle:
    """With second derivatives from most particles."""
    nodes = saddle.point.nodes
    if all(own.accurate for own in nodes if isinstance(own, Particles)):
        return saddle
    own = tuple(replace(n, accurate=True) if isinstance(n, Particles) else n for n in nodes)
    return Saddle(saddle.problem, saddle.point._replace(nodes=own))


def _thinned(point: Point, count: int) -> Point:
    nodes = tuple(n.thinned(count) if isinstance(n, Particles) else n for n in point.nodes)
    return point._replace(nodes=nodes)
