r"""How are new sites distributed given earlier ones? Gaussian conditioning in causal order.

Sites come in the order of the network's steps. Each has an *innovation*, what earlier sites leave open of it.
There is one rule for singular kernels: a site whose innovation holds less than a stated share of its variance
follows from the sites before it without error; the others are *pivots*. No jitter is added and nothing is
inverted but triangles.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.linalg.lapack import dpstrf

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Shares below which an innovation counts as none. Rounding errors of an innovation grow as the machine's over
# the root of the share, those of its fourth moments, which theory needs, as the machine's over its power 3/2.
# What is small under the prior may grow as kernels are learned: a share of 1e-4 moved those of trials by 2 %.
NULL_SHARE = {"float64": 1e-8, "float32": 1e-5, "moments": 1e-6, "exact": 1e-10}


class Conditioner:
    """The sites met so far, whitened.

    Attributes
    ----------
    pivots
        Indices of pivots among the sites met, in order.
    factor
        Lower Cholesky factor of the covariance of the pivots.
    count
        Number of sites met.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self.pivots: Ints = np.zeros(0, np.int64)
        self.factor: Floats = np.zeros((0, 0))
        self.count = 0

    def append(self, rows: Floats) -> tuple[Floats, Floats]:
        """Take in n new sites.

        Parameters
        ----------
        rows
            Their covariance with all sites met and, last, among themselves, shape (n, count + n).

        Returns
        -------
        gain, shape (n, pivots met before), and root, shape (n, new pivots), such that the new sites are
        gain @ (whitened pivots) + root @ (independent standard normals), the new pivots' whitened values.
        """
        n = len(rows)
        gain = self.whiten(rows[:, self.pivots].T).T
        left = rows[:, self.count :] - gain @ gain.T
        smallest = self._share * np.diag(rows[:, self.count :])
        chosen, root = _pivoted_root(left, smallest)
        corner = np.zeros((len(self.pivots), len(chosen)))
        self.factor = np.block([[self.factor, corner], [gain[chosen], root[chosen]]])
        self.pivots = np.concatenate([self.pivots, self.count + np.array(chosen, np.int64)])
        self.count += n
        return gain, root

    def whiten(self, values: Floats) -> Floats:
        """Independent standard normals of the pivots from their values, (pivots, ...)."""
        if not len(values):
            return values
        return np.asarray(solve_triangular(self.factor, values, lower=True))


def whitened(covariance: Floats, patterns: int, share: float) -> tuple[Conditioner, Floats]:
    """All sites taken in step by step, and the root (d, r) that makes them from whitened pivots."""
    sites, rows = Conditioner(share), list[Floats]()
    for start in range(0, len(covariance), patterns):
        stop = start + patterns
        rows.append(np.hstack(sites.append(covariance[start:stop, :stop])))
    r = len(sites.pivots)
    return sites, np.concatenate([np.pad(row, ((0, 0), (0, r - row.shape[1]))) for row in rows])


def spread(covariance: Floats, patterns: int, share: float) -> tuple[Ints, Floats]:
    """Pivots under a covariance (d, d), and the matrix (d, r) by which all sites follow from them."""
    sites, root = whitened(covariance, patterns, share)
    if not len(sites.pivots):
        return sites.pivots, root
    solved = solve_triangular(sites.factor, root.T, trans="T", lower=True)
    return sites.pivots, np.asarray(solved.T)


def _pivoted_root(covariance: Floats, smallest: Floats) -> tuple[list[int], Floats]:
    """Sites chosen greedily until none has more than ``smallest`` variance left, and the root on them."""
    varied = smallest > 0
    scale = np.where(varied, 1 / np.sqrt(np.where(varied, smallest, 1.0)), 0.0)
    excess = scale[:, None] * covariance * scale
    chosen = list[int]()
    # LAPACK does not hold its first pivot against the bound.
    if np.max(np.diag(excess), initial=0.0) > 1:
        _, order, rank, _ = dpstrf(excess, tol=1.0, lower=1)
        chosen = sorted((order[:rank] - 1).tolist())
    factor = np.linalg.cholesky(covariance[np.ix_(chosen, chosen)])
    root = (
        solve_triangular(factor, covariance[chosen], lower=True).T
        if chosen
        else np.zeros((len(covariance), 0))
    )
    return chosen, np.asarray(root)
