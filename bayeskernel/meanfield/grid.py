r"""The law of one unit on a grid of pre-activations: exact, in up to three dimensions.

K enters through the density of h alone, so kinks of phi do no harm.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from scipy.linalg import solve_triangular
from scipy.special import logsumexp

from bayeskernel.meanfield.laws import Law, Nodes
from bayeskernel.meanfield.moments import Drawn, Moments, Statistics, grid_motion
from bayeskernel.meanfield.sites import Sites
from bayeskernel.problem import Floats

# The trapezoidal rule converges faster than any power on smooth functions: at this spacing, in standard deviations of q,
# beyond 1e-8.
DIMENSIONS = 3
_NODES = {1: 801, 2: 161, 3: 41}
_PANEL_NODES = {1: 100, 2: 60, 3: 32}
_REACH = 6.5
# Nodes that hold less than this share of the largest are left out of averages.
_NEGLIGIBLE = 1e-22


class Grid(Drawn):
    """Nodes at fixed pre-activations.

    Parameters
    ----------
    sites
        The group of sites.
    h
        Pre-activations at the pivots, shape (M, r).
    log_volume
        ln of the volume each node stands for, shape (M,).
    inverse
        Of a root of the covariance that the nodes are matched to, shape (r, r).
    """

    def __init__(self, sites: Sites, h: Floats, log_volume: Floats, inverse: Floats) -> None:
        self.sites, self._pivotal, self._log_volume, self._inverse = sites, h, log_volume, inverse
        self._h = h @ sites.spread.T
        self._phi = sites.phi.values(self._h)

    def law(self, K: Floats, Ct: Floats, *, symmetric: bool) -> Law:
        """The law at (K, Ct)."""
        pivots, r = self.sites.pivots, len(self.sites.pivots)
        factor = np.asarray(np.linalg.cholesky(K[np.ix_(pivots, pivots)]), np.float64)
        w = _white(factor, self._pivotal)
        log_density = self._log_volume + tilt(self._phi, Ct) - np.sum(w**2, axis=1) / 2
        log_density -= np.sum(np.log(np.diag(factor))) + r / 2 * np.log(2 * np.pi)
        log_normaliser = float(logsumexp(log_density))
        keep = log_density > np.max(log_density) + np.log(_NEGLIGIBLE)
        weights, w = np.exp(log_density[keep] - log_normaliser), w[keep]
        second_moment = (w * weights[:, None]).T @ w
        statistics = Statistics(
            log_normaliser,
            weights,
            self._h[keep],
            self._phi[keep],
            pull=w,
            z=w,
            constant=np.eye(r),
            factor=factor,
            motion=partial(grid_motion, len(self.sites.members), second_moment),
            effective=self._coverage(factor @ second_moment @ factor.T),
            random=False,
            steering=(slice(None), weights),
        )
        return Moments(self.sites, statistics, symmetric=symmetric)

    def renewed(
        self, law: Law, K: Floats, Ct: Floats, rng: np.random.Generator, times: int = 0
    ) -> Nodes:
        """A grid matched to <h h^T>."""
        pivots = np.ix_(self.sites.pivots, self.sites.pivots)
        return matched(self.sites, (K + K @ law.B @ K)[pivots])

    def flipped(self, signs: Floats) -> Nodes:
        """The nodes under h -> signs h."""
        own = signs[self.sites.pivots]
        return Grid(self.sites, self._pivotal * own, self._log_volume, self._inverse * own)

    def completed(self) -> Nodes:
        """The same for all entries of C."""
        return Grid(self.sites.completed(), self._pivotal, self._log_volume, self._inverse)

    def _coverage(self, second_moment: Floats) -> float:
        """One where <h h^T> is what the grid was made for, small where it is much larger or smaller."""
        if not len(second_moment):
            return 1.0
        stretch = np.linalg.eigvalsh(self._inverse @ second_moment @ self._inverse.T)
        return float(max(stretch[-1], 1 / max(stretch[0], 1e-300)) ** -2)


def tilt(phi: Floats, Ct: Floats) -> Floats:
    """phi^T Ct phi / 2 at every node."""
    return np.asarray(np.sum((phi @ Ct) * phi, axis=1) / 2)


def matched(sites: Sites, covariance: Floats) -> Grid:
    """Nodes matched to a covariance of h at the pivots, shape (r, r).

    For smooth phi a lattice along the principal directions; otherwise Gauss-Legendre panels along h, split at
    zero where piecewise linear activations have their kink, so that the integrand is smooth on each.
    """
    r = len(sites.pivots)
    if not r:
        return Grid(sites, np.zeros((1, 0)), np.zeros(1), np.zeros((0, 0)))
    root = np.asarray(np.linalg.cholesky(covariance), np.float64)
    inverse = solve_triangular(root, np.eye(r), lower=True)
    if sites.phi.smooth:
        line = np.linspace(-_REACH, _REACH, _NODES[r])
        u = _product([line] * r)
        # The corners, beyond the reach, hold nothing: half the cube in three dimensions.
        u = u[np.sum(u**2, axis=1) <= _REACH**2 + 1e-9]
        volume = r * np.log(line[1] - line[0]) + np.sum(np.log(np.diag(root)))
        return Grid(sites, u @ root.T, np.full(len(u), volume), inverse)
    nodes, weights = np.polynomial.legendre.leggauss(_PANEL_NODES[r])
    std = np.sqrt(np.diag(covariance))
    half = (nodes + 1) / 2 * _REACH
    share = np.log(np.concatenate([weights[::-1], weights]) * _REACH / 2)
    h = _product([np.concatenate([-half[::-1], half])] * r) * std
    log_volume = np.sum(_product([share] * r), axis=1) + np.sum(np.log(std))
    inside = np.sum(_white(root, h) ** 2, axis=1) <= _REACH**2
    return Grid(sites, h[inside], log_volume[inside], inverse)


def _white(factor: Floats, h: Floats) -> Floats:
    return np.asarray(solve_triangular(factor, h.T, lower=True).T)


def _product(axes: list[Floats]) -> Floats:
    return np.stack([a.ravel() for a in np.meshgrid(*axes, indexing="ij")], axis=1)
