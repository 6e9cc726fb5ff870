"""Figures of draws, theory and comparisons, drawn into given Axes or new ones.

Colours: theory is a line, samples are points with error bars of two standard errors; steps count from 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from bayeskernel.errors import InputError, instance
from bayeskernel.inference.diagnose import gauge_fixed
from bayeskernel.inference.record import problem
from bayeskernel.kernels import coherence
from bayeskernel.meanfield.critical import CriticalSignal
from bayeskernel.meanfield.solve import MeanField
from bayeskernel.network import Network
from bayeskernel.problem import Floats
from bayeskernel.tasks import Task

# Blue and orange stay apart for every common form of colour blindness.
_KERNEL_COLOURS = "PuOr_r"
_Z_COLOURS = "coolwarm"
# Patterns shown at once before lines can no longer be told apart.
_MOST_PATTERNS = 8
# Share of a step's width over which its patterns are spread.
_SLOT = 0.5


class Reference(Protocol):
    """What is drawn of theory, or of the draws in its place."""

    @property
    def kernel(self) -> Floats:
        """Kernel, (T, P, T, P)."""

    @property
    def output(self) -> Floats:
        """Outputs, (T, P, O)."""

    @property
    def network(self) -> Network:
        """Whose they are."""

    @property
    def task(self) -> Task:
        """On what."""


class Compared(Protocol):
    """What is drawn of a `bayeskernel.Comparison`."""

    @property
    def draws(self) -> xr.DataTree:
        """What was sampled."""

    @property
    def theory(self) -> Reference:
        """What it is compared with."""

    @property
    def kernel(self) -> Floats:
        """Sampled mean kernel, (T, P, T, P)."""

    @property
    def mcse(self) -> Floats:
        """Its standard error."""

    @property
    def z(self) -> Floats:
        """Differences from theory in units of their error."""

    @property
    def output(self) -> Floats:
        """Sampled mean outputs, (T, P, O)."""

    @property
    def coherence(self) -> tuple[Floats, Floats]:
        """Correlation of steps, sampled and theory."""

    @property
    def noun(self) -> str:
        """What a node is called, "step" or "node"."""

    @property
    def threshold(self) -> float:
        """Largest |z| expected of agreeing results."""


Result: TypeAlias = MeanField | Compared
T = TypeVar("T")


def plot_kernel(
    kernel: ArrayLike | xr.DataTree | Result | Reference,
    ax: Axes | None = None,
    *,
    limit: float | None = None,
    title: str = "",
    colours: str = _KERNEL_COLOURS,
) -> Axes:
    """Heat map of a kernel: sites ordered by step (node), then pattern; lines separate the steps.

    Parameters
    ----------
    kernel
        Shape (T, P, T, P), or draws or a comparison (whose sampled mean is drawn), or theory.
    ax
        Axes to draw into.
    limit
        The colour scale runs from -limit to limit; by default limit is the largest entry.
    title
        Above the map.
    colours
        Name of a diverging colour map.
    """
    if isinstance(kernel, xr.DataTree):
        values = gauge_fixed(kernel)[0].mean((0, 1), np.float64)
    else:
        values = np.asarray(getattr(kernel, "kernel", kernel))
    if values.ndim != 4 or values.shape[:2] != values.shape[2:]:
        raise InputError("kernel", "shape (T, P, T, P)", f"shape {values.shape}")
    axes = _axes(ax)
    steps, patterns = values.shape[:2]
    limit = float(np.max(np.abs(values))) if limit is None else limit
    matrix = values.reshape(steps * patterns, -1)
    axes.imshow(matrix, cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest")
    for t in range(1, steps):
        axes.axhline(t * patterns - 0.5, color="0.5", linewidth=0.6)
        axes.axvline(t * patterns - 0.5, color="0.5", linewidth=0.6)
    middle = patterns * np.arange(steps) + (patterns - 1) / 2
    axes.set_xticks(middle, [str(t + 1) for t in range(steps)])
    axes.set_yticks(middle, [str(t + 1) for t in range(steps)])
    axes.tick_params(length=0)
    axes.set_xlabel(_noun(kernel))
    axes.set_title(title)
    return axes


def _noun(of_kernel: object) -> str:
    """What a node of the network behind a kernel is called; "step" for arrays."""
    theory: Any = getattr(of_kernel, "theory", of_kernel)
    if isinstance(of_kernel, xr.DataTree):
        network, task = problem(of_kernel)
    elif hasattr(theory, "network"):
        network, task = theory.network, theory.task
    else:
        return "step"
    return network.graph_of(task.shape[0]).noun


def plot_comparison(
    comparisons: Compared | Mapping[str, Compared], axes: Sequence[Sequence[Axes]] | None = None
) -> NDArray[np.object_]:
    """One row per network: sampled kernel, theory, and their difference in units of its error (z).

    Parameters
    ----------
    comparisons
        One, or several by name.
    axes
        Three for every network; default a new figure.

    Returns
    -------
    The axes, shape (networks, 3).
    """
    named = _named(comparisons)
    if axes is None:
        size = (9.5, 0.5 + 2.9 * len(named))
        _, grid = plt.subplots(len(named), 3, squeeze=False, figsize=size, layout="constrained")
    else:
        grid = np.atleast_2d(np.asarray(axes, dtype=object))
    if grid.shape != (len(named), 3):
        raise InputError("axes", f"shape ({len(named)}, 3)", f"shape {grid.shape}")
    limit = max(float(np.abs(c.theory.kernel).max()) for c in named.values())
    for row, (name, cmp) in zip(grid, named.items(), strict=True):
        head = f"{name}: " if name else ""
        plot_kernel(
            cmp, row[0], limit=limit, title=f"{head}sampled, N = {cmp.theory.network.width}"
        )
        other = "theory" if isinstance(cmp.theory, MeanField) else "other draws"
        plot_kernel(cmp.theory, row[1], limit=limit, title=f"{head}{other}")
        plot_kernel(
            cmp.z, row[2], limit=cmp.threshold, title="difference in errors (z)", colours=_Z_COLOURS
        )
        row[0].set_ylabel(cmp.noun)
        row[2].set_xlabel(cmp.noun)
        for ax in row:
            ax.figure.colorbar(ax.images[-1], ax=ax, shrink=0.85)
    return grid


def plot_coherence(comparisons: Compared | Mapping[str, Compared], ax: Axes | None = None) -> Axes:
    """Correlation of each step with the last one: theory as lines, samples as points with error bars."""
    axes = _axes(ax, (5.5, 2.8))
    for k, (name, cmp) in enumerate(_named(comparisons).items()):
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
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    noun = next(iter(_named(comparisons).values())).noun
    axes.set_xlabel(noun)
    axes.set_ylabel(f"correlation with the last {noun}")
    axes.legend(frameon=False)
    return axes


def plot_predictions(
    result: Result | xr.DataTree, ax: Axes | None = None, *, truth: ArrayLike | None = None
) -> Axes:
    """Outputs against steps, in one colour for every pattern (the first eight) and output.

    Lines are theory, points sampled means with two posterior standard deviations, crosses the targets at
    supervised steps. Points at unsupervised steps are hollow.

    Parameters
    ----------
    result
        Theory, a comparison (both), or draws.
    ax
        Axes to draw into.
    truth
        What unsupervised steps should be, shape (T, P, O) or (T, P); drawn as small dots.
    """
    axes = _axes(ax, (5.5, 2.8))
    theory, mean, spread, targets = _outputs(result)
    steps, patterns, count = targets.shape
    known = ~np.isnan(targets)
    if truth is not None:
        truth = np.asarray(truth, float).reshape(targets.shape)
    shown = [(a, o) for a in range(min(patterns, _MOST_PATTERNS)) for o in range(count)]
    for k, (a, o) in enumerate(shown):
        colour, given = f"C{k % 10}", known[:, a, o]
        at = np.arange(1, steps + 1) + _SLOT * ((k + 0.5) / len(shown) - 0.5)
        label = f"pattern {a}" if count == 1 else f"pattern {a}, output {o}"
        axes.plot([], color=colour, label=label)
        if theory is not None:
            axes.plot(at, theory[:, a, o], "_-", color=colour, linewidth=1.2, markersize=12)
        if mean is not None:
            for chosen, fill in ((given, colour), (~given, "none")):
                axes.errorbar(
                    at[chosen],
                    mean[chosen, a, o],
                    2 * spread[chosen, a, o],
                    fmt="o",
                    markersize=5,
                    color=colour,
                    markerfacecolor=fill,
                    elinewidth=0.8,
                )
        axes.plot(at[given], targets[given, a, o], "x", color=colour, markersize=9)
        if truth is not None:
            axes.plot(at[~given], truth[~given, a, o], ".", color=colour, markersize=5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("output")
    axes.set_title("crosses: targets; hollow: unsupervised steps", fontsize="small")
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return axes


def plot_spectrum(
    weights: ArrayLike | xr.Dataset,
    theory: MeanField | None = None,
    ax: Axes | None = None,
    *,
    label: int = 0,
) -> Axes:
    """Eigenvalues of recurrent weights in the complex plane, with bulk circle and predicted outliers.

    Parameters
    ----------
    weights
        Shape (..., N, N), or a Dataset with ``recurrent_weights`` such as `bayeskernel.weights` returns.
    theory
        Adds the circle of radius sw that holds the bulk, and the outliers (crosses).
    ax
        Axes to draw into.
    label
        Which recurrent weights, where there are several.
    """
    if isinstance(weights, xr.Dataset):
        weights = weights["recurrent_weights"].isel(recurrent_label=label)
    matrices = np.asarray(weights)
    if matrices.ndim < 2 or matrices.shape[-1] != matrices.shape[-2]:
        raise InputError("weights", "shape (..., N, N)", f"shape {matrices.shape}")
    axes = _axes(ax, (4, 4))
    values = np.linalg.eigvals(matrices).ravel()
    axes.plot(values.real, values.imag, ".", markersize=3, alpha=0.5, label="sampled")
    if theory is not None:
        expected = theory.outliers()[label]
        axes.add_patch(Circle((0, 0), expected.radius, fill=False, color="0.5"))
        found = expected.eigenvalues
        axes.plot(found.real, found.imag, "x", color="C1", markersize=10, label="predicted outlier")
        axes.legend(
            frameon=False, fontsize="small", ncols=2, loc="lower left", bbox_to_anchor=(0, 1)
        )
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel("real part")
    axes.set_ylabel("imaginary part")
    return axes


def plot_width_scaling(
    comparisons: Sequence[Compared],
    ax: Axes | None = None,
    *,
    entries: Sequence[tuple[int, int, int, int]] | None = None,
) -> Axes:
    """Kernel entries against 1/N: samples as points, theory with its leading shift as lines.

    Parameters
    ----------
    comparisons
        Of one task and network at several widths.
    ax
        Axes to draw into.
    entries
        (step, pattern, other step, other pattern) as in ``Comparison.table``; default the first pattern
        at all pairs of steps (nodes).
    """
    theory = instance("comparisons", comparisons[0].theory, MeanField)
    steps = len(theory.kernel)
    if entries is None:
        entries = [(t, 0, s, 0) for t in range(1, steps + 1) for s in range(t, steps + 1)]
    axes = _axes(ax, (5.5, 3.6))
    widths = np.array([cmp.theory.network.width for cmp in comparisons])
    line = np.linspace(0, 1 / widths.min(), 50)
    for k, (t, a, s, b) in enumerate(entries):
        at, colour = (t - 1, a, s - 1, b), f"C{k % 10}"
        mean = np.array([cmp.kernel[at] for cmp in comparisons])
        error = np.array([cmp.mcse[at] for cmp in comparisons])
        label = f"C[{t},{s}]" if a == b == 0 else f"C[({t},{a}),({s},{b})]"
        axes.errorbar(1 / widths, mean, 2 * error, fmt="o", markersize=4, color=colour, label=label)
        axes.plot(line, theory.kernel[at] + theory.kernel_shift(1)[at] * line, color=colour)
        axes.plot(0, theory.kernel[at], "*", color=colour, markersize=9, clip_on=False)
    axes.set_xlim(0, None)
    axes.set_xlabel("1/N")
    axes.set_ylabel("kernel entry")
    axes.legend(frameon=False, fontsize="small", ncols=2)
    return axes


def plot_phase_diagram(
    results: Mapping[float, Result] | Mapping[str, Mapping[float, Result]],
    ax: Axes | None = None,
    *,
    critical: CriticalSignal | None = None,
) -> Axes:
    """Coherence of the steps against signal: the mean correlation between neighbouring steps.

    Parameters
    ----------
    results
        Theory or comparison by signal, or several such by name. Theory is a line, samples are points.
    ax
        Axes to draw into.
    critical
        From `bayeskernel.critical_signal`: marks where the untied solution loses stability, and the
        coexistence of branches where the transition is discontinuous.
    """
    axes = _axes(ax, (5.5, 3.6))
    for k, (name, curve) in enumerate(_families(results).items()):
        signals = np.array(sorted(curve))
        theories = [getattr(curve[s], "theory", curve[s]) for s in signals]
        order = [neighbouring(coherence(theory.kernel)) for theory in theories]
        axes.plot(signals, order, color=f"C{k}", label=f"{name} theory".strip())
        sampled = {s: r for s, r in curve.items() if not isinstance(r, MeanField)}
        if sampled:
            axes.errorbar(
                list(sampled),
                [neighbouring(cmp.coherence[0]) for cmp in sampled.values()],
                [2 * neighbouring(_coherence_error(cmp)) for cmp in sampled.values()],
                fmt="o",
                color=f"C{k}",
                label=f"{name} sampled".strip(),
            )
    if critical is not None and np.isfinite(critical.spinodal):
        axes.axvline(critical.spinodal, color="0.5", linestyle="--", label="critical signal")
        if critical.coexistence < critical.spinodal:
            axes.axvline(critical.coexistence, color="0.5", linestyle=":", label="coexistence")
    axes.set_xlabel("signal")
    axes.set_ylabel("correlation of neighbouring steps")
    axes.legend(frameon=False, fontsize="small")
    return axes


def plot_free_energy(
    results: Mapping[float, MeanField] | Mapping[str, Mapping[float, MeanField]],
    ax: Axes | None = None,
) -> Axes:
    """Free energy of every branch relative to the lowest, against signal; hollow symbols are saddles.

    N times the difference is the log of the odds between branches at width N.

    Parameters
    ----------
    results
        Theory by signal, or several such by name.
    ax
        Axes to draw into.
    """
    axes = _axes(ax, (5.5, 3.6))
    for k, (name, curve) in enumerate(_families(results).items()):
        colour, label = f"C{k}", name or None
        for signal in sorted(curve):
            lowest = curve[signal].branches[0].free_energy
            for branch in curve[signal].branches:
                fill = colour if branch.stable else "none"
                height = branch.free_energy - lowest
                axes.plot(signal, height, "o", color=colour, markerfacecolor=fill, label=label)
                label = None
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_xlabel("signal")
    axes.set_ylabel("F above the lowest branch")
    if any(_families(results)):
        axes.legend(frameon=False, fontsize="small")
    return axes


def plot_network(network: Network, task: Task, ax: Axes | None = None) -> Axes:
    """The network's graph: arrows of one colour use the same weights.

    Steps run to the right and layers upwards. Input weights come from below and are drawn where a step has input, readout
    weights go up and are drawn where a step has targets. Dashed lines carry pre-activations over.
    """
    graph = network.graph_of(task.shape[0])
    places = {n: (step - 1, layer - 1) for n, (layer, step) in enumerate(graph.places_of_nodes)}
    layers = 1 + max(layer for _, layer in places.values())
    last = max(t for t, _ in places.values())
    axes = _axes(
        ax, (0.9 * (last + 1), 0.9 * (layers + 1.6))
    )  # as wide and high as the limits below
    given, asked = np.any(task.inputs != 0, axis=(1, 2)), np.any(task.supervised, axis=(1, 2))
    for n, (t, layer) in places.items():
        axes.add_patch(Circle((t, layer), 0.22, fill=False, color="0.5", linewidth=1.5))
        axes.text(t, layer, str(t + 1), ha="center", va="center")
        for m in np.flatnonzero(graph.carry[n]):
            _arrow(axes, places[int(m)], (t, layer), "0.5", linestyle="--", bend=0.6)
    written: dict[tuple[int, float, str], str] = {}
    colours = 0  # of the kinds before
    for kind in ("recurrent", "input", "readout"):
        for target, source, label in graph.edges_of(kind):
            colour = f"C{(colours + label) % 10}"
            if kind == "recurrent":
                far = abs(places[target][0] - places[source][0]) > 1
                _arrow(axes, places[source], places[target], colour, bend=-0.35 * far)
            elif kind == "input" and given[source]:
                _arrow(
                    axes,
                    (source, -1.07),
                    places[target],
                    colour,
                    bend=0.3 * (places[target][1] > 0),
                )
                written[source, -0.9, "top"] = "input"
            elif kind == "readout" and asked[target]:
                bend = 0.3 * (places[source][1] < layers - 1)
                _arrow(axes, places[source], (target, layers + 0.07), colour, bend=bend)
                written[target, layers - 0.1, "bottom"] = "target"
        colours += len(graph.label_names[kind])
    for (t, height, side), text in written.items():
        axes.text(t, height, text, ha="center", va=side, fontsize="small")
    axes.set_xlim(-0.6, last + 0.6)
    axes.set_ylim(-1.3, layers + 0.3)
    axes.set_aspect("equal")
    axes.axis("off")
    return axes


def _arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str,
    *,
    linestyle: str = "-",
    bend: float = 0.0,
) -> None:
    """An arrow between the rims of two circles, bent where it would cross others."""
    way = np.subtract(end, start) / np.linalg.norm(np.subtract(end, start))
    style = {
        "arrowstyle": "-|>",
        "color": colour,
        "linewidth": 1.8,
        "linestyle": linestyle,
        "connectionstyle": f"arc3,rad={bend}",
    }
    tip, tail = np.subtract(end, 0.22 * way), np.add(start, 0.22 * way)
    axes.annotate("", (tip[0], tip[1]), (tail[0], tail[1]), arrowprops=style)


def plot_ranks(values: Floats, ax: Axes | None = None) -> Axes:
    """Rank plot: where each chain's draws lie among those of all chains; flat if chains agree.

    Parameters
    ----------
    values
        Shape (chain, draw).
    ax
        Axes to draw into.
    """
    axes = _axes(ax, (5, 2.6))
    chains, count = values.shape
    bins = 20
    ranks = np.argsort(np.argsort(values.ravel())).reshape(values.shape)
    edges = np.linspace(0, values.size, bins + 1)
    for chain in range(chains):
        height = np.histogram(ranks[chain], edges)[0] * bins / count
        axes.stairs(height, edges / values.size, label=f"chain {chain + 1}")
    band = 2 * np.sqrt(bins / count * (1 - 1 / bins))
    axes.axhspan(1 - band, 1 + band, color="0.5", alpha=0.15)
    axes.set_xlabel("rank among all draws")
    axes.set_ylabel("density")
    axes.legend(frameon=False, fontsize="small", ncols=min(chains, 4))
    return axes


def _outputs(result: Result | xr.DataTree) -> tuple[Floats | None, Floats | None, Floats, Floats]:
    """Outputs in theory, sampled mean and standard deviation, and targets; None and NaN for what there is not."""
    if isinstance(result, MeanField):
        return result.output, None, np.full_like(result.output, np.nan), result.task.targets
    if isinstance(result, xr.DataTree):
        outputs = gauge_fixed(result)[1]
        targets = result["observed_data"]["targets"].to_numpy()
        return None, outputs.mean((0, 1)), outputs.std((0, 1)), targets
    # Squares do not know the signs that draws were aligned by.
    outputs = result.draws["posterior"]["output"].to_numpy().astype(np.float64)
    variance = np.mean(outputs**2, (0, 1)) - result.output**2
    theory = result.theory
    return theory.output, result.output, np.sqrt(np.maximum(variance, 0)), theory.task.targets


def neighbouring(matrix: Floats) -> float:
    """Mean over the pairs of neighbouring steps; steps that are silent do not count."""
    return float(np.nanmean(np.diagonal(matrix, 1))) if len(matrix) > 1 else float("nan")


def _coherence_error(cmp: Compared) -> Floats:
    """Standard error of the coherence from that of the numerator; diagonal entries hardly vary."""
    overlap = np.sqrt(np.einsum("tasa->ts", cmp.mcse**2))
    size = np.sqrt(np.einsum("tata->t", cmp.kernel))
    return np.asarray(overlap / np.outer(size, size))


def _axes(ax: Axes | None, size: tuple[float, float] = (5, 4)) -> Axes:
    return plt.figure(figsize=size, layout="constrained").add_subplot() if ax is None else ax


def _named(results: T | Mapping[str, T]) -> dict[str, T]:
    return dict(results) if isinstance(results, Mapping) else {"": results}


def _families(
    results: Mapping[float, T] | Mapping[str, Mapping[float, T]],
) -> dict[str, dict[float, T]]:
    named: dict[str, dict[float, T]] = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            named[str(key)] = dict(value)
        else:
            named.setdefault("", {})[float(key)] = value
    return named
