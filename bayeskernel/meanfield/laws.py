r"""How is one unit of a wide network distributed, and how does that answer to K and Ct?

    q(h) = N(h; 0, K) exp(phi(h)^T Ct phi(h) / 2) / Z        (docs/theory, section 4)

A `Law` is q at some (K, Ct), with ln Z, C = <phi phi^T> = 2 dlnZ/dCt, B = 2 dlnZ/dK, and their derivatives in *whitened*
coordinates x of C: dC = R x with R R^T the answer of C to Ct at fixed K. `Nodes` are what a law is computed on: nothing for
linear phi (`Gaussian`, here), a `Grid`, or `Particles`.

**Wick's law.** For linear phi all follows from C, B and Y = <phi u^T>, u = K^-1 h:

    dC = C dCt C + Y dK Y^T,        dB = B dK B + Y^T dCt Y.

For other phi the same holds between steps that are independent under q, and up to fourth cumulants within.
"""

from __future__ import annotations

from copy import copy
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bayeskernel.meanfield.sites import Entries, Sites, every_entry
from bayeskernel.problem import Floats

# Directions of C that hold less than this share of the variance of its sites, for each of them, are null: where C is exact, and
# where it is an average over particles in single precision, whose small directions are made by few of them.
_NULL, SAMPLED = 1e-9, 1e-5
# Variances below this have few digits left, and are none.
_VANISHING = np.finfo(np.float64).tiny / np.finfo(np.float64).eps
# Least share of a direction of C that a step leaves.
_LEAST = 0.05


class Averages(NamedTuple):
    """C, Y, B and <phi> under a law, as sampled; see `Law`."""

    C: Floats
    Y: Floats
    B: Floats
    mean: Floats

    def law(self, fed: slice) -> Wick:
        """Wick's law of these averages, whose K answers to C at the sites ``fed``."""
        law = Wick(0.0, self.C, self.Y, self.B, SAMPLED, fed)
        law.mean = self.mean
        return law


class Law(Protocol):
    """The law of one unit at (K, Ct), for a group of n sites.

    Attributes
    ----------
    log_normaliser
        ln Z.
    C, B
        <phi phi^T>, and the backward kernel K^-1 <h h^T> K^-1 - K^-1; shape (n, n).
    mean
        <phi>, shape (n,).
    effective
        Effective fraction of the nodes.
    """

    log_normaliser: float
    C: Floats
    B: Floats
    mean: Floats
    effective: float

    @property
    def size(self) -> int:
        """Number k of whitened coordinates."""

    @property
    def Y(self) -> Floats:
        """<phi u^T>, u = K^-1 h, shape (n, n)."""

    def spread(self, x: Floats) -> Floats:
        """The change R x of C, shape (n, n)."""

    def gathered(self, G: Floats) -> Floats:
        """R^T G, the adjoint of `spread`; shape (k,)."""

    def whitened(self, dC: Floats) -> Floats:
        """R^-1 dC."""

    def tilt(self, x: Floats) -> Floats:
        """The change R^-T x of Ct, to which C answers by R x; shape (n, n)."""

    def carried(self, dK: Floats) -> Floats:
        """R^-1 times the answer of C to dK."""

    def carried_back(self, x: Floats) -> Floats:
        """The answer of B to the tilt of x, adjoint of `carried`; where K answers to C."""

    def stiffened(self, dK: Floats) -> Floats:
        """The answer of B to dK; where K answers to C."""

    def retracted(self, x: Floats) -> Floats:
        """A change of C that is R x to first order and leaves the domain less easily."""

    def null(self, dC: Floats) -> Floats:
        """What of a change of C (n, n) no tilt brings about."""

    def null_tilt(self, dCt: Floats) -> Floats:
        """What of a change of Ct (n, n) moves no C."""

    def bent(self, x: Floats, slope: Floats) -> Floats:
        """What the retraction adds to a Hessian along x, times ``slope``."""


class Nodes(Protocol):
    """What the law of a group of sites is computed on.

    Attributes
    ----------
    sites
        The group.
    random
        Whether they are a random sample.
    """

    sites: Sites
    random: bool = False

    def law(self, K: Floats, Ct: Floats, *, symmetric: bool) -> Law:
        """The law at (K, Ct), (n, n) each; LinAlgError outside the domain. See `saddle.Point` for ``symmetric``."""

    def renewed(
        self, law: Law, K: Floats, Ct: Floats, rng: np.random.Generator, times: int = 0
    ) -> Nodes:
        """Nodes for a law that these still cover; of full accuracy, and so many times as many where random, unless 0."""
        return self

    def log_normaliser(
        self, law: Law, K: Floats, Ct: Floats, rng: np.random.Generator
    ) -> tuple[float, float]:
        """The logarithm of Z, and its variance."""
        return law.log_normaliser, 0.0

    def flipped(self, signs: Floats) -> Nodes:
        """The nodes under h -> signs h, (n,)."""
        return self

    def completed(self) -> Nodes:
        """The same for all entries of C."""
        return self

    def drawn(self, law: Law, K: Floats, count: int, rng: np.random.Generator) -> Floats:
        """Equally weighted draws of h from the law, (count, n)."""


