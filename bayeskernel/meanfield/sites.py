r"""Which sites of a task are correlated in one unit, and which kernel entries matter among them?

Nodes that share no weights and no target are independent under the law q of one unit; each such *group* of sites has a law of
its own. Within a group only entries of C that K or S read have a conjugate; the others are averages that follow.

Symmetric matrices are also written as vectors of their entries on and above the diagonal, off-diagonal ones times sqrt(2), so
that the product of two vectors is the trace of the product of the matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bayeskernel.activations import Activation
from bayeskernel.conditioning import NULL_SHARE, spread
from bayeskernel.meanfield.prior import prior_recursion
from bayeskernel.problem import Floats, Ints, Problem


class Entries(NamedTuple):
    """Entries (first, second), first <= second, of symmetric matrices of one size.

    Attributes
    ----------
    first, second
        Positions, shape (n,).
    scale
        1 on the diagonal, sqrt(2) off it.
    size
        Rows of the matrices.
    """

    first: Ints
    second: Ints
    scale: Floats
    size: int

    def vector(self, matrix: Floats) -> Floats:
        """The entries of a symmetric matrix, scaled."""
        return np.asarray(self.scale * matrix[self.first, self.second])

    def matrix(self, vector: Floats) -> Floats:
        """A symmetric matrix, zero elsewhere, from its scaled entries."""
        out = np.zeros((self.size, self.size))
        out[self.first, self.second] = out[self.second, self.first] = vector / self.scale
        return out

    def products(self, one: Floats, two: Floats) -> Floats:
        """Scaled entries of the outer products of rows, (M, size) -> (M, n)."""
        # Entry by entry: rows of many nodes are copied as they lie in memory.
        out = np.ascontiguousarray(one.T)[self.first]
        out *= np.ascontiguousarray(two.T)[self.second]
        out *= self.scale[:, None]
        return out.T

    def chosen(self, keep: NDArray[np.bool_]) -> Entries:
        """Those of the entries that a (size, size) mask holds."""
        kept = keep[self.first, self.second]
        return Entries(self.first[kept], self.second[kept], self.scale[kept], self.size)


def every_entry(size: int) -> Entries:
    """All entries on and above the diagonal."""
    first, second = (index.astype(np.int64) for index in np.triu_indices(size))
    return Entries(first, second, np.where(first == second, 1.0, np.sqrt(2.0)), size)


class Sites(NamedTuple):
    """A group of n sites that are correlated in one unit.

    Attributes
    ----------
    members
        The sites, shape (n,).
    phi
        Activation.
    pivots, spread
        h = spread h[pivots]: sites with an innovation of their own (r,), and how all follow, (n, r).
    entries
        Entries of C that are solved for.
    parity
        Of the entries of (n, n) matrices: equal numbers where sign flips act alike.
    fed
        A range that holds all sites whose K answers to C.
    """

    members: Ints
    phi: Activation
    pivots: Ints
    spread: Floats
    entries: Entries
    parity: Ints
    fed: slice

    @property
    def block(self) -> tuple[slice | Ints, ...]:
        """Index of the group's block in (d, d) matrices."""
        first, last = self.members[0], self.members[-1]
        if last - first + 1 == len(self.members):  # neighbours, whose block needs no copy
            return (slice(first, last + 1),) * 2
        return np.ix_(self.members, self.members)

    def completed(self) -> Sites:
        """The same with all entries solved for."""
        return self._replace(entries=every_entry(len(self.members)))


def groups(problem: Problem, *, joined: bool = False) -> tuple[Sites, ...]:
    """Groups of correlated sites, one of all sites where ``joined``."""
    K = problem.preactivation_kernel(prior_recursion(problem))
    fed = np.asarray(np.any(problem.fed(np.eye(problem.size)) != 0, axis=1))
    read = np.asarray(problem.over_sites(read_blocks(problem)))
    parities = np.asarray(problem.over_sites(problem.parity))
    out = []
    for nodes in [np.arange(problem.nodes)] if joined else correlated_nodes(problem):
        index = np.flatnonzero(np.isin(problem.node_of, nodes))
        block = np.ix_(index, index)
        pivots, follow = np.arange(len(index)), np.eye(len(index))
        if not problem.phi.linear:  # whose law needs none
            pivots, follow = spread(K[block], problem.patterns, NULL_SHARE["moments"])
        entries = every_entry(len(index)).chosen(read[block])
        out.append(
            Sites(index, problem.phi, pivots, follow, entries, parities[block], _span(fed[index]))
        )
    return tuple(out)


def _span(sites: NDArray[np.bool_]) -> slice:
    held = np.flatnonzero(sites)
    return slice(held[0], held[-1] + 1) if len(held) else slice(0, 0)


def read_blocks(problem: Problem) -> NDArray[np.bool_]:
    """Pairs of nodes whose block of C is read by K or S, shape (m, m)."""
    by_K = np.asarray(abs(problem.gain).sum(axis=0)).reshape(2 * (problem.nodes,)) > 0
    return np.asarray(by_K | problem.supervised)


def correlated_nodes(problem: Problem) -> list[Ints]:
    """Nodes joined by shared weights or carries, correlated inputs or a readout shared between targets."""
    m = problem.nodes
    by_K = np.asarray(abs(problem.gain).sum(axis=1)).reshape(m, m) > 0
    # Where K couples two nodes, C at the nodes they read has a conjugate there.
    joined = by_K | read_blocks(problem) | problem.coupled | np.eye(m, dtype=bool)
    for _ in range(m.bit_length()):
        joined = joined @ joined
    return [np.flatnonzero(row) for n, row in enumerate(joined) if not np.any(joined[n, :n])]
