"""One HTML file that shows a comparison and opens anywhere: no network, no other files, no need of scripts."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bayeskernel.compare import Comparison
from bayeskernel.errors import InputError, instance
from bayeskernel.inference.conditional import weights as draw_weights
from bayeskernel.inference.record import settings
from bayeskernel.meanfield.solve import MeanField
from bayeskernel.network import Network
from bayeskernel.plots import (
    plot_coherence,
    plot_comparison,
    plot_network,
    plot_predictions,
    plot_ranks,
    plot_spectrum,
)
from bayeskernel.tasks import Task

# Tasks with more numbers than this are not written out in the code that repeats a run.
_WRITTEN_OUT = 2000
# Rows of the table of chains that are shown at once, kernel entries of largest |z|, and most rows of any table:
# with these, a page of two networks stays below a megabyte.
_FIRST_ROWS, _WORST, _MOST_ROWS = 8, 20, 1000
# Arguments of bk.sample and bk.train that make a run again.
_SAMPLED = ("space", "sampler", "num_warmup", "num_samples", "num_chains")
_TRAINED = ("optimizer", "weight_decay", "num_steps", "num_networks", "learning_rate", "batch_size")
_PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def report(
    comparisons: Comparison | Mapping[str, Comparison],
    path: str | os.PathLike[str],
    *,
    weights: Mapping[str, xr.Dataset] | None = None,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write a self-contained HTML report.

    Parameters
    ----------
    comparisons
        One comparison, or several by name to be shown side by side, all of one task.
    path
        File to write; its folder must exist.
    weights
        Draws of recurrent weights by the same names, from `bayeskernel.weights`, for the weight spectrum.
        Not needed where the compared draws keep weights or pre-activations.
    notes
        A sentence about each network, by the same names, such as its score on held-out patterns; shown with its predictions.

    Returns
    -------
    The path written.
    """
    named = {"network": comparisons} if isinstance(comparisons, Comparison) else comparisons
    if (
        not isinstance(named, Mapping)
        or not named
        or not all(isinstance(cmp, Comparison) for cmp in named.values())
    ):
        raise InputError("comparisons", "a Comparison or a mapping from names to them", comparisons)
    for cmp in named.values():
        _theory(cmp)
    if (
        not isinstance(path, (str, os.PathLike))
        or not Path(path).parent.is_dir()
        or Path(path).is_dir()
    ):
        raise InputError("path", "a file in an existing folder", str(path))
    page = _PAGES.get_template("report.html.jinja").render(_view(named, weights or {}, notes or {}))
    Path(path).write_text(page, encoding="utf-8")
    return Path(path)


class _Rows(NamedTuple):
    """A table: its head, and cells as text."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def _view(
    named: Mapping[str, Comparison], weights: Mapping[str, xr.Dataset], notes: Mapping[str, str]
) -> dict[str, Any]:
    """All that the template shows."""
    task = next(iter(named.values())).theory.task
    return {
        "task": task,
        "coherence": _svg(
            plot_coherence(_plain(named)), "Correlation of every step or node with the last"
        ),
        "coherence_table": _coherence_table(named),
        "outliers": _outliers(named),
        "noun": next(iter(named.values())).noun,
        "networks": [
            _network(name, cmp, weights.get(name), maps) | {"note": notes.get(name)}
            for (name, cmp), maps in zip(named.items(), _maps(named), strict=True)
        ],
    }


def _network(
    name: str, cmp: Comparison, weights: xr.Dataset | None, maps: list[Markup]
) -> dict[str, Any]:
    theory, task = cmp.theory, cmp.theory.task
    open_ended = cmp.verdict.startswith("Inconclusive")
    return {
        "name": name,
        "comparison": cmp,
        "outcome": "good" if cmp.agrees else "open" if open_ended else "bad",
        "words": _words(theory.network),
        "drawing": _svg(plot_network(theory.network, task), f"{name} unrolled over steps"),
        "maps": maps,
        "predictions": _svg(plot_predictions(cmp), f"Outputs of {name}, sampled and theory"),
        "spectrum": _spectrum(name, cmp, weights),
        "ranks": _ranks(name, cmp),
        "chains": _chains(cmp),
        "first_rows": _FIRST_ROWS,
        "blocks": _rows(cmp.blocks, f"{cmp.noun}s", [f"{t}, {s}" for t, s in cmp.blocks.index]),
        "worst": _entry_table(cmp.table, by_size=True),
        "every": _entry_table(cmp.table) if len(cmp.table) <= _MOST_ROWS else None,
        "facts": _facts(cmp),
        "code": _code(cmp),
    }


def _words(network: Network) -> str:
    """The network's settings beside its sharing."""
    words = [network.phi.name, f"N = {network.width}", f"noise {network.noise:.3g}"]
    words += [f"leak {network.leak:.3g}"] * (network.leak < 1)
    words += [f"{network.layers} layers"] * (network.layers > 1)
    words += [f"biases {network.bias_std:.3g}"] * (network.bias_std > 0)
    return ", ".join([*words, network.scaling.replace("_", "-") + " scaling"])


