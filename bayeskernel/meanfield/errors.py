r"""How far can a solution on random nodes be trusted? The noise of its equations, propagated to kernels and free energy.

Noise n of the two equations, the gradient of 2 F, moves the solution by -H^-1 n, H the Hessian of 2 F in (x, l).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.linalg import block_diag

from bayeskernel.meanfield.moments import Moments
from bayeskernel.meanfield.saddle import Saddle
from bayeskernel.problem import Floats


class MonteCarlo(NamedTuple):
    """Errors from the noise of random nodes.

    Attributes
    ----------
    error
        Standard error of C, shape (d, d).
    residual
        Largest standard deviation of the noise of the equations.
    excess, variance
        By how much the noise raises F on average, and the variance of that.
    """

    error: Floats
    residual: float
    excess: float
    variance: float


def monte_carlo(saddle: Saddle) -> MonteCarlo:
    """Errors of a solution; zero where no nodes are random."""
    if not saddle.point.random:
        return MonteCarlo(np.zeros_like(saddle.K), 0.0, 0.0, 0.0)
    (followed, reduced), noise, k = saddle.dense(), _noise(saddle), saddle.size
    curved = reduced - followed.T @ followed
    hessian = np.block([[curved, followed.T], [followed, -np.eye(k)]])
    response = np.linalg.solve(hessian, noise)
    covariance = np.linalg.solve(hessian, response.T)[:k, :k]
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    variance = np.zeros_like(saddle.K)
    for value, vector in zip(values, vectors.T, strict=True):
        variance += max(value, 0.0) * saddle.spread(vector) ** 2
    return MonteCarlo(
        np.sqrt(variance),
        float(np.sqrt(np.max(np.diag(noise), initial=0.0))),
        # F is stationary: it rises by the quadratic form n^T H^-1 n / 4.
        float(np.trace(response)) / 4,
        float(np.trace(response @ response)) / 8,
    )


def _noise(saddle: Saddle) -> Floats:
    """Covariance of (slope, mismatch) over clouds, shape (2k, 2k)."""
    rows, blocks, none = list[Floats](), list[Floats](), np.zeros(saddle.size)
    for law, nodes in zip(saddle.laws, saddle.point.nodes, strict=True):
        if not isinstance(law, Moments):
            continue
        blocks.append(law.noise())
        for entry in np.eye(len(nodes.sites.entries.first)):
            dC = np.zeros_like(saddle.K)
            dC[nodes.sites.block] = nodes.sites.entries.matrix(entry)
            rows.append(np.concatenate([none, -saddle.whitened(dC)]))
        for change in law.backward_changes():
            dB = np.zeros_like(saddle.K)
            dB[nodes.sites.block] = change
            rows.append(np.concatenate([-saddle.gathered(saddle.problem.fed_back(dB)), none]))
    carry = np.array(rows)
    return np.asarray(carry.T @ block_diag(*blocks) @ carry)
