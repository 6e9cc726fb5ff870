"""Which sign flips leave a network's supervised outputs unchanged, and how are they fixed?

For odd phi, flipping all units of a node, h[n] -> s_n h[n] with s_n = +-1, is undone by flipping the weights on its edges.
Shared weights must agree on their sign on every edge, and nodes whose pre-activations are carried over share theirs, which
leaves a group of allowed vectors s. The kernel moves by C[n,m] -> s_n s_m C[n,m]; prior and likelihood do not change. A
posterior therefore picks one sign at random, and kernels can be averaged or compared only after every draw is brought to the
same one. Of a chain, nodes are steps.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bayeskernel.graph import Graph
from bayeskernel.network import Network
from bayeskernel.tasks import Task

Floats = NDArray[np.float64]

# With up to so many free signs all 2^free sign vectors are compared at once; beyond, signs are searched for.
_MOST_COMPARED = 12
# A theory kernel whose sign-dependent part is below this share of its norm has none.
_NEGLIGIBLE = 1e-4


@dataclass(frozen=True)
class SignSymmetry:
    """The group of sign flips of a network on a task.

    Attributes
    ----------
    generators
        Independent flips, shape (number of free signs, m), entries +-1. The flip of all nodes at
        once changes neither kernels nor outputs and is left out.
    output_signs
        What each generator does to the outputs of a step, (free signs, T): +1 at supervised steps.
    """

    generators: NDArray[np.int64]
    output_signs: NDArray[np.int64]

    def best(self, scores: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Kernel signs s of largest s^T B s and their output signs, for B of shape (..., m, m): (..., m), (..., T)."""
        if len(self.generators) > _MOST_COMPARED:
            powers = self._climbed(scores)
            return _products(powers, self.generators), _products(powers, self.output_signs)
        signs, output_signs = self.elements()
        value = np.einsum("gt,...ts,gs->...g", signs, scores, signs, optimize=True)
        # Among values that are not numbers the first is chosen, the identity.
        best = np.argmax(value, axis=-1)
        return signs[best], output_signs[best]

    def elements(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All products of generators: kernel signs and output signs, (2^free, ...); identity first."""
        free = len(self.generators)
        powers = np.array(list(itertools.product((0, 1), repeat=free))).reshape(2**free, free)
        return _products(powers, self.generators), _products(powers, self.output_signs)

    def _climbed(self, scores: Floats) -> NDArray[np.int64]:
        """Powers (..., free) after flips of one or two generators that raise s^T B s as long as any does."""
        free = len(self.generators)
        one = np.eye(free, dtype=np.int64)
        moves = np.concatenate([one, *(one[[a]] ^ one[a + 1 :] for a in range(free))])
        flips = _products(moves, self.generators)
        flat = scores.reshape(-1, *scores.shape[-2:])
        powers = np.zeros((len(flat), free), np.int64)
        for own, B in zip(powers, flat, strict=True):
            while True:
                now = _products(own, self.generators)
                trial = now * flips
                value = np.einsum("gt,ts,gs->g", trial, B, trial, optimize=True)
                best = int(np.argmax(value))
                if not value[best] > now @ B @ now + 1e-12 * np.abs(B).sum():
                    break
                own ^= moves[best]
        return powers.reshape(*scores.shape[:-2], free)


def sign_symmetry(network: Network, task: Task) -> SignSymmetry:
    """Find the allowed sign flips: a null space over GF(2) of constraints on the signs of nodes, weights and outputs."""
    steps = task.shape[0]
    graph = network.graph_of(steps)
    if not network.phi.odd:
        return SignSymmetry(np.ones((0, graph.size), np.int64), np.ones((0, steps), np.int64))
    supervised = np.asarray(task.supervised.any(axis=(1, 2)))
    driven = np.asarray(np.any(task.inputs != 0, axis=(1, 2)))
    bits = _null_space_gf2(_constraints(graph, driven, supervised))
    signs = 1 - 2 * bits
    return SignSymmetry(signs[:, : graph.size], signs[:, graph.size : graph.size + steps])


def flip_kernel(kernel: Floats, signs: NDArray[np.int64]) -> Floats:
    """C[n,m] -> s_n s_m C[n,m] in the kernel's precision; ``signs`` (..., m) broadcasts against (..., m,P,m,P)."""
    if np.all(signs == 1):
        return kernel
    own = signs.astype(kernel.dtype)
    return np.asarray(kernel * own[..., :, None, None, None] * own[..., None, None, :, None])


def align(
    kernel: Floats, reference: Floats, symmetry: SignSymmetry
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find for each kernel the flip that brings it closest to ``reference``.

    Parameters
    ----------
    kernel
        Shape (..., m, P, m, P).
    reference
        Shape (m, P, m, P). Where it has no sign-dependent part (below the transition, or untied)
        there is nothing to fix and every kernel keeps its sign.

    Returns
    -------
    Kernel signs (..., m) and output signs (..., T).
    """
    if not _depends_on_sign(reference, symmetry):
        lead, steps = kernel.shape[:-4], symmetry.output_signs.shape[1]
        return np.ones((*lead, len(reference)), np.int64), np.ones((*lead, steps), np.int64)
    # <C_s, R> = s^T B s with B[n,m] the overlap of the two blocks.
    return symmetry.best(np.einsum("...tasb,tasb->...ts", kernel, reference, optimize=True))


def aligned(
    kernel: Floats, output: Floats, reference: Floats, symmetry: SignSymmetry
) -> tuple[Floats, Floats, float]:
    """Kernels (..., m,P,m,P) and outputs (..., T,P,O) with a reference's signs, and the share flipped."""
    signs, output_signs = align(kernel, reference, symmetry)
    flipped = float(np.mean(np.any(signs < 0, axis=-1)))
    return flip_kernel(kernel, signs), output * output_signs[..., None, None], flipped


def canonical_signs(kernel: Floats, symmetry: SignSymmetry) -> NDArray[np.int64]:
    """Find the flip (m,) after which a kernel's nodes are most positively correlated."""
    if not _depends_on_sign(kernel, symmetry):
        return np.ones(len(kernel), np.int64)
    return symmetry.best(np.einsum("tasa->ts", kernel))[0]


def canonical(kernel: Floats, symmetry: SignSymmetry) -> Floats:
    """Return the member of a kernel's orbit whose nodes are most positively correlated."""
    return flip_kernel(kernel, canonical_signs(kernel, symmetry))


def distance(one: Floats, two: Floats, symmetry: SignSymmetry) -> float:
    """Frobenius distance of two kernels, the signs of the first chosen to match."""
    return float(np.linalg.norm(flip_kernel(one, align(one, two, symmetry)[0]) - two))


def _depends_on_sign(kernel: Floats, symmetry: SignSymmetry) -> bool:
    change = (np.linalg.norm(flip_kernel(kernel, g) - kernel) for g in symmetry.generators)
    return bool(max(change, default=0.0) > _NEGLIGIBLE * np.linalg.norm(kernel))


def _products(powers: NDArray[np.int64], generators: NDArray[np.int64]) -> NDArray[np.int64]:
    """Products of generators (free, n) to some powers (..., free), shape (..., n)."""
    return 1 - 2 * ((powers @ (generators < 0)) % 2)


def _constraints(
    graph: Graph, driven: NDArray[np.bool_], supervised: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Rows over GF(2) that vanish on the sign bits of nodes, outputs and labels, in this order."""
    names = graph.label_names
    kinds = dict(zip(names, np.cumsum([0, *map(len, names.values())]), strict=False))
    nodes, steps = graph.size, len(supervised)
    columns = nodes + steps + sum(map(len, names.values()))
    used = list[list[int]]()
    for kind, first in kinds.items():
        for target, source, label in graph.edges_of(kind):
            weight = nodes + steps + int(first) + label
            if kind == "recurrent":
                used.append([target, source, weight])
            elif kind == "readout":
                used.append([nodes + target, source, weight])
            elif kind == "bias" or driven[source]:
                used.append([target, weight])
    used += np.argwhere(graph.carry).tolist()
    # Supervised outputs keep their sign, and so does the first output of weights that no target reads.
    free = {edge.label: edge.target for edge in reversed(graph.edges_of("readout"))}
    held = {edge.label for edge in graph.edges_of("readout") if supervised[edge.target]}
    anchors = {step for label, step in free.items() if label not in held}
    used += [[nodes + t] for t in range(steps) if supervised[t] or t in anchors]
    used += [[nodes + t] for t in set(range(steps)) - {e.target for e in graph.edges_of("readout")}]
    used.append([0])  # the flip of all nodes
    # Weights without an edge that acts are none.
    acting = {column for row in used for column in row}
    used += [[column] for column in range(nodes + steps, columns) if column not in acting]
    rows = np.zeros((len(used), columns), np.int64)
    for row, entries in zip(rows, used, strict=True):
        row[entries] = 1
    return rows


def _null_space_gf2(matrix: NDArray[np.int64]) -> NDArray[np.int64]:
    rows, columns = matrix.shape
    reduced, pivots = matrix.copy() % 2, list[int]()
    for column in range(columns):
        rank = len(pivots)
        hits = np.flatnonzero(reduced[rank:, column]) + rank
        if not hits.size:
            continue
        reduced[[rank, hits[0]]] = reduced[[hits[0], rank]]
        others = [r for r in range(rows) if r != rank and reduced[r, column]]
        reduced[others] ^= reduced[rank]
        pivots.append(column)
        if len(pivots) == rows:
            break
    free = [c for c in range(columns) if c not in pivots]
    basis = np.zeros((len(free), columns), np.int64)
    for k, column in enumerate(free):
        basis[k, column] = 1
        basis[k, pivots] = reduced[: len(pivots), column]
    return basis
