r"""What does the saddle point of a network on a task depend on?

Steps that share no weights and no target are independent under q; each such *group* of sites has a cloud of its
own. Within groups, entries of K follow linearly from entries of C at earlier steps.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bayeskernel.activations import Activation
from bayeskernel.gauge import SignSymmetry
from bayeskernel.kernels import (
    KernelMap,
    Supervision,
    kernel_map,
    preactivation_kernel,
    supervision,
    unshift,
)
from bayeskernel.meanfield.free_energy import Data
from bayeskernel.meanfield.prior import prior_recursion
from bayeskernel.meanfield.single_unit import Ints, Pairs, Sites, all_pairs, find_sites
from bayeskernel.network import Network
from bayeskernel.tasks import Task

Floats = NDArray[np.float64]


class Group(NamedTuple):
    """Sites that are correlated under q.

    Attributes
    ----------
    sites, pivots
        The sites, and those that the others follow from.
    reduction
        How they follow.
    pairs
        Entries of C among them, as positions in ``sites``.
    moving
        Entries of K that depend on C, as positions in ``pivots``.
    """

    sites: Ints
    pivots: Ints
    reduction: Sites
    pairs: Pairs
    moving: Pairs


class Problem(NamedTuple):
    """What the saddle point depends on.

    Attributes
    ----------
    phi
        Activation.
    data
        Definitions of K and S, and the targets.
    groups
        Independent groups of sites.
    pairs
        Sites of the entries of C that are solved for, group by group.
    reads
        dK/dC between entries, the moving ones of K, shape (q, n): K is linear in C.
    parity, pivot_parity
        What the sign symmetry does to the entries of C (n,) and of K (q,): zero where nothing.
    """

    phi: Activation
    data: Data
    groups: tuple[Group, ...]
    pairs: Pairs
    reads: Floats
    parity: Ints
    pivot_parity: Ints

    @property
    def size(self) -> int:
        """Number of sites, d = T P."""
        return sum(len(g.sites) for g in self.groups)

    @property
    def apart(self) -> NDArray[np.bool_]:
        """Which entries of C lie between groups, shape (d, d)."""
        label = np.zeros(self.size, int)
        for i, group in enumerate(self.groups):
            label[group.sites] = i
        return label[:, None] != label

    def scaled(self, factor: float) -> Problem:
        """The same problem with all targets multiplied."""
        given = self.data.data
        targets = np.asarray(given.targets) * factor
        return self._replace(data=self.data._replace(data=given._replace(targets=targets)))


def saddle_problem(
    network: Network,
    task: Task,
    symmetry: SignSymmetry,
    *,
    one_group: bool = False,
) -> Problem:
    """Collect the arrays of a network on a task; 64-bit JAX must be enabled.

    Solved for are all entries within groups; with ``one_group`` there is one of all sites.
    """
    map_, given = kernel_map(network, task), supervision(task)
    steps, patterns = np.shape(map_.input)[:2]
    prior = prior_recursion(network.phi, map_)
    K = np.asarray(preactivation_kernel(jnp.asarray(prior), map_)).reshape(steps * patterns, -1)
    moves, _ = _dependencies(map_, given)
    groups = list[Group]()
    independent = _independent_groups(map_, given)
    for sites in [np.arange(steps * patterns)] if one_group else independent:
        found = find_sites(K[np.ix_(sites, sites)])
        pivots = sites[found.pivots]
        moving = _chosen(pivots, all_pairs(len(pivots)), moves)
        groups.append(Group(sites, pivots, found, all_pairs(len(sites)), moving))
    pairs = _at_sites([(g.sites, g.pairs) for g in groups])
    moved = _at_sites([(g.pivots, g.moving) for g in groups])
    return Problem(
        network.phi,
        Data(map_, given),
        tuple(groups),
        pairs,
        _reads(map_, pairs, moved),
        _parity(pairs, patterns, symmetry),
        _parity(moved, patterns, symmetry),
    )


def only_read(problem: Problem) -> Problem:
    """Solve only for entries of C that K or S read; the others follow from the solution."""
    _, read = _dependencies(problem.data.map_, problem.data.data)
    keep = read[problem.pairs.first, problem.pairs.second]
    return problem._replace(
        groups=tuple(g._replace(pairs=_chosen(g.sites, g.pairs, read)) for g in problem.groups),
        pairs=_chosen(np.arange(problem.size), problem.pairs, read),
        reads=problem.reads[:, keep],
        parity=problem.parity[keep],
    )


def _dependencies(
    map_: KernelMap, given: Supervision
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which entries of K depend on C, and which of C are read by K or S; (d, d) each."""
    shape = np.shape(map_.input)
    size = shape[0] * shape[1]
    gain = np.array(np.broadcast_to(map_.recurrent, shape))
    gain[0] = gain[:, :, 0] = 0  # W first acts at step 2
    supervised = np.isin(np.arange(size), given.sites)
    readout = np.broadcast_to(map_.readout, shape).reshape(size, size) > 0
    read = np.asarray(unshift(jnp.asarray(gain))).reshape(size, size) > 0
    return gain.reshape(size, size) > 0, read | (readout & np.outer(supervised, supervised))


