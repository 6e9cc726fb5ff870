r"""Which kernels are stationary? The free energy per unit around a point, to second order and matrix-free.

    F(C, Ct) = energy(C) + 1/2 tr(Ct C) - ln Z(K(C), Ct)

is maximal in Ct (ln Z is convex) and stationary in C (docs/theory, section 4):

    2 dF/dC = Ct - force(C) - sum_l G_l^T B G_l,        2 dF/dCt = C - <phi phi^T>.

In the whitened coordinates x of C and l of Ct (see `laws`) the second derivatives of 2 F are, with E = R^-1 (1 - dC/dK fed) R,

    F_ll = -1,      F_xl = E^T,      F_xx = R^T (stiffness - sum_l G_l^T dB/dK G_l) R,

so eliminating Ct leaves the reduced Hessian F_xx + E^T E, whose lowest eigenvalue says whether a solution is a minimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bayeskernel.likelihood import Stiffness, energy, force
from bayeskernel.meanfield.laws import Averages, Law, Nodes, Wick
from bayeskernel.problem import Floats, Problem

# Changes of C below this share are none.
_ROUNDING = 1e-12


class Point(NamedTuple):
    """Kernels, and the nodes that their laws are computed on.

    Attributes
    ----------
    C, Ct
        Shape (d, d); Ct is zero where K and S do not read C.
    nodes
        One for every group of correlated sites.
    symmetric
        Whether no sign symmetry is broken: entries that a flip changes are then zero.
    """

    C: Floats
    Ct: Floats
    nodes: tuple[Nodes, ...]
    symmetric: bool

    @property
    def random(self) -> bool:
        """Whether there are random nodes."""
        return any(nodes.random for nodes in self.nodes)

    def flipped(self, signs: Floats) -> Point:
        """The point under h -> signs h, signs of shape (d,)."""
        both = np.outer(signs, signs)
        nodes = tuple(n.flipped(signs[n.sites.members]) for n in self.nodes)
        return self._replace(C=both * self.C, Ct=both * self.Ct, nodes=nodes)


def within_groups(point: Point) -> NDArray[np.bool_]:
    """Which entries of C lie within groups of correlated sites, shape (d, d)."""
    within = np.zeros(point.C.shape, bool)
    for nodes in point.nodes:
        within[nodes.sites.block] = True
    return within


class Stationarity:
    """What C and Ct must be, by the laws at a point.

    Parameters
    ----------
    problem, point
        LinAlgError where the point lies outside the domain of F.
    laws
        One for every group; by default those of the point's nodes.
    averages
        C, B and <phi> of every group, where better known than by the laws.

    Attributes
    ----------
    laws
        One for every group.
    """

    def __init__(
        self,
        problem: Problem,
        point: Point,
        laws: tuple[Law, ...] | None = None,
        averages: tuple[Averages, ...] = (),
    ) -> None:
        self.problem, self.point = problem, point
        self._blocks = [nodes.sites.block for nodes in point.nodes]
        self.K = problem.preactivation_kernel(point.C)
        if laws is None:
            laws = tuple(
                nodes.law(self.K[block], point.Ct[block], symmetric=point.symmetric)
                for nodes, block in zip(point.nodes, self._blocks, strict=True)
            )
        self.laws = laws
        self._averages: Sequence[Law | Averages] = averages or laws

    @cached_property
    def average(self) -> Floats:
        """<phi phi^T>, shape (d, d); between independent groups the product of means."""
        mean = np.zeros(self.problem.size)
        for own, nodes in zip(self._averages, self.point.nodes, strict=True):
            mean[nodes.sites.members] = own.mean * (not self.problem.phi.odd)
        out = np.outer(mean, mean)
        for own, block in zip(self._averages, self._blocks, strict=True):
            out[block] = own.C
        return out

    @cached_property
    def conjugate(self) -> Floats:
        """What Ct must be: force + sum_l G_l^T B G_l, shape (d, d)."""
        out = self.problem.fed_back(self.joined([own.B for own in self._averages]))
        if self.problem.mean_field:
            out = out + force(self.point.C, self.problem)
        return np.where(self._allowed, out, 0.0)

    @cached_property
    def value(self) -> float:
        """F."""
        log_normaliser = sum(law.log_normaliser for law in self.laws)
        data = energy(self.point.C, self.problem) if self.problem.mean_field else 0.0
        return float(data + np.sum(self.point.Ct * self.point.C) / 2 - log_normaliser)

    @cached_property
    def _allowed(self) -> NDArray[np.bool_]:
        """Entries that may differ from zero, (d, d)."""
        if self.point.symmetric:
            return np.asarray(self.problem.over_sites(self.problem.even), bool)
        return np.ones_like(self.K, bool)

    def joined(self, blocks: list[Floats]) -> Floats:
        """A (d, d) matrix from its blocks of all groups."""
        if len(blocks) == 1:
            return blocks[0]
        out = np.zeros_like(self.K)
        for block, part in zip(self._blocks, blocks, strict=True):
            out[block] = part
        return out


class Saddle(Stationarity):
    """F around a point, for arguments as of `Stationarity`.

    Attributes
    ----------
    slope, mismatch
        2 dF/dC and 2 dF/dCt in whitened coordinates.
    """

    def __init__(
        self,
        problem: Problem,
        point: Point,
        laws: tuple[Law, ...] | None = None,
        averages: tuple[Averages, ...] = (),
    ) -> None:
        super().__init__(problem, point, laws, averages)
        self._ends = np.cumsum([0, *(law.size for law in self.laws)])
        self.slope = self.gathered(point.Ct - self.conjugate)
        self.mismatch = self.whitened(point.C - self.average)

    @property
    def size(self) -> int:
        """Number k of whitened coordinates."""
        return int(self._ends[-1])

    @property
    def effective(self) -> float:
        """Smallest effective fraction of the nodes."""
        return min(law.effective for law in self.laws)

    @property
    def residual(self) -> float:
        """Largest violation of the two saddle-point equations, in whitened coordinates."""
        both = np.concatenate([self.slope, self.mismatch])
        return float(np.max(np.abs(both), initial=0.0))

    @property
    def reduced_value(self) -> float:
        """The maximum of F over Ct, to second order in the mismatch."""
        return self.value + float(self.mismatch @ self.mismatch) / 4

    @cached_property
    def reduced_slope(self) -> Floats:
        """Gradient of twice the maximum of F over Ct."""
        return self.slope + self.mixed(self.mismatch)

    def mixed(self, conjugate: Floats) -> Floats:
        """E^T l."""
        back = self.joined([law.carried_back(x) for law, x in self._parts(conjugate)])
        return conjugate - self.gathered(self.problem.fed_back(back))

    def followed(self, x: Floats) -> Floats:
        """E x: the tilt that C + R x asks for."""
        return x - self._carried(self.problem.fed(self.spread(x)))

    def product(self, x: Floats) -> Floats:
        """The reduced Hessian of 2 F times x: F_xx x + E^T E x, with common parts once."""
        dC = self.spread(x)
        dK = self.problem.fed(dC)
        tilt = x - self._carried(dK)
        back = self.joined([law.carried_back(own) for law, own in self._parts(tilt)])
        return tilt + self.gathered(self._stiff(dC, dK) - self.problem.fed_back(back))

    def bent(self, x: Floats) -> Floats:
        """What the retraction adds to the Hessian along x."""
        parts = zip(self._parts(x), self._parts(self.reduced_slope), strict=True)
        return np.concatenate([law.bent(own, slope) for (law, own), (_, slope) in parts])

    def strength(self, x: Floats) -> float:
        """Largest share by which x changes a direction of C under Wick's laws."""
        return max(law.strength(own) for law, own in self._parts(x) if isinstance(law, Wick))

    def spread(self, x: Floats) -> Floats:
        """DC = R x, shape (d, d)."""
        return self.joined([law.spread(own) for law, own in self._parts(x)])

    def gathered(self, G: Floats) -> Floats:
        """R^T G."""
        pairs = zip(self.laws, self._blocks, strict=True)
        return np.concatenate([law.gathered(G[block]) for law, block in pairs])

    def whitened(self, dC: Floats) -> Floats:
        """R^-1 dC."""
        pairs = zip(self.laws, self._blocks, strict=True)
        return np.concatenate([law.whitened(dC[block]) for law, block in pairs])

    def tilt(self, conjugate: Floats) -> Floats:
        """R^-T l, shape (d, d)."""
        return self.joined([law.tilt(own) for law, own in self._parts(conjugate)])

    def moved(self, x: Floats, conjugate: Floats) -> Point:
        """The point after a step in whitened coordinates."""
        dC = self.joined([law.retracted(own) for law, own in self._parts(x)])
        return self._shifted(dC, self.tilt(conjugate))

    def settled(self) -> Point:
        """The point with null directions, out of reach of steps, as averages and `conjugate` have them; itself if none move."""
        off_C, off_Ct = self.average - self.point.C, self.conjugate - self.point.Ct
        pairs = list(zip(self.laws, self._blocks, strict=True))
        dC = self.joined([law.null(off_C[block]) for law, block in pairs])
        if np.linalg.norm(dC) <= _ROUNDING * np.linalg.norm(self.point.C):
            return self.point
        return self._shifted(
            dC, self.joined([law.null_tilt(off_Ct[block]) for law, block in pairs])
        )

    def target(self, x: Floats, conjugate: Floats) -> tuple[Floats, Floats]:
        """What Wick's laws and `conjugate` become under a step in whitened coordinates; C positive."""
        dC = self.spread(x)
        back = self.joined([law.carried_back(own) for law, own in self._parts(conjugate)])
        Ct = self.conjugate + self.problem.fed_back(back) - self._stiff(dC, self.problem.fed(dC))
        beyond = self._parts(
            x + self.whitened(self.point.C - self.joined([law.C for law in self.laws]))
        )
        C = self.joined([law.stretched(own) for law, own in beyond if isinstance(law, Wick)])
        return np.where(self._allowed, C, 0.0), np.where(self._allowed, Ct, 0.0)

    def dense(self) -> tuple[Floats, Floats]:
        """E and the reduced Hessian as matrices, (k, k)."""
        shape, units = (self.size, self.size), np.eye(self.size)
        followed = np.array([self.followed(x) for x in units]).reshape(shape).T
        reduced = np.array([self.product(x) for x in units]).reshape(shape)
        return followed, (reduced + reduced.T) / 2

    def _shifted(self, dC: Floats, dCt: Floats) -> Point:
        point, allowed = self.point, self._allowed
        return point._replace(
            C=np.where(allowed, point.C + dC, 0.0), Ct=np.where(allowed, point.Ct + dCt, 0.0)
        )

    def _stiff(self, dC: Floats, dK: Floats) -> Floats:
        """The change of 2 dF/dC with dC at fixed Ct, shape (d, d)."""
        stiff = [law.stiffened(dK[b]) for law, b in zip(self.laws, self._blocks, strict=True)]
        data = self._stiffness(dC) if self.problem.mean_field else 0.0
        return data - self.problem.fed_back(self.joined(stiff))

    @cached_property
    def _stiffness(self) -> Stiffness:
        return Stiffness(self.point.C, self.problem)

    def _parts(self, x: Floats) -> list[tuple[Law, Floats]]:
        return list(zip(self.laws, np.split(x, self._ends[1:-1]), strict=True))

    def _carried(self, dK: Floats) -> Floats:
        pairs = zip(self.laws, self._blocks, strict=True)
        return np.concatenate([law.carried(dK[block]) for law, block in pairs])


def inside(problem: Problem, point: Point) -> bool:
    """Whether a point lies in the domain of F, as far as rounding errors let one tell."""
    try:
        Saddle(problem, point)
    except np.linalg.LinAlgError:
        return False
    return True