def _maps(named: Mapping[str, Comparison]) -> list[list[Markup]]:
    """Sampled kernel, theory and z of every network, on one scale and each a figure of its own."""

    def own() -> Axes:
        # Equal margins, whatever the labels: maps beside each other are of one size.
        figure = plt.figure(figsize=(4, 3.6))
        figure.subplots_adjust(left=0.1, right=0.98, bottom=0.1, top=0.95)
        return figure.add_subplot()

    grid = plot_comparison(_plain(named), [[own() for _ in range(3)] for _ in named])
    what = ("sampled kernel", "kernel in theory", "z scores of the kernel")
    return [
        [_svg(axes, f"{name}: {shown}") for axes, shown in zip(row, what, strict=True)]
        for name, row in zip(named, grid, strict=True)
    ]


def _plain(named: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """Names that figures take for text, not for formulas."""
    return {name.replace("$", r"\$"): cmp for name, cmp in named.items()}


def _svg(axes: Axes, description: str) -> Markup:
    """The figure as part of the page, in its letters; closes the figure."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": description, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    # Lines and letters take the page's colour, so that figures can be read on a dark one.
    svg = buffer.getvalue().replace("#000000", "currentColor")
    label = f'<svg role="img" aria-label="{escape(description)}"'
    return Markup(svg[svg.index("<svg") :].replace("<svg", label, 1))


def _coherence_table(named: Mapping[str, Comparison]) -> _Rows:
    both = {
        f"{name} {source}": matrix
        for name, cmp in named.items()
        for source, matrix in zip(("sampled", "theory"), cmp.coherence, strict=True)
    }
    steps = len(next(iter(both.values())))
    rows = [
        (f"{t + 1}, {s + 1}", *(f"{matrix[t, s]:z.3f}" for matrix in both.values()))
        for t, s in zip(*np.triu_indices(steps, 1), strict=True)
    ]
    noun = next(iter(named.values())).noun
    return _Rows((f"{noun}s", *both), rows)


def _outliers(named: Mapping[str, Comparison]) -> _Rows:
    head = (
        "network",
        "weights",
        "act at steps",
        "bulk radius",
        "predicted outliers",
        "singular spikes",
    )
    rows = [
        (
            name,
            found.label,
            ", ".join(str(t) for t in found.steps),
            f"{found.radius:.3g}",
            ", ".join(_number(v) for v in found.eigenvalues) or "none",
            ", ".join(f"{v:.3g}" for v in found.singular_values) or "none",
        )
        for name, cmp in named.items()
        for found in _theory(cmp).outliers()
    ]
    return _Rows(head, rows)


def _theory(cmp: Comparison) -> MeanField:
    return instance("comparisons", cmp.theory, MeanField)


def _number(value: complex) -> str:
    """Three digits; an imaginary part only where it would show in them."""
    real, imaginary = float(np.real(value)), float(np.imag(value))
    if abs(imaginary) < 1e-3 * abs(value) or value == 0:
        return f"{real:.3g}"
    return f"{real:.3g} {'+-'[imaginary < 0]} {abs(imaginary):.3g}i".replace("-", "−")


def _spectrum(name: str, cmp: Comparison, weights: xr.Dataset | None) -> Markup | None:
    graph = cmp.theory.network.graph_of(cmp.theory.task.shape[0])
    if not graph.label_names["recurrent"]:
        return None  # one step has none
    recurrent = _last_weights(cmp) if weights is None else weights
    if recurrent is None:
        return None
    description = f"Eigenvalues of the recurrent weights of {name} in the complex plane"
    return _svg(plot_spectrum(recurrent, _theory(cmp)), description)


def _last_weights(cmp: Comparison) -> xr.Dataset | None:
    """Weights of the last draw of the first chain, where the run kept enough for them."""
    posterior = cmp.draws["posterior"].to_dataset()
    last = posterior.isel(chain=[0], draw=[-1])
    if "recurrent_weights" in last:
        return last
    if "preactivation" not in last:
        return None
    tree = cmp.draws.copy()
    tree["posterior"] = xr.DataTree(last)
    return draw_weights(jax.random.key(0), tree, cmp.theory.network, cmp.theory.task)


def _chains(cmp: Comparison) -> _Rows:
    order = cmp.diagnosis.table
    if not cmp.networks:
        order = order.sort_values("r_hat", ascending=False)
        order.insert(0, "r_hat", order.pop("r_hat"))
    return _rows(order[:_MOST_ROWS], "quantity", [str(i) for i in order.index[:_MOST_ROWS]])


def _ranks(name: str, cmp: Comparison) -> list[tuple[str, Markup]]:
    """Of the log density and of the slowest kernel entry, whose size needs no signs to be aligned."""
    if cmp.networks:
        return []  # no chains
    slowest, kernel = np.argmin(cmp.ess), cmp.draws["posterior"].to_dataset()["kernel"]
    t, a, s, b = (int(i) for i in np.unravel_index(slowest, cmp.ess.shape))
    # Layers and steps may be dimensions of their own.
    entry = np.abs(kernel[:, :, *np.unravel_index(slowest, kernel.shape[2:])].to_numpy())
    captions = {
        "log density": cmp.draws["sample_stats"]["lp"].to_numpy(),
        f"size of kernel entry ({t + 1}, {a}) ({s + 1}, {b}), of fewest effective draws": entry,
    }
    return [(c, _svg(plot_ranks(v), f"Rank plot of {name}: {c}")) for c, v in captions.items()]


def _entry_table(entries: pd.DataFrame, *, by_size: bool = False) -> _Rows:
    """Every entry in order, or those of largest |z|."""
    if by_size:
        worst = np.argsort(-entries["z"].abs().to_numpy(), kind="stable")
        entries = entries.iloc[worst[:_WORST]]
    sites = [f"({t}, {a}) ({s}, {b})" for t, a, s, b in entries.index]
    return _rows(entries, f"({entries.index.names[0]}, pattern) twice", sites)


def _rows(table: pd.DataFrame, head: str, names: list[str]) -> _Rows:
    rows = [
        (name, *(f"{value:.4g}" for value in row))
        for name, row in zip(names, table.to_numpy(), strict=True)
    ]
    return _Rows((head, *(str(c).replace("_", " ") for c in table.columns)), rows)


def _facts(cmp: Comparison) -> str:
    texts = {k: str(v) for k, v in cmp.draws.attrs.items()}
    attrs = {k: json.loads(v) if v.startswith("{") else v for k, v in texts.items()}
    solved = _theory(cmp)
    theory = {
        "result": str(solved.result),
        "residual": solved.residual,
        "free_energy": solved.free_energy,
        "branches": [{"free_energy": b.free_energy, "stable": b.stable} for b in solved.branches],
    }
    sampling = {
        "divergences": sum(cmp.diagnosis.divergences),
        "smallest_ess": cmp.smallest_ess,
        "draws_with_flipped_signs": cmp.flipped,
        "chains_with_exchanged_patterns": list(cmp.exchanged),
    }
    return json.dumps({**attrs, "sampling": sampling, "theory": theory}, indent=2)


def _code(cmp: Comparison) -> str:
    """Python that makes the run again."""
    network = cmp.theory.network
    # A user's activation goes by its name.
    written = repr(network).replace(repr(network.activation), repr(network.phi.name))
    lines = [
        "import jax, numpy as np",
        "import bayeskernel as bk",
        *(f"from bayeskernel import {k}" for k in ("Graph", "Sharing") if f"={k}(" in written),
        "from numpy import array, nan",
        "",
        *_task_code(cmp.theory.task),
        f"network = bk.{written}",
        *_run_code(settings(cmp.draws)),
        "comparison = bk.compare(draws, bk.solve(network, task))",
        'bk.report(comparison, "report.html")',
    ]
    return "\n".join(lines)


def _run_code(made: Mapping[str, Any]) -> list[str]:
    if made.get("space") == "measured":
        return ["draws = bk.measure(network, task, activities, outputs)  # of the trained networks"]
    trained = made.get("space") == "trained"
    names = _TRAINED if trained else _SAMPLED
    options = ", ".join(f"{k}={made[k]!r}" for k in names if k in made)
    return [
        f"key = jax.random.wrap_key_data(np.array({made.get('rng_key')}, np.uint32))",
        f"draws = bk.{'train' if trained else 'sample'}(key, network, task, {options})",
    ]


def _task_code(task: Task) -> list[str]:
    made = f"task = bk.Task(inputs, targets, name={task.name!r})"
    if task.inputs.size + task.targets.size > _WRITTEN_OUT:
        return ["inputs, targets = ...  # constant_data and observed_data of the draws", made]
    with np.printoptions(threshold=_WRITTEN_OUT, floatmode="unique", linewidth=100):
        return [f"inputs = {task.inputs!r}", f"targets = {task.targets!r}", made]