def _chosen(sites: Ints, pairs: Pairs, among: NDArray[np.bool_]) -> Pairs:
    """Those of some pairs of positions in ``sites`` whose entry is set, (d, d)."""
    keep = among[sites[pairs.first], sites[pairs.second]]
    return Pairs(pairs.first[keep], pairs.second[keep])


def _at_sites(groups: list[tuple[Ints, Pairs]]) -> Pairs:
    """From positions in groups to sites."""
    return Pairs(
        np.concatenate([sites[pairs.first] for sites, pairs in groups]),
        np.concatenate([sites[pairs.second] for sites, pairs in groups]),
    )


def _parity(pairs: Pairs, patterns: int, symmetry: SignSymmetry) -> Ints:
    """One bit for every generator: whether it changes the sign of an entry."""
    signs = symmetry.generators
    flipped = signs[:, pairs.first // patterns] != signs[:, pairs.second // patterns]
    return np.asarray((1 << np.arange(len(signs))) @ flipped, np.int64)


def _reads(map_: KernelMap, entries: Pairs, moving: Pairs) -> Floats:
    steps, patterns = np.shape(map_.input)[:2]
    at = np.full((steps * patterns,) * 2, -1)
    count = np.arange(len(entries.first))
    at[entries.first, entries.second] = at[entries.second, entries.first] = count
    first, second = moving
    gain = np.asarray(map_.recurrent)[first // patterns, 0, second // patterns, 0]
    out = np.zeros((len(first), len(count)))
    out[np.arange(len(first)), at[first - patterns, second - patterns]] = gain
    return out


def coupled_steps(map_: KernelMap, given: Supervision) -> NDArray[np.bool_]:
    """Steps that correlated inputs, or a readout shared between targets, couple; shape (T, T)."""
    steps, patterns = np.shape(map_.input)[:2]
    supervised = np.zeros((steps, given.mask.shape[1]))
    np.maximum.at(supervised, given.sites // patterns, given.mask)
    read = (np.asarray(map_.readout)[:, 0, :, 0] > 0) & (supervised @ supervised.T > 0)
    return np.asarray(read | np.any(np.asarray(map_.input) != 0, axis=(1, 3)))


def _independent_groups(map_: KernelMap, given: Supervision) -> list[Ints]:
    """Join steps that share recurrent weights, correlated inputs or a readout with targets."""
    steps, patterns = np.shape(map_.input)[:2]
    joined = np.asarray(map_.recurrent)[:, 0, :, 0] > 0
    joined[0] = joined[:, 0] = False  # W first acts at step 2
    joined |= coupled_steps(map_, given) | np.eye(steps, dtype=bool)
    # Where K couples C[t-1,s-1] the steps t, s are joined; their predecessors are when Ct couples them.
    joined[:-1, :-1] |= np.asarray(map_.recurrent)[1:, 0, 1:, 0] > 0
    for _ in range(steps):
        joined = joined @ joined
    groups, seen = list[Ints](), set[int]()
    for t in range(steps):
        if t not in seen:
            members = np.flatnonzero(joined[t])
            seen |= set(members.tolist())
            groups.append((members[:, None] * patterns + np.arange(patterns)).ravel())
    return groups


def matrix(entries: Floats, problem: Problem) -> Floats:
    """A symmetric (d, d) matrix from the entries solved for, zero elsewhere."""
    out, (first, second) = np.zeros((problem.size, problem.size)), problem.pairs
    out[first, second] = out[second, first] = entries
    return out


def entries(kernel: Floats, problem: Problem) -> Floats:
    """Those of a (d, d) matrix that are solved for."""
    return kernel[problem.pairs.first, problem.pairs.second]


def pivot_kernels(m: Floats, problem: Problem) -> list[Floats]:
    """K at the pivots of every group."""
    shape = np.shape(problem.data.map_.input)
    C = jnp.asarray(matrix(m, problem).reshape(shape))
    K = np.asarray(preactivation_kernel(C, problem.data.map_)).reshape(problem.size, -1)
    return [K[np.ix_(g.pivots, g.pivots)] for g in problem.groups]
