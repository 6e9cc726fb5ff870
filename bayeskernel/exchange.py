r"""Which exchanges of patterns leave a network's posterior unchanged, and which brings one kernel to another?

Prior and likelihood know patterns only by inner products of inputs and of targets (docs/theory, sections 1 and 2). A
permutation p of patterns that keeps both, X[p] = X Q and Y[p] = Y R with orthogonal Q and R, takes kernels C to C[p, p],
outputs f to f[p] R^T, and the posterior to itself: stimuli are exchanged and the answers with them. A posterior that breaks
such a symmetry has minima that are images of each other. Every chain stays in one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bayeskernel.gauge import SignSymmetry, align, aligned, distance, flip_kernel
from bayeskernel.network import Network
from bayeskernel.problem import problem
from bayeskernel.tasks import Task

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Inner products that differ by less than this share of the largest are equal.
_ROUNDING = 1e-9
# Most exchanges that are listed, and patterns among which they are looked for.
_MOST, _LARGEST = 64, 256
# An exchange must bring a kernel so much closer, or the symmetry may not be broken at all.
_CLOSER = 0.5
# Draws of a chain whose mean is compared.
_DRAWS = 64


class PatternSymmetry(NamedTuple):
    """Exchanges of patterns; the first is none.

    Attributes
    ----------
    permutations
        Shape (exchanges, P).
    rotations
        R of the outputs, shape (exchanges, O, O).
    """

    permutations: Ints
    rotations: Floats


class Matched(NamedTuple):
    """Kernels and outputs as close to a reference as symmetries bring them.

    Attributes
    ----------
    kernel, output
        Shapes (chain, draw, m, P, m, P) and (chain, draw, T, P, O).
    flipped
        Share of draws whose signs were changed.
    exchanged
        Chains whose patterns were exchanged.
    """

    kernel: NDArray[Any]
    output: Floats
    flipped: float
    exchanged: tuple[int, ...]


def pattern_symmetry(network: Network, task: Task) -> PatternSymmetry:
    """The exchanges of patterns of a network on a task, up to 64 of them; beyond 256 patterns none is looked for."""
    posed = problem(network, task)
    P, T = posed.patterns, posed.steps
    kinds, targets = [_kinds(posed.tensor(posed.input_kernel))], list[Floats]()
    for reading in posed.readings:
        Y = np.full((T * P, len(reading.outputs)), np.nan)
        Y[reading.sites] = reading.targets
        targets.append(Y.reshape(T, P, -1))
        kinds.append(_kinds(np.einsum("tao,sbo->tasb", targets[-1], targets[-1])))
    labels = _numbered(np.concatenate(kinds, axis=1)).reshape(P, P)
    start = _numbered(np.diag(labels)[:, None])
    known = _automorphisms(labels, start, start) if P <= _LARGEST else iter([np.arange(P)])
    permutations = np.stack(list(islice(known, _MOST)))
    rotations = np.tile(np.eye(posed.num_outputs), (len(permutations), 1, 1))
    for reading, Y in zip(posed.readings, targets, strict=True):
        own = np.ix_(reading.outputs, reading.outputs)
        for p, R in zip(permutations[1:], rotations[1:], strict=True):
            overlap = np.einsum("tao,tar->or", np.nan_to_num(Y), np.nan_to_num(Y[:, p]))
            left, _, right = np.linalg.svd(overlap)
            R[own] = left @ right
    return PatternSymmetry(permutations, rotations)


def matched(
    kernel: NDArray[Any],
    output: Floats,
    reference: Floats,
    signs: SignSymmetry,
    patterns: PatternSymmetry,
) -> Matched:
    """Bring chains to a reference: every chain by one exchange of patterns, every draw by its signs.

    Parameters
    ----------
    kernel, output
        Shapes (chain, draw, m, P, m, P) and (chain, draw, T, P, O).
    reference
        Shape (m, P, m, P).
    signs, patterns
        The symmetries.
    """
    exchanged = list[int]()
    for chain in range(len(kernel) if len(patterns.permutations) > 1 else 0):
        best = _closest(kernel[chain], reference, signs, patterns)
        if best == 0:
            continue
        if not exchanged:
            kernel, output = kernel.copy(), output.copy()
        exchanged.append(chain)
        kernel[chain] = _permuted(kernel[chain], patterns.permutations[best])
        output[chain] = (
            output[chain][:, :, patterns.permutations[best]] @ patterns.rotations[best].T
        )
    return Matched(*aligned(kernel, output, reference, signs), tuple(exchanged))


def _closest(
    draws: NDArray[Any], reference: Floats, signs: SignSymmetry, patterns: PatternSymmetry
) -> int:
    """The exchange that brings the mean of a chain (draw, m, P, m, P) to a reference; 0, none, unless it is much closer."""
    some = draws[np.isfinite(draws).all(axis=(1, 2, 3, 4))]
    if not len(some):
        return 0
    some = some[np.linspace(0, len(some) - 1, min(_DRAWS, len(some))).astype(int)].astype(float)
    mean = flip_kernel(some, align(some, some[-1], signs)[0]).mean(0)
    apart = [distance(_permuted(mean, p), reference, signs) for p in patterns.permutations]
    best = int(np.argmin(apart))
    return best if apart[best] < _CLOSER * apart[0] else 0


def _permuted(kernel: NDArray[Any], p: Ints) -> NDArray[Any]:
    return kernel[..., p, :, :][..., p]


def _kinds(products: Floats) -> Ints:
    """Numbers (P^2, pairs of nodes) that are equal where inner products (m, P, m, P) are; one for NaN."""
    values = products.transpose(1, 3, 0, 2).reshape(products.shape[1] ** 2, -1)
    order = np.sort(values, axis=None)
    least = _ROUNDING * np.max(np.abs(np.nan_to_num(values)), initial=0.0)
    starts = order[1:][np.diff(order) > least]
    return np.where(np.isnan(values), -1, np.searchsorted(starts, values, side="right"))


def _numbered(rows: Ints) -> Ints:
    """One number for every different row."""
    return np.unique(rows, axis=0, return_inverse=True)[1].ravel()


def _automorphisms(labels: Ints, one: Ints, two: Ints) -> Iterator[Ints]:
    """Permutations p with labels[p, p] = labels that take patterns of a colour in one to those in two; (P,) each."""
    one, two = _refined(labels, one, two)
    counts = np.bincount(one)
    if not np.array_equal(counts, np.bincount(two, minlength=len(counts))):
        return
    several = np.flatnonzero(counts > 1)
    if not len(several):
        p = np.argsort(two)[one]
        if np.array_equal(labels[np.ix_(p, p)], labels):
            yield p
        return
    colour = several[np.argmin(counts[several])]
    singled = one.copy()
    singled[np.argmax(one == colour)] = len(counts)
    for b in np.flatnonzero(two == colour):
        image = two.copy()
        image[b] = len(counts)
        yield from _automorphisms(labels, singled, image)


def _refined(labels: Ints, one: Ints, two: Ints) -> tuple[Ints, Ints]:
    """Colours that differ where labels to patterns of some colour do, in two colourings alike."""
    count = 0
    while (now := int(max(one.max(), two.max())) + 1) > count:
        count = now
        rows = [
            np.column_stack(
                [c, *(np.sort(part * count + c, axis=1) for part in (labels, labels.T))]
            )
            for c in (one, two)
        ]
        one, two = np.split(_numbered(np.concatenate(rows)), 2)
    return one, two
