r"""How do targets depend on the representation? The readout, integrated out exactly.

Given C, outputs are Gaussian with covariance S(C) = sv^2 M_V o C + kappa 1 on the supervised sites, divided
by N in mean-field scaling (docs/theory, section 1). With the dual targets a = S^-1 y,

    energy = 1/2 sum_o y_o^T a_o,      force = sv^2 M_V o sum_o a_o a_o^T = -2 d energy / dC

`output_covariance` is used by sampling too; everything else here is for theory, in NumPy and float64.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, solve_triangular

from bayeskernel.problem import Problem, Readings

Floats = NDArray[np.float64]
Array = TypeVar("Array")


def output_covariance(kernel: Array, readout: Array, noise: Array, identity: Array) -> Array:
    """S at some sites from C and sv^2 M_V there, (n, n) arrays of NumPy or JAX."""
    return readout * kernel + noise * identity  # type: ignore[operator]


def covariance(C: Floats, reading: Readings, problem: Problem) -> Floats:
    """S at the sites of a reading, shape (n, n)."""
    sites = np.ix_(reading.sites, reading.sites)
    return output_covariance(
        C[sites], _readout(reading, problem), np.asarray(problem.noise), np.eye(len(reading.sites))
    )


def dual_targets(C: Floats, problem: Problem) -> Floats:
    """a_o = S_o^-1 y_o, zero where an output is not supervised; shape (d, O)."""
    dual = np.zeros((problem.size, problem.num_outputs))
    for reading in problem.readings:
        factor = _factor(C, reading, problem)
        dual[np.ix_(reading.sites, reading.outputs)] = cho_solve(
            factor, reading.targets, check_finite=False
        )
    return dual


def energy(C: Floats, problem: Problem) -> float:
    """1/2 sum_o y_o^T S_o^-1 y_o."""
    total = 0.0
    for reading in problem.readings:
        factor = _factor(C, reading, problem)[0]
        total += (
            np.sum(solve_triangular(factor, reading.targets, lower=True, check_finite=False) ** 2)
            / 2
        )
    return float(total)


def force(C: Floats, problem: Problem) -> Floats:
    """sv^2 M_V o sum_o a_o a_o^T = -2 d energy / dC, shape (d, d)."""
    dual = dual_targets(C, problem)
    return np.asarray(problem.over_sites(problem.readout) * (dual @ dual.T))


class Stiffness:
    """How the force answers to a change of C: by -sv^2 M_V o (b a^T + a b^T), b = S^-1 (sv^2 M_V o dC) a."""

    def __init__(self, C: Floats, problem: Problem) -> None:
        self._problem = problem
        self._parts = []
        for reading in problem.readings:
            factor = _factor(C, reading, problem)
            dual = cho_solve(factor, reading.targets, check_finite=False)
            self._parts.append((np.ix_(reading.sites, reading.sites), factor, dual))
        self._readouts = [_readout(reading, problem) for reading in problem.readings]

    def __call__(self, dC: Floats) -> Floats:
        """-d force along dC, positive semi-definite; shape (d, d)."""
        out = np.zeros_like(dC)
        for (sites, factor, dual), readout in zip(self._parts, self._readouts, strict=True):
            pull = cho_solve(factor, (readout * dC[sites]) @ dual, check_finite=False) @ dual.T
            out[sites] += readout * (pull + pull.T)
        return out

    def solved(self, dC: Floats, values: Floats) -> Floats:
        """S^-1 (sv^2 M_V o dC) v, output by output on its supervised sites; v and the result (d, O)."""
        out = np.zeros_like(values)
        for reading, (sites, factor, _), readout in zip(
            self._problem.readings, self._parts, self._readouts, strict=True
        ):
            own = np.ix_(reading.sites, reading.outputs)
            out[own] = cho_solve(factor, (readout * dC[sites]) @ values[own], check_finite=False)
        return out


def log_determinant_slope(C: Floats, problem: Problem) -> Floats:
    """d/dC of 1/2 sum_o ln det S_o, shape (d, d)."""
    slope = np.zeros_like(C)
    for reading in problem.readings:
        factor = _factor(C, reading, problem)
        inverse = cho_solve(factor, np.eye(len(reading.sites)), check_finite=False)
        count = len(reading.outputs)
        slope[np.ix_(reading.sites, reading.sites)] += (
            count / 2 * _readout(reading, problem) * inverse
        )
    return slope


def mean_output(cross: Floats, steps: NDArray[np.int64], dual: Floats, problem: Problem) -> Floats:
    """sv^2 (M_V o C)[*, .] a of sites at some steps, from C (n, d) between them and the task's sites."""
    return np.asarray((problem.readout[np.ix_(steps, problem.step_of)] * cross) @ dual)


def output_variance(C: Floats, problem: Problem) -> Floats:
    """Variance of the outputs given C and targets, in units of that of the noise; shape (d, O)."""
    prior = problem.over_sites(problem.readout) * C
    variance = np.repeat(np.diag(prior)[:, None], problem.num_outputs, axis=1)
    for reading in problem.readings:
        factor = _factor(C, reading, problem)[0]
        explained = np.sum(
            solve_triangular(factor, prior[reading.sites], lower=True, check_finite=False) ** 2,
            axis=0,
        )
        variance[:, reading.outputs] -= explained[:, None]
    return variance


def _readout(reading: Readings, problem: Problem) -> Floats:
    steps = problem.step_of[reading.sites]
    return problem.readout[np.ix_(steps, steps)]


def _factor(C: Floats, reading: Readings, problem: Problem) -> tuple[Floats, bool]:
    """Cholesky factor of S for `cho_solve`; NaN where rounding errors leave none, which solvers report."""
    S = covariance(C, reading, problem)
    try:
        return np.asarray(np.linalg.cholesky(S), np.float64), True
    except np.linalg.LinAlgError:
        return np.full_like(S, np.nan), True
