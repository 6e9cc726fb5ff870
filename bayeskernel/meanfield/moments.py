r"""How does a law that nodes stand for answer to K and Ct? By covariances of its statistics.

With X = L^-1 dK L^-T, K = L L^T at the pivots, s the scaled entries of phi phi^T that are solved for and b those of the
statistic whose mean is L^T B L, a node contributes d ln q = (s . dCt + b . X) / 2, so

    dC = cov(s, s) dCt / 2 + (cov(s, b) / 2 + <ds/dX>) X,
    dB = (cov(b, b) / 2 + <db/dX>) X + (cov(s, b) / 2 + <ds/dX>)^T dCt.

Where no sign symmetry is broken, averages over q stand for averages over q and its flips: entries of different
parity do not mix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from bayeskernel.meanfield.laws import Law, Nodes, root
from bayeskernel.meanfield.sites import Sites, every_entry
from bayeskernel.problem import Floats

# Directions in which the statistics vary less than this, relative to their scale and for each of them, are null: on grids, and
# on random nodes, whose few far ones make up what small directions vary by.
_NULL, _UNSEEN = 1e-11, 1e-6
# Random nodes that second derivatives are averaged over, and how many for each statistic, where these only steer Newton's
# method and propagate errors; and how many numbers their statistics may be for fluctuations.
_STEERING, _PER_STATISTIC, _ACCURATE = 4096, 8, 2**24


class Statistics(NamedTuple):
    """What nodes know about a law.

    Attributes
    ----------
    log_normaliser
        ln Z.
    weights
        Probability of every node, shape (M,).
    h, phi
        At all sites of the group, shape (M, n).
    pull, z
        b holds the entries of pull_k z_l, k >= l; shape (M, r) each.
    constant
        Subtracted from <b>, as a matrix (r, r).
    factor
        L, shape (r, r).
    motion
        Returns <ds/dX> as (n, n, q) and <db/dX> as (q, q), where they are no covariances.
    effective
        Effective fraction of the nodes.
    random
        Whether the nodes are a random sample.
    steering
        Nodes that second derivatives are averaged over, and their probabilities.
    """

    log_normaliser: float
    weights: Floats
    h: Floats
    phi: Floats
    pull: Floats
    z: Floats
    constant: Floats
    factor: Floats
    motion: Callable[[], tuple[Floats, Floats]]
    effective: float
    random: bool
    steering: tuple[slice, Floats]


class Moments:
    """A law from statistics of nodes; see `laws.Law` for its methods."""

    def __init__(self, sites: Sites, statistics: Statistics, *, symmetric: bool) -> None:
        self._sites, self._own = sites, statistics
        self.log_normaliser, self.effective = statistics.log_normaliser, statistics.effective
        self.weights, self.h = statistics.weights, statistics.h
        r = len(statistics.factor)
        self._pairs = every_entry(r)
        self._inverse = solve_triangular(statistics.factor, np.eye(r), lower=True)
        self._even = sites.parity == 0 if symmetric else np.ones_like(sites.parity, bool)
        weighted = statistics.weights[:, None] * statistics.phi
        self.mean = weighted.sum(0)
        self.C = np.where(self._even, weighted.T @ statistics.phi, 0.0)
        low = np.tril(statistics.pull.T @ (statistics.weights[:, None] * statistics.z))
        inner = low + np.tril(low, -1).T - statistics.constant
        self.B = np.where(self._even, self._outward(inner), 0.0)
        parity = sites.parity * symmetric
        pivotal = parity[np.ix_(sites.pivots, sites.pivots)]
        self._of_C = parity[sites.entries.first, sites.entries.second]
        self._of_K = pivotal[self._pairs.first, self._pairs.second]

    @property
    def size(self) -> int:
        """Number of whitened coordinates."""
        return self._roots[0].shape[1]

    @cached_property
    def Y(self) -> Floats:
        """<phi u^T>, zero at sites that are no pivots."""
        pivots, out = self._sites.pivots, np.zeros_like(self.C)
        phi_h = (self.weights[:, None] * self._own.phi).T @ self.h[:, pivots]
        out[:, pivots] = phi_h @ self._inverse.T @ self._inverse
        return np.where(self._even, out, 0.0)

    def spread(self, x: Floats) -> Floats:
        """R x."""
        return self._sites.entries.matrix(self._roots[0] @ x)

    def gathered(self, G: Floats) -> Floats:
        """R^T G."""
        return np.asarray(self._roots[0].T @ self._sites.entries.vector(G))

    def whitened(self, dC: Floats) -> Floats:
        """R^-1 dC."""
        return np.asarray(self._roots[1] @ self._sites.entries.vector(dC))

    def tilt(self, x: Floats) -> Floats:
        """R^-T x."""
        return self._sites.entries.matrix(self._roots[1].T @ x)

    def carried(self, dK: Floats) -> Floats:
        """R^-1 times the answer of C."""
        return np.asarray(self._cross @ self._inward(dK))

    def carried_back(self, x: Floats) -> Floats:
        """The answer of B to a tilt."""
        return self._outward(self._pairs.matrix(self._cross.T @ x))

    def stiffened(self, dK: Floats) -> Floats:
        """The answer of B to dK."""
        return self._outward(self._pairs.matrix(self._bend @ self._inward(dK)))

    def retracted(self, x: Floats) -> Floats:
        """R x: the nodes hold everything within their reach."""
        return self.spread(x)

    def bent(self, x: Floats, slope: Floats) -> Floats:
        """Nothing."""
        return np.zeros_like(x)

    def null(self, dC: Floats) -> Floats:
        """What of dC no tilt brings about: dC - R R^-1 dC among the entries solved for."""
        kept = self._sites.entries.matrix(self._sites.entries.vector(dC))
        return kept - self.spread(self.whitened(dC))

    def null_tilt(self, dCt: Floats) -> Floats:
        """What of dCt moves no C: dCt - R^-T R^T dCt."""
        kept = self._sites.entries.matrix(self._sites.entries.vector(dCt))
        return kept - self.tilt(self.gathered(dCt))

    def noise(self) -> Floats:
        """Covariance over clouds of the means of (s, b), zero on grids; shape (n + q, n + q)."""
        size = len(self._of_C) + len(self._of_K)
        if not self._own.random:
            return np.zeros((size, size))
        nodes, share = self._own.steering
        # Of weighted means: the sum of squared weights times the covariance under them.
        scale = np.sum(self.weights**2) / np.sum(share**2)
        even = np.concatenate([self._of_C, self._of_K]) == 0
        return scale * self._covariance(nodes, share, share) * np.outer(even, even)

    def backward_changes(self) -> list[Floats]:
        """The change of B with every entry of b, shape (n, n) each."""
        return [self._outward(self._pairs.matrix(row)) for row in np.eye(len(self._of_K))]

    def _inward(self, dK: Floats) -> Floats:
        """Entries of X = L^-1 dK L^-T at the pivots."""
        pivots, inverse = self._sites.pivots, self._inverse
        return self._pairs.vector(inverse @ dK[np.ix_(pivots, pivots)] @ inverse.T)

    def _outward(self, inner: Floats) -> Floats:
        """L^-T inner L^-1 at the pivots, zero elsewhere; (n, n)."""
        pivots, inverse = self._sites.pivots, self._inverse
        out = np.zeros((len(self._sites.members),) * 2)
        out[np.ix_(pivots, pivots)] = inverse.T @ inner @ inverse
        return out

    @cached_property
    def _second(self) -> Floats:
        """Half the covariance of (s, b)."""
        nodes, share = self._own.steering
        return self._covariance(nodes, share, np.ones_like(share)) / 2

    @cached_property
    def _motion(self) -> tuple[Floats, Floats]:
        return self._own.motion()

    @cached_property
    def _roots(self) -> tuple[Floats, Floats]:
        """(R, R^-1) of cov(s, s) / 2."""
        n = len(self._of_C)
        covariance = np.where(self._of_C[:, None] == self._of_C, self._second[:n, :n], 0)
        return root(covariance, _UNSEEN if self._own.random else _NULL)

    @cached_property
    def _cross(self) -> Floats:
        n, entries = len(self._of_C), self._sites.entries
        turn = self._motion[0][entries.first, entries.second] * entries.scale[:, None]
        cross = np.where(self._of_C[:, None] == self._of_K, self._second[:n, n:] + turn, 0)
        return np.asarray(self._roots[1] @ cross)

    @cached_property
    def _bend(self) -> Floats:
        n = len(self._of_C)
        return np.where(
            self._of_K[:, None] == self._of_K, self._second[n:, n:] + self._motion[1], 0
        )

    def _covariance(self, nodes: slice, share: Floats, extra: Floats) -> Floats:
        """Covariance of (s, b) over some nodes, weighed by their probability times ``extra``."""
        entries, own = self._sites.entries, self._own
        s = entries.products(own.phi[nodes], own.phi[nodes])
        # b's entry (l, k), l <= k, is pull_k z_l.
        b = self._pairs.products(own.z[nodes], own.pull[nodes])
        values = np.concatenate([s, b], axis=1)
        values -= share @ values
        values *= np.sqrt(share * extra)[:, None]
        return values.T @ values


def resampled(weights: Floats, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices drawn by weight, systematically."""
    positions = (rng.random() + np.arange(count)) / count
    return np.minimum(np.searchsorted(np.cumsum(weights), positions), len(weights) - 1)


