"""Kernels as pictures. Every function draws into given Axes, or new ones, and returns them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bayeskernel.compare import Comparison
from bayeskernel.errors import InputError

Floats = NDArray[np.float64]

# Blue and orange stay apart for every common form of colour blindness.
_KERNEL_COLOURS = "PuOr_r"
_Z_COLOURS = "coolwarm"


def plot_kernel(
    kernel: Floats,
    ax: Axes | None = None,
    *,
    limit: float | None = None,
    title: str = "",
    colours: str = _KERNEL_COLOURS,
) -> Axes:
    """Heat map of a kernel (T, P, T, P): sites ordered by step, then pattern; lines part the steps.

    Parameters
    ----------
    kernel
        Shape (T, P, T, P).
    ax
        Axes to draw into.
    limit
        The colour scale runs from -limit to limit; default the largest entry.
    title
        Above the map.
    colours
        Name of a diverging colour map.
    """
    if np.ndim(kernel) != 4 or kernel.shape[:2] != kernel.shape[2:]:
        raise InputError("kernel", "shape (T, P, T, P)", f"shape {np.shape(kernel)}")
    axes = Figure(layout="constrained").add_subplot() if ax is None else ax
    steps, patterns = kernel.shape[:2]
    limit = float(np.max(np.abs(kernel))) if limit is None else limit
    matrix = kernel.reshape(steps * patterns, -1)
    axes.imshow(matrix, cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest")
    for t in range(1, steps):
        axes.axhline(t * patterns - 0.5, color="0.5", linewidth=0.6)
        axes.axvline(t * patterns - 0.5, color="0.5", linewidth=0.6)
    middle = patterns * np.arange(steps) + (patterns - 1) / 2
    axes.set_xticks(middle, [str(t + 1) for t in range(steps)])
    axes.set_yticks(middle, [str(t + 1) for t in range(steps)])
    axes.tick_params(length=0)
    axes.set_xlabel("step")
    axes.set_title(title)
    return axes


def plot_comparison(comparisons: Comparison | Mapping[str, Comparison]) -> Figure:
    """One row per network: sampled kernel, theory, and their difference in units of its error (z)."""
    named = {"": comparisons} if isinstance(comparisons, Comparison) else dict(comparisons)
    figure = Figure(figsize=(9.5, 0.5 + 2.9 * len(named)), layout="constrained")
    grid = np.atleast_2d(figure.subplots(len(named), 3, squeeze=False))
    limit = max(float(np.abs(c.theory.kernel).max()) for c in named.values())
    for row, (name, cmp) in zip(grid, named.items(), strict=True):
        head = f"{name}: " if name else ""
        plot_kernel(
            cmp.kernel, row[0], limit=limit, title=f"{head}sampled, N = {cmp.theory.network.width}"
        )
        plot_kernel(cmp.theory.kernel, row[1], limit=limit, title=f"{head}theory")
        plot_kernel(
            cmp.z, row[2], limit=cmp.threshold, title="difference in errors (z)", colours=_Z_COLOURS
        )
        row[0].set_ylabel("step")
        _colour_bar(figure, row[1], limit, _KERNEL_COLOURS)
        _colour_bar(figure, row[2], cmp.threshold, _Z_COLOURS)
    return figure


def plot_coherence(
    comparisons: Comparison | Mapping[str, Comparison], ax: Axes | None = None
) -> Axes:
    """Correlation of each step with the last one: theory as lines, samples as points with error bars."""
    named = {"": comparisons} if isinstance(comparisons, Comparison) else dict(comparisons)
    axes = Figure(figsize=(5, 3.2), layout="constrained").add_subplot() if ax is None else ax
    for k, (name, cmp) in enumerate(named.items()):
        sampled, theory = cmp.coherence
        steps = np.arange(1, len(theory) + 1)
        axes.plot(steps, theory[:, -1], color=f"C{k}", label=f"{name} theory".strip())
        axes.errorbar(
            steps,
            sampled[:, -1],
            yerr=2 * _coherence_error(cmp)[:, -1],
            fmt="o",
            color=f"C{k}",
            label=f"{name} sampled".strip(),
        )
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_xticks(steps)
    axes.set_xlabel("step")
    axes.set_ylabel("correlation with the last step")
    axes.legend(frameon=False)
    return axes


def _coherence_error(cmp: Comparison) -> Floats:
    """Standard error of the coherence from that of the numerator; diagonal entries hardly vary."""
    overlap = np.sqrt(np.einsum("tasa->ts", cmp.mcse**2))
    size = np.sqrt(np.einsum("tata->t", cmp.kernel))
    return np.asarray(overlap / np.outer(size, size))


def _colour_bar(figure: Figure, ax: Axes, limit: float, colours: str) -> None:
    figure.colorbar(ScalarMappable(Normalize(-limit, limit), colours), ax=ax, shrink=0.85)
