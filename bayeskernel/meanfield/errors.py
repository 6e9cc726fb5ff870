r"""How far can a solution on random nodes be trusted? The noise of its equations, propagated to kernels and free energy.

Noise n of the two equations, the gradient of 2 F, moves the solution by -H^-1 n, H the Hessian of 2 F in (x, l).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import block_diag

from bayeskernel.meanfield.moments import Moments
from bayeskernel.meanfield.saddle import Saddle

Floats = NDArray[np.float64]


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
    return MonteCarlo(
        np.sqrt(_entry_variances(saddle, covariance)),
        float(np.sqrt(np.max(np.diag(noise), initial=0.0))),
        # F is stationary: it rises by the quadratic form n^T H^-1 n / 4.
        float(np.trace(response)) / 4,
        float(np.trace(response @ response)) / 8,
    )


def _entry_variances(saddle: Saddle, covariance: Floats) -> Floats:
    """Variance of every entry of C from the covariance of x, (k, k); shape (d, d)."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    out = np.zeros_like(saddle.K)
    for value, vector in zip(values, vectors.T, strict=True):
        out += max(value, 0.0) * saddle.spread(vector) ** 2
    return out


def _noise(saddle: Saddle) -> Floats:
    """Covariance of (slope, mismatch) over clouds, shape (2k, 2k)."""
    to_slope, to_mismatch, blocks = list[Floats](), list[Floats](), list[Floats]()
    none = np.zeros(saddle.size)
    for law, nodes in zip(saddle.laws, saddle.point.nodes, strict=True):
        if not isinstance(law, Moments):
            continue
        blocks.append(law.noise())
        for entry in np.eye(len(nodes.sites.entries.first)):
            dC = np.zeros_like(saddle.K)
            dC[nodes.sites.block] = nodes.sites.entries.matrix(entry)
            to_slope.append(none)
            to_mismatch.append(-saddle.whitened(dC))
        for change in law.backward_changes():
            dB = np.zeros_like(saddle.K)
            dB[nodes.sites.block] = change
            to_slope.append(-saddle.gathered(saddle.problem.fed_back(dB)))
            to_mismatch.append(none)
    carry = np.concatenate([np.array(to_slope), np.array(to_mismatch)], axis=1)
    return np.asarray(carry.T @ block_diag(*blocks) @ carry)
