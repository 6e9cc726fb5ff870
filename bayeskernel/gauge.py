"""Which sign flips leave a network's supervised outputs unchanged, and how are they fixed?

For odd phi, flipping all units of step t, h[t] -> s_t h[t] with s_t = +-1, is undone by
W_t -> s_t s_(t-1) W_t, U_t -> s_t U_t, V_t -> s_t V_t. Shared weights must agree on their sign at
every step they act on, which leaves a group of allowed vectors s. The kernel moves by
C[t,s] -> s_t s_s C[t,s]; prior and likelihood do not change. A chain therefore picks one sign at
random, and kernels can be averaged or compared only after every draw is brought to the same one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bayeskernel.errors import InputError
from bayeskernel.network import Network, StepLabels
from bayeskernel.tasks import Task

Floats = NDArray[np.float64]

# 2^12 sign vectors are compared at once; more free signs than that means many untied steps.
_MOST_FREE_SIGNS = 12
# A theory kernel whose sign-dependent part is below this share of its norm has none.
_NEGLIGIBLE = 1e-4


@dataclass(frozen=True)
class SignSymmetry:
    """The group of sign flips of a network on a task.

    Attributes
    ----------
    generators
        Independent flips, shape (number of free signs, T), entries +-1. The flip of all steps at
        once changes neither kernels nor outputs and is left out.
    output_signs
        What each generator does to the outputs of a step, same shape: +1 at supervised steps.
    """

    generators: NDArray[np.int64]
    output_signs: NDArray[np.int64]

    def elements(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All products of generators: kernel signs and output signs, (2^free, T); identity first."""
        free, steps = self.generators.shape
        if free > _MOST_FREE_SIGNS:
            raise InputError("sharing", f"at most {_MOST_FREE_SIGNS} free signs", free)
        powers = np.array(list(itertools.product((0, 1), repeat=free))).reshape(2**free, free, 1)
        return (
            np.prod(self.generators**powers, axis=1, dtype=np.int64).reshape(-1, steps),
            np.prod(self.output_signs**powers, axis=1, dtype=np.int64).reshape(-1, steps),
        )


def sign_symmetry(network: Network, task: Task) -> SignSymmetry:
    """Find the allowed sign flips: the null space over GF(2) of the sharing constraints."""
    steps = task.shape[0]
    labels = network.labels(steps)
    supervised = np.asarray(task.supervised.any(axis=(1, 2)))
    if not network.phi.odd:
        empty = np.ones((0, steps), np.int64)
        return SignSymmetry(empty, empty)
    driven = np.asarray(np.any(task.inputs != 0, axis=(1, 2)))
    constraints = _constraints(labels, driven, supervised)
    # Fixing s_1 = +1 removes the flip of everything.
    first = np.eye(1, steps, dtype=np.int64)
    bits = _null_space_gf2(np.concatenate([first, constraints]))
    signs = 1 - 2 * bits
    return SignSymmetry(signs, _output_signs(signs, labels.readout, supervised))


def flip_kernel(kernel: Floats, signs: NDArray[np.int64]) -> Floats:
    """C[t,s] -> s_t s_s C[t,s] in the kernel's precision; ``signs`` (..., T) broadcasts against (..., T,P,T,P)."""
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
        Shape (..., T, P, T, P).
    reference
        Shape (T, P, T, P). Where it has no sign-dependent part (below the transition, or untied)
        there is nothing to fix and every kernel keeps its sign.

    Returns
    -------
    Kernel signs and output signs, each of shape (..., T).
    """
    steps = reference.shape[0]
    identity = np.ones((*kernel.shape[:-4], steps), np.int64)
    if not _depends_on_sign(reference, symmetry):
        return identity, identity
    kernel_signs, output_signs = symmetry.elements()
    # <C_s, R> = s^T B s with B[t,s] the overlap of the two blocks.
    overlap = np.einsum("...tasb,tasb->...ts", kernel, reference, optimize=True)
    score = np.einsum("gt,...ts,gs->...g", kernel_signs, overlap, kernel_signs, optimize=True)
    # Among scores that are not numbers the first is chosen, the identity.
    best = np.argmax(score, axis=-1)
    return kernel_signs[best], output_signs[best]


def aligned(
    kernel: Floats, output: Floats, reference: Floats, symmetry: SignSymmetry
) -> tuple[Floats, Floats, float]:
    """Kernels (..., T,P,T,P) and outputs (..., T,P,O) with a reference's signs, and the share flipped."""
    signs, output_signs = align(kernel, reference, symmetry)
    flipped = float(np.mean(np.any(signs < 0, axis=-1)))
    return flip_kernel(kernel, signs), output * output_signs[..., None, None], flipped


def canonical_signs(kernel: Floats, symmetry: SignSymmetry) -> NDArray[np.int64]:
    """Find the flip (T,) after which a kernel's steps are most positively correlated."""
    if not _depends_on_sign(kernel, symmetry):
        return np.ones(len(kernel), np.int64)
    signs, _ = symmetry.elements()
    same_pattern = np.einsum("tasa->ts", kernel)
    best = np.argmax(np.einsum("gt,ts,gs->g", signs, same_pattern, signs))
    return np.asarray(signs[best])


def canonical(kernel: Floats, symmetry: SignSymmetry) -> Floats:
    """Return the member of a kernel's orbit whose steps are most positively correlated."""
    return flip_kernel(kernel, canonical_signs(kernel, symmetry))


def distance(one: Floats, two: Floats, symmetry: SignSymmetry) -> float:
    """Frobenius distance of two kernels, the signs of the first chosen to match."""
    return float(np.linalg.norm(flip_kernel(one, align(one, two, symmetry)[0]) - two))


def _depends_on_sign(kernel: Floats, symmetry: SignSymmetry) -> bool:
    change = (np.linalg.norm(flip_kernel(kernel, g) - kernel) for g in symmetry.generators)
    return bool(max(change, default=0.0) > _NEGLIGIBLE * np.linalg.norm(kernel))


def _constraints(
    labels: StepLabels, driven: NDArray[np.bool_], supervised: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Rows over GF(2) that must vanish on the sign bits: shared weights agree on their sign."""
    steps = len(labels.input)
    unit = np.eye(steps, dtype=np.int64)
    recurrent = list(unit[1:] + unit[:-1])  # W at step t sees s_t s_(t-1)
    rows = _agree(recurrent, labels.recurrent[1:])
    rows += _agree([u for u, used in zip(unit, driven, strict=True) if used],
                   [k for k, used in zip(labels.input, driven, strict=True) if used])  # fmt: skip
    rows += _agree([u for u, used in zip(unit, supervised, strict=True) if used],
                   [k for k, used in zip(labels.readout, supervised, strict=True) if used])  # fmt: skip
    return np.array(rows, np.int64).reshape(-1, steps) % 2


def _agree(
    rows: list[NDArray[np.int64]], labels: list[int] | tuple[int, ...]
) -> list[NDArray[np.int64]]:
    first: dict[int, NDArray[np.int64]] = {}
    return [
        row + first[k]
        for row, k in zip(rows, labels, strict=True)
        if first.setdefault(k, row) is not row
    ]


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


def _output_signs(
    signs: NDArray[np.int64], readout: tuple[int, ...], supervised: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """f[t] -> s_t v_l f[t], where readout l takes the sign of a supervised step it reads."""
    out = np.empty_like(signs)
    for label in set(readout):
        members = [t for t, k in enumerate(readout) if k == label]
        anchor = next((t for t in members if supervised[t]), members[0])
        out[:, members] = signs[:, members] * signs[:, [anchor]]
    return out
