r"""How do targets depend on the representation? The readout, integrated out exactly.

Given C, outputs are Gaussian with covariance S(C) = Q(C) + kappa 1 where they are supervised, divided by N in mean-field
scaling (docs/theory, section 1). With the dual targets a = S^-1 y and Q^T the adjoint of Q,

    energy = 1/2 sum_o y_o^T a_o,      force = Q^T(sum_o a_o a_o^T) = -2 d energy / dC

For theory, in NumPy and float64.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_solve, solve_triangular

from bayeskernel.problem import Floats, Problem, Readings


def dual_targets(C: Floats, problem: Problem) -> Floats:
    """a_o = S_o^-1 y_o, zero where an output is not supervised; shape (T P, O)."""
    dual, Q = np.zeros((problem.steps * problem.patterns, problem.num_outputs)), problem.read(C)
    for reading in problem.readings:
        factor = _factor(Q, reading, problem)
        dual[np.ix_(reading.sites, reading.outputs)] = cho_solve(
            factor, reading.targets, check_finite=False
        )
    return dual


def energy(C: Floats, problem: Problem) -> float:
    """1/2 sum_o y_o^T S_o^-1 y_o."""
    total, Q = 0.0, problem.read(C)
    for reading in problem.readings:
        factor = _factor(Q, reading, problem)[0]
        total += (
            np.sum(solve_triangular(factor, reading.targets, lower=True, check_finite=False) ** 2)
            / 2
        )
    return float(total)


def force(C: Floats, problem: Problem) -> Floats:
    """-2 d energy / dC, shape (d, d)."""
    dual = dual_targets(C, problem)
    return problem.read_back(dual @ dual.T)


class Stiffness:
    """How the force answers to a change of C: by -Q^T(b a^T + a b^T), b = S^-1 Q(dC) a."""

    def __init__(self, C: Floats, problem: Problem) -> None:
        self._problem, Q = problem, problem.read(C)
        self._parts = []
        for reading in problem.readings:
            factor = _factor(Q, reading, problem)
            dual = cho_solve(factor, reading.targets, check_finite=False)
            self._parts.append((np.ix_(reading.sites, reading.sites), factor, dual))

    def __call__(self, dC: Floats) -> Floats:
        """-d force along dC, positive semi-definite; shape (d, d)."""
        dQ = self._problem.read_supervised(dC)
        out = np.zeros_like(dQ)
        for sites, factor, dual in self._parts:
            pull = cho_solve(factor, dQ[sites] @ dual, check_finite=False) @ dual.T
            out[sites] += pull + pull.T
        return self._problem.read_supervised_back(out)

    def solved(self, dC: Floats, values: Floats) -> Floats:
        """S^-1 Q(dC) v, output by output where it is supervised; v and the result (T P, O)."""
        out, dQ = np.zeros_like(values), self._problem.read(dC)
        for reading, (_, factor, _) in zip(self._problem.readings, self._parts, strict=True):
            pull = dQ[reading.sites] @ values[:, reading.outputs]
            out[np.ix_(reading.sites, reading.outputs)] = cho_solve(
                factor, pull, check_finite=False
            )
        return out


def log_determinant_slope(C: Floats, problem: Problem) -> Floats:
    """d/dC of 1/2 sum_o ln det S_o, shape (d, d)."""
    Q = problem.read(C)
    slope = np.zeros_like(Q)
    for reading in problem.readings:
        factor = _factor(Q, reading, problem)
        inverse = cho_solve(factor, np.eye(len(reading.sites)), check_finite=False)
        slope[np.ix_(reading.sites, reading.sites)] += len(reading.outputs) / 2 * inverse
    return problem.read_back(slope)


def mean_output(C: Floats, dual: Floats, problem: Problem) -> Floats:
    """Mean outputs Q(C) a, shape (T P, O)."""
    return np.asarray(problem.read(C) @ dual)


def output_variance(C: Floats, problem: Problem) -> Floats:
    """Variance of the outputs given C and targets, in units of that of the noise; shape (T P, O)."""
    prior = problem.read(C)
    variance = np.repeat(np.diag(prior)[:, None], problem.num_outputs, axis=1)
    for reading in problem.readings:
        factor = _factor(prior, reading, problem)[0]
        explained = np.sum(
            solve_triangular(factor, prior[reading.sites], lower=True, check_finite=False) ** 2,
            axis=0,
        )
        variance[:, reading.outputs] -= explained[:, None]
    return variance


def covariance(Q: Floats, reading: Readings, problem: Problem) -> Floats:
    """S at the outputs of a reading, shape (n, n)."""
    prior = Q[np.ix_(reading.sites, reading.sites)]
    return prior + problem.noise * np.eye(len(reading.sites))


def _factor(Q: Floats, reading: Readings, problem: Problem) -> tuple[Floats, bool]:
    """Cholesky factor of S for `cho_solve`; NaN where rounding errors leave none, which solvers report."""
    S = covariance(Q, reading, problem)
    try:
        return np.asarray(np.linalg.cholesky(S), np.float64), True
    except np.linalg.LinAlgError:
        return np.full_like(S, np.nan), True
