r"""How alike are two representations? Measures of the field, from kernels alone.

With kernels A and B of the same P patterns, centred (A -> H A H, H = 1 - 1 1^T / P, which takes the mean over patterns from
the activities), and ||X||_* the sum of singular values, here of R_A^T R_B for any roots A = R_A R_A^T:

    cka          <A, B> / (||A|| ||B||)                      Kornblith et al. (2019), linear
    rsa          Spearman's rank correlation of the distances between patterns      Kriegeskorte et al. (2008)
    bures        ||R_A^T R_B||_* / sqrt(tr A tr B)           normalised Bures similarity, Harvey et al. (2023)
    procrustes   sqrt(tr A + tr B - 2 ||R_A^T R_B||_*)       min_Q ||X_A - X_B Q|| / sqrt N over rotations Q of units

The first three are 1 for equal representations, and do not change with rotations of the units or one common scale; the
last one is a distance, 0 for equal ones, and changes with the scale. arccos of the third is the angular Procrustes distance of
Williams et al. (2021). Rank correlations are the same for distances and their squares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from bayeskernel.errors import InputError, real_array
from bayeskernel.inference.record import check_draws, kernel_and_output, problem
from bayeskernel.meanfield.solve import MeanField
from bayeskernel.problem import Floats

Kernels: TypeAlias = "ArrayLike | xr.DataTree | MeanField"
Measure = Literal["cka", "rsa", "procrustes", "bures"]
Distance = Literal["euclidean", "sqeuclidean", "cosine"]

# Probability between the lower and upper values over draws.
INTERVAL = 0.95
# Negative eigenvalues of this size, relative to the largest, are rounding errors of single precision.
_ROUNDING = 1e-4
# A kernel that centring leaves so little of tells no patterns apart: what is left are rounding errors.
_SILENT = 1e-6


class _Stack(NamedTuple):
    """Kernels of patterns at every node, (draws, nodes, P, P); one "draw" of what is not drawn, no noun for one kernel."""

    kernels: Floats
    noun: str | None
    drawn: bool


def similarity(a: Kernels, b: Kernels, measure: Measure = "cka") -> Any:
    """How alike the representations of the same patterns in two networks, or at two steps of one, are.

    Parameters
    ----------
    a, b
        Kernels of shape (P, P) or (T, P, T, P); draws; or theory. With kernels of shape (T, P, T, P), every step
        (node) of ``a`` is compared with every step of ``b``.
    measure
        "cka", "rsa", "bures" or "procrustes", all of centred kernels; the last is a distance. How-to guide and
        module give their formulas.

    Returns
    -------
    A number for two kernels (P, P); an array with an axis for the steps of ``a`` and one for those of ``b``
    otherwise. Where ``a`` or ``b`` are draws, a Dataset with their ``mean``, ``lower`` and ``upper``, the last two
    enclosing 95 % of draws. NaN where a representation is the same for all patterns.

    Two sets of draws are paired in order, evenly thinned to the same number: the draws of a pair belong to different
    posteriors and are independent, except where ``a`` is ``b``, which compares steps within every draw.

    Raises
    ------
    InputError
        For arrays that are not kernels, differing patterns, or fewer than two patterns (three for "rsa").
    """
    if measure not in _MEASURES:
        raise InputError("measure", f"one of {sorted(_MEASURES)}", repr(measure))
    one, two = _stack("a", a), _stack("b", b)
    least = 3 if measure == "rsa" else 2
    for name, stack in (("a", one), ("b", two)):
        if stack.kernels.shape[2] < least:
            raise InputError(name, f"at least {least} patterns", stack.kernels.shape[2])
    if one.kernels.shape[2] != two.kernels.shape[2]:
        raise InputError("b", f"the {one.kernels.shape[2]} patterns of a", two.kernels.shape[2])
    values = np.stack([_MEASURES[measure](A, B) for A, B in zip(*_paired(one, two), strict=True)])
    if one.drawn or two.drawn:
        return _summary(values, one.noun, two.noun, measure)
    kept = tuple(0 if stack.noun is None else slice(None) for stack in (one, two))
    found = values[0][kept]
    return found if np.ndim(found) else float(found)


def rdm(kernel: Kernels, distance: Distance = "euclidean") -> Floats:
    """Distances between patterns: the representational dissimilarity matrix.

    Parameters
    ----------
    kernel
        As in `similarity`.
    distance
        "euclidean" is the root of the mean squared difference over units, "sqeuclidean" its square (rsatoolbox's
        "euclidean"), "cosine" one minus the cosine of the angle. The correlation distance needs the mean over
        units, which kernels do not contain; where that mean vanishes, it is the cosine distance.

    Returns
    -------
    Shape (P, P); for every step, (T, P, P), for kernels (T, P, T, P) and theory; (draws, T, P, P) for draws.
    """
    if distance not in _DISTANCES:
        raise InputError("distance", f"one of {sorted(_DISTANCES)}", repr(distance))
    stack = _stack("kernel", kernel)
    matrix = _DISTANCES[distance](stack.kernels)
    if stack.drawn:
        return matrix
    return matrix[0, 0] if stack.noun is None else matrix[0]


def to_rsatoolbox(kernel: Kernels, distance: Distance = "sqeuclidean") -> Any:
    """Distances between patterns as rsatoolbox's RDMs, with descriptors for draw and step; needs rsatoolbox.

    Parameters
    ----------
    kernel, distance
        As in `rdm`. Squares are what rsatoolbox calls Euclidean and its measures of second moments expect.
    """
    from rsatoolbox.rdm.rdms import RDMs  # an optional dependency

    stack = _stack("kernel", kernel)
    draws, nodes, patterns = stack.kernels.shape[:3]
    matrix = np.reshape(rdm(kernel, distance), (-1, patterns, patterns))
    draw, node = np.divmod(np.arange(draws * nodes), nodes)
    return RDMs(
        matrix[:, *np.triu_indices(patterns, 1)],
        dissimilarity_measure=distance,
        rdm_descriptors={"draw": draw.tolist(), stack.noun or "step": (node + 1).tolist()},
        pattern_descriptors={"pattern": list(range(patterns))},
    )


def _squared(K: Floats) -> Floats:
    size = np.einsum("...aa->...a", K)
    # Symmetric to the last bit, so that the diagonal vanishes and equal patterns have no distance.
    return np.maximum(size[..., :, None] + size[..., None, :] - K - np.swapaxes(K, -1, -2), 0.0)


def _cosine_distance(K: Floats) -> Floats:
    size = np.sqrt(np.einsum("...aa->...a", K))
    with np.errstate(invalid="ignore", divide="ignore"):
        distance = 1 - K / (size[..., :, None] * size[..., None, :])
    return np.asarray(distance)


_DISTANCES: dict[str, Callable[[Floats], Floats]] = {
    "euclidean": lambda K: np.sqrt(_squared(K)),
    "sqeuclidean": _squared,
    "cosine": _cosine_distance,
}


def _centred(K: Floats) -> Floats:
    centred = K - K.mean(-1, keepdims=True)
    centred = centred - centred.mean(-2, keepdims=True)
    before, after = (np.einsum("naa->n", x)[:, None, None] for x in (K, centred))
    return np.where(after > _SILENT * before, centred, 0.0)


def _cosines(a: Floats, b: Floats) -> Floats:
    """Of the angles between rows, (n, features) and (m, features) -> (n, m)."""
    size = np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
    return np.divide(a @ b.T, size, out=np.full_like(size, np.nan), where=size > 0)


def _cka(A: Floats, B: Floats) -> Floats:
    return _cosines(*(_centred(K).reshape(len(K), -1) for K in (A, B)))


def _rsa(A: Floats, B: Floats) -> Floats:
    above = np.triu_indices(A.shape[1], 1)
    ranks = (rankdata(_squared(_centred(K))[:, *above], axis=1) for K in (A, B))
    return _cosines(*(r - r.mean(1, keepdims=True) for r in ranks))


def _overlaps(A: Floats, B: Floats) -> tuple[Floats, Floats, Floats]:
    """Traces of centred kernels and the nuclear norm of the product of their roots, (n, 1), (1, m), (n, m)."""
    roots = []
    for K in map(_centred, (A, B)):
        values, vectors = np.linalg.eigh(K)
        roots.append(vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :])
    products = np.einsum("nai,maj->nmij", *roots, optimize=True)
    trace_a, trace_b = (np.einsum("nai,nai->n", R, R) for R in roots)
    nuclear = np.linalg.svd(products, compute_uv=False).sum(-1)
    return trace_a[:, None], trace_b[None], np.asarray(nuclear)


def _bures(A: Floats, B: Floats) -> Floats:
    trace_a, trace_b, nuclear = _overlaps(A, B)
    size = np.sqrt(trace_a * trace_b)
    return np.divide(nuclear, size, out=np.full_like(nuclear, np.nan), where=size > 0)


def _procrustes(A: Floats, B: Floats) -> Floats:
    trace_a, trace_b, nuclear = _overlaps(A, B)
    return np.asarray(np.sqrt(np.maximum(trace_a + trace_b - 2 * nuclear, 0.0)))


_MEASURES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "cka": _cka,
    "rsa": _rsa,
    "procrustes": _procrustes,
    "bures": _bures,
}


def _stack(argument: str, value: Kernels) -> _Stack:
    """The blocks of a kernel between the patterns of one step."""
    if isinstance(value, xr.DataTree):
        check_draws(value)
        network, task = problem(value)
        kernel = kernel_and_output(value)[0].astype(np.float64)
        kernel = _finite(argument, kernel.reshape(-1, *kernel.shape[2:]))
        return _Stack(_blocks(kernel), network.graph_of(task.shape[0]).noun, True)
    if isinstance(value, MeanField):
        noun = value.network.graph_of(value.task.shape[0]).noun
        return _Stack(_blocks(_finite(argument, value.kernel)[None]), noun, False)
    array = _finite(argument, real_array(argument, value, (2, 4), "(P, P) or (T, P, T, P)"))
    half = array.ndim // 2
    if array.shape[:half] != array.shape[half:] or 0 in array.shape:
        raise InputError(argument, "shape (P, P) or (T, P, T, P)", f"shape {array.shape}")
    _check_kernel(argument, array.reshape(2 * (int(np.prod(array.shape[:half])),)))
    if half == 1:
        return _Stack(array[None, None], None, False)
    return _Stack(_blocks(array[None]), "step", False)


def _blocks(kernel: Floats) -> Floats:
    """(draws, T, P, T, P) -> (draws, T, P, P)."""
    return np.einsum("ctatb->ctab", kernel)


def _finite(argument: str, kernel: Floats) -> Floats:
    if not np.isfinite(kernel).all():
        raise InputError(argument, "finite kernels", "others")
    return kernel


def _check_kernel(argument: str, matrix: Floats) -> None:
    size = np.abs(matrix).max()
    if np.abs(matrix - matrix.T).max() > _ROUNDING * size:
        raise InputError(argument, "a symmetric kernel", "another matrix")
    least = float(np.linalg.eigvalsh(matrix)[0])
    if least < -_ROUNDING * size:
        raise InputError(argument, "a kernel without negative eigenvalues", f"{least:.3g}")


def _paired(one: _Stack, two: _Stack) -> tuple[Floats, Floats]:
    """Kernels in pairs; what is not drawn goes with every draw."""
    drawn = [len(stack.kernels) for stack in (one, two) if stack.drawn]
    count = min(drawn, default=1)
    rows = [
        np.linspace(0, len(stack.kernels) - 1, count).astype(int) if stack.drawn else [0] * count
        for stack in (one, two)
    ]
    return one.kernels[rows[0]], two.kernels[rows[1]]


def _summary(values: Floats, one: str | None, two: str | None, measure: str) -> xr.Dataset:
    """Mean and interval over draws of values (draws, n, m)."""
    tails = [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2]
    lower, upper = np.quantile(values, tails, axis=0)
    dims = (one or "step", f"other_{two or 'step'}")
    parts = {"mean": values.mean(0), "lower": lower, "upper": upper}
    data = xr.Dataset({name: (dims, part) for name, part in parts.items()})
    data = data.assign_coords({dim: np.arange(1, data.sizes[dim] + 1) for dim in dims})
    alone = [dim for dim, noun in zip(dims, (one, two), strict=True) if noun is None]
    return data.isel(dict.fromkeys(alone, 0), drop=True).assign_attrs(
        measure=measure, interval=INTERVAL
    )