class Wick:
    """Wick's law for given C, Y and B, see the module and `Law`; its K answers to C at the sites ``fed`` only."""

    effective = 1.0

    def __init__(
        self,
        log_normaliser: float,
        C: Floats,
        Y: Floats,
        B: Floats,
        null: float = _NULL,
        fed: slice = slice(None),
    ) -> None:
        self.log_normaliser, self.C, self.Y, self.B = log_normaliser, C, Y, B
        self.mean = np.zeros(len(C))
        self._root, self.whitener = root(C, null)
        # Products of large matrices leave out the sites whose K is given.
        self._fed = (fed, fed)
        self._spread: NDArray[np.floating] = self._root
        self._carry: NDArray[np.floating] = self.whitener @ Y[:, fed]
        self._stiff: NDArray[np.floating] = B[self._fed]
        self._entries: Entries = every_entry(self._root.shape[1])
        self._share: Floats = np.ones(())

    def saturating(self, shares: Floats) -> Wick:
        """The same where products of two whitened activities have such shares of the variance that Wick's law gives, (k, k)."""
        out = copy(self)
        out._share = np.sqrt(shares[self._entries.first, self._entries.second])
        return out

    def rounded(self) -> Wick:
        """The same with answers in float32, which take half as long, to steer steps."""
        out = copy(self)
        out._spread, out._carry, out._stiff = (
            m.astype(np.float32) for m in (self._spread, self._carry, self._stiff)
        )
        return out

    @property
    def size(self) -> int:
        """Number of whitened coordinates."""
        return len(self._entries.first)

    def spread(self, x: Floats) -> Floats:
        """R x = r X r^T with C = r r^T."""
        return _congruent(self._spread, self._relative(x))

    def gathered(self, G: Floats) -> Floats:
        """R^T G."""
        return self._share * self._entries.vector(_congruent(self._spread.T, G))

    def whitened(self, dC: Floats) -> Floats:
        """R^-1 dC."""
        return self._entries.vector(self.whitener @ dC @ self.whitener.T) / self._share

    def tilt(self, x: Floats) -> Floats:
        """R^-T x."""
        return np.asarray(self.whitener.T @ self._entries.matrix(x / self._share) @ self.whitener)

    def carried(self, dK: Floats) -> Floats:
        """R^-1 Y dK Y^T."""
        return self._entries.vector(_congruent(self._carry, dK[self._fed]))

    def carried_back(self, x: Floats) -> Floats:
        """Y^T (R^-T x) Y."""
        return self._among_fed(_congruent(self._carry.T, self._entries.matrix(x)))

    def stiffened(self, dK: Floats) -> Floats:
        """B dK B."""
        return self._among_fed(_congruent(self._stiff, dK[self._fed]))

    def strength(self, x: Floats) -> float:
        """Largest eigenvalue of X in size: the share by which some direction of C changes."""
        return float(np.max(np.abs(np.linalg.eigvalsh(self._relative(x))), initial=0.0))

    def stretched(self, x: Floats) -> Floats:
        """C + r X r^T, eigenvalues of 1 + X raised to `_LEAST` where they are smaller."""
        values, vectors = np.linalg.eigh(self._relative(x))
        turned = self._root @ vectors
        return self.C + turned * np.maximum(values, _LEAST - 1) @ turned.T

    def retracted(self, x: Floats) -> Floats:
        """The change r (X + X^2 / 2) r^T: C + dC is positive definite for every x."""
        X = self._relative(x)
        return np.asarray(self._root @ (X + X @ X / 2) @ self._root.T)

    def null(self, dC: Floats) -> Floats:
        """Nothing: the range of C stays as it is."""
        return np.zeros_like(dC)

    null_tilt = null

    def bent(self, x: Floats, slope: Floats) -> Floats:
        """(X G + G X) / 2."""
        half = self._entries.matrix(x) @ self._entries.matrix(slope) / 2
        return self._entries.vector(half + half.T)

    def _relative(self, x: Floats) -> Floats:
        """X, the change of C relative to itself, (k, k)."""
        return self._entries.matrix(self._share * x)

    def _among_fed(self, block: Floats) -> Floats:
        out = np.zeros_like(self.C)
        out[self._fed] = block
        return out


class Gaussian(Nodes):
    """Linear phi: the law needs no nodes, and no inverse of K.

    M = (1 - K Ct)^-1 gives ln Z = ln det M / 2, C = <h h^T> = M K, Y = M and B = Ct M.
    """

    def __init__(self, sites: Sites) -> None:
        self.sites = sites

    def law(self, K: Floats, Ct: Floats, *, symmetric: bool) -> Law:
        """The law at (K, Ct)."""
        M = np.linalg.solve(np.eye(len(K)) - K @ Ct, np.eye(len(K)))
        sign, log_det = np.linalg.slogdet(M)
        if not sign > 0:
            raise np.linalg.LinAlgError("the tilt exceeds K^-1")
        C, B = M @ K, Ct @ M
        half, Y = float(log_det) / 2, np.asarray(M, np.float64)
        return Wick(half, (C + C.T) / 2, Y, (B + B.T) / 2, fed=self.sites.fed)

    def drawn(self, law: Law, K: Floats, count: int, rng: np.random.Generator) -> Floats:
        """Draws of N(0, C)."""
        return np.asarray(rng.multivariate_normal(np.zeros(len(K)), law.C, count))


def _congruent(A: NDArray[np.floating], S: Floats) -> Floats:
    """A S A^T in the precision of A."""
    return np.asarray(A @ S.astype(A.dtype, copy=False) @ A.T, np.float64)


def root(C: Floats, null: float) -> tuple[Floats, Floats]:
    """(r, r^-1) with C = r r^T on its range; LinAlgError where C is not positive semi-definite."""
    size = np.abs(np.diag(C))
    scale = np.sqrt(np.where(size > _VANISHING, size, 0.0))
    inverse_scale = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    values, vectors = np.linalg.eigh(inverse_scale[:, None] * C * inverse_scale)
    if not np.all(values > -null * len(C)):
        raise np.linalg.LinAlgError("a kernel is not positive")
    keep = values > null * len(C)
    stretch = np.sqrt(values[keep])
    return scale[:, None] * vectors[:, keep] * stretch, (
        vectors[:, keep] / stretch
    ).T * inverse_scale