class Drawn(Nodes):
    """Draws from a law that is one of statistics of nodes."""

    def drawn(self, law: Law, K: Floats, count: int, rng: np.random.Generator) -> Floats:
        """Equally weighted draws of h from the law, (count, n), with what sites that count as following have of their own."""
        assert isinstance(law, Moments)
        pivots, spread = self.sites.pivots, self.sites.spread
        values, vectors = np.linalg.eigh(K - spread @ K[np.ix_(pivots, pivots)] @ spread.T)
        own = rng.standard_normal((count, len(K))) * np.sqrt(np.maximum(values, 0))
        return np.asarray(law.h[resampled(law.weights, count, rng)] + own @ vectors.T)


def steering(weights: Floats, statistics: int, *, accurate: bool) -> tuple[slice, Floats]:
    """Enough of some random nodes for second derivatives of so many statistics, and their probabilities."""
    count = max(_STEERING, _PER_STATISTIC * statistics)
    if accurate:
        count = max(count, _ACCURATE // statistics)
    some = slice(None, None, max(1, len(weights) // count))
    return some, weights[some] / weights[some].sum()


def grid_motion(n: int, second_moment: Floats) -> tuple[Floats, Floats]:
    """Nothing, and X -> X - X V - V X on scaled entries, V = <z z^T>; see `Statistics`."""
    pairs = every_entry(len(second_moment))
    columns = []
    for unit in np.eye(len(pairs.first)):
        X = pairs.matrix(unit)
        half = X @ second_moment
        columns.append(pairs.vector(X - half - half.T))
    q = len(pairs.first)
    return np.zeros((n, n, q)), np.reshape(columns, (q, q))


def particle_motion(
    weights: Floats, z: Floats, phi: Floats, slopes: tuple[Floats, Floats], root: Floats, Ct: Floats
) -> tuple[Floats, Floats]:
    """What changes as nodes h = root chol(1 + X) z move with X: <d(phi phi)/dX> and <db/dX>.

    To second order chol(1 + X) = 1 + H - low(H H^T) with H = low(X), the lower half with its diagonal halved. Shapes
    (n, n, q) and (q, q), X in scaled entries.
    """
    n, r = root.shape
    first, second = slopes
    pairs = every_entry(r)
    # Change of low(X) with a scaled entry of X.
    halved = np.where(pairs.first == pairs.second, 0.5, np.sqrt(0.5))
    weighted = weights[:, None] * z
    # d phi_i = phi'_i root_ik H_kl z_l.
    moved = np.einsum("mi,mj->mij", first, phi).reshape(len(z), -1).T @ weighted
    moved = moved.reshape(n, n, r)[:, :, None, :] * root[:, None, :, None]  # (i, j, k, l)
    moved = moved + moved.transpose(1, 0, 2, 3)
    turn = moved[:, :, pairs.second, pairs.first] * halved
    # d^2 (phi^T Ct phi / 2) / dh_i dh_j, averaged with z_l z_m.
    pulled = phi @ Ct
    curvature = first[:, :, None] * Ct * first[:, None, :]
    curvature[:, np.arange(n), np.arange(n)] += second * pulled
    zz = curvature.reshape(len(z), -1).T @ pairs.products(weighted, z) / pairs.scale
    mean = np.zeros((n, n, r, r))
    mean[:, :, pairs.first, pairs.second] = zz.reshape(n, n, -1)
    mean[:, :, pairs.second, pairs.first] = mean[:, :, pairs.first, pairs.second]
    # To (k, l, k', m) with h_i = root_ik H_kl z_l.
    bend = np.tensordot(root, np.tensordot(root, mean, (0, 1)), (0, 1)).transpose(0, 2, 1, 3)
    force = (first * pulled) @ root
    low = np.tril(force.T @ weighted, -1) + np.diag(np.sum(force * weighted, axis=0)) / 2
    diagonal = np.arange(r)
    bend[:, diagonal, :, diagonal] -= low + low.T
    bend = bend[pairs.second, pairs.first][:, pairs.second, pairs.first]
    return turn, 2 * bend * halved * halved[:, None]
