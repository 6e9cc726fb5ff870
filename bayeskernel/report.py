"""One HTML file that shows a comparison and opens anywhere: no scripts, no network, no other files."""

from __future__ import annotations

import html
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bayeskernel.compare import Comparison
from bayeskernel.errors import InputError
from bayeskernel.inference.conditional import weights as draw_weights
from bayeskernel.inference.diagnose import gauge_fixed
from bayeskernel.plots import (
    plot_coherence,
    plot_comparison,
    plot_network,
    plot_predictions,
    plot_ranks,
    plot_spectrum,
)
from bayeskernel.tasks import Task

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #2a7; --bad: #d33; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 62rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; } h3 { font-size: 1rem; }
.verdict { border-left: .4rem solid var(--bad); background: var(--soft); padding: .6rem 1rem; margin: .6rem 0; }
.verdict.good { border-color: var(--good); }
figure { margin: 1rem 0; overflow-x: auto; } figure svg { max-width: 100%; height: auto; fill: currentColor; }
figcaption { font-size: .9rem; opacity: .8; } .side { display: flex; flex-wrap: wrap; gap: 1rem; }
.side > * { flex: 1 1 18rem; min-width: 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .7rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
summary { cursor: pointer; } pre { overflow-x: auto; background: var(--soft); padding: .6rem; }
:focus-visible { outline: 3px solid #58f; outline-offset: 2px; }
@media print { body { max-width: none; } figure, .verdict { break-inside: avoid; }
  details:not([open]) { display: none; } }
"""
# Tasks with more numbers than this are not written out in the code that repeats a run.
_WRITTEN_OUT = 2000
# Rows of the table of chains that are shown at once, kernel entries of largest |z|, and most rows of any table.
_FIRST_ROWS, _WORST, _MOST_ROWS = 8, 20, 2000


def report(
    comparisons: Comparison | Mapping[str, Comparison],
    path: str | os.PathLike[str],
    *,
    weights: Mapping[str, xr.Dataset] | None = None,
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
    if (
        not isinstance(path, (str, os.PathLike))
        or not Path(path).parent.is_dir()
        or Path(path).is_dir()
    ):
        raise InputError("path", "a file in an existing folder", str(path))
    target = Path(path)
    target.write_text(_page(named, weights or {}), encoding="utf-8")
    return target


def _page(named: Mapping[str, Comparison], weights: Mapping[str, xr.Dataset]) -> str:
    title = (
        f"Sampled and analytic kernels: {html.escape(next(iter(named.values())).theory.task.name)}"
    )
    sections = [
        f"<h1>{title}</h1>",
        *(_verdict(name, cmp) for name, cmp in named.items()),
        "<h2>Task and networks</h2>",
        _problem(named),
        "<h2>Kernels</h2><p>Rows and columns are sites (step, pattern), ordered by step.</p>",
        _figure(
            plot_comparison(named)[0, 0],
            "Kernel heat maps: sampled, theory and z score per network",
        ),
        "<h2>Coherence between steps</h2>",
        _figure(
            plot_coherence(named), "Correlation of every step's representation with the last step's"
        ),
        _coherence_table(named),
        "<h2>Predictions</h2>",
        _side(
            (name, plot_predictions(cmp), f"Outputs of {name} at every step, sampled and theory")
            for name, cmp in named.items()
        ),
        _spectra(named, weights),
        "<h2>Chains</h2>",
        *(_chains(name, cmp) for name, cmp in named.items()),
        "<h2>Details</h2>",
        *(_entries(name, cmp) for name, cmp in named.items()),
        *(_facts(name, cmp) for name, cmp in named.items()),
        *(_code(name, cmp) for name, cmp in named.items()),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><main>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def _verdict(name: str, cmp: Comparison) -> str:
    good = " good" if cmp.agrees else ""
    chains = f"Chains: {cmp.diagnosis.verdict}"
    return (
        f'<p class="verdict{good}"><b>{html.escape(name)}</b>. {html.escape(cmp.verdict)}'
        f"<br>{html.escape(chains)}</p>"
    )


def _problem(named: Mapping[str, Comparison]) -> str:
    task = next(iter(named.values())).theory.task
    T, P, D, O = task.shape  # noqa: E741
    facts = (
        f"<p>{T} steps, {P} patterns, {D} input features, {O} output{'s' * (O > 1)}; "
        f"{int(task.supervised.sum())} of {task.supervised.size} targets are given. "
        "Arrows of one colour are the same weights.</p>"
    )
    return facts + _side(
        (name, plot_network(cmp.theory.network, task), f"{name} unrolled over steps: {_words(cmp)}")
        for name, cmp in named.items()
    )


def _words(cmp: Comparison) -> str:
    network = cmp.theory.network
    return f"{network.phi.name}, N = {network.width}, noise {network.noise:g}, {network.scaling} scaling"


def _spectra(named: Mapping[str, Comparison], weights: Mapping[str, xr.Dataset]) -> str:
    if next(iter(named.values())).theory.task.shape[0] == 1:
        return ""  # one step has no recurrent weights
    rows, figures = [], []
    for name, cmp in named.items():
        for found in cmp.theory.outliers():
            steps = ", ".join(str(t) for t in found.steps)
            values = ", ".join(_number(v) for v in found.eigenvalues) or "none"
            spikes = ", ".join(f"{v:.3g}" for v in found.singular_values) or "none"
            rows.append((name, steps, f"{found.radius:.3g}", values, spikes))
        drawn = weights.get(name, _last_weights(cmp))
        if drawn is not None:
            description = f"Eigenvalues of the recurrent weights of {name} in the complex plane"
            figures.append((name, plot_spectrum(drawn, cmp.theory), description))
    table = _table(
        (
            "network",
            "acts at steps",
            "bulk radius",
            "predicted outliers",
            "predicted singular spikes",
        ),
        rows,
    )
    return "<h2>Weight spectrum</h2>" + _side(figures) + table


def _number(value: complex) -> str:
    """Real numbers without an imaginary part."""
    return f"{value:.3g}" if np.imag(value) else f"{np.real(value):.3g}"


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


def _chains(name: str, cmp: Comparison) -> str:
    table = cmp.diagnosis.table
    order = table.sort_values("r_hat", ascending=False)
    columns = [c for c in ("mean", "std", "mcse", "ess_bulk", "ess_tail", "r_hat") if c in table]
    rows = [
        (str(index), *(f"{row[c]:.4g}" for c in columns))
        for index, row in order[columns][:_MOST_ROWS].iterrows()
    ]
    head = ("quantity, worst R-hat first", *columns)
    rest = ""
    if len(rows) > _FIRST_ROWS:
        rest = (
            f"<details><summary>{_share(len(rows), len(table))} quantities</summary>"
            f"{_table(head, rows)}</details>"
        )
    lp = cmp.draws["sample_stats"]["lp"].to_numpy()
    kernel = gauge_fixed(cmp.draws)[0]
    site = np.unravel_index(np.argmin(cmp.ess), cmp.ess.shape)
    worst = (int(site[0]) + 1, int(site[1]), int(site[2]) + 1, int(site[3]))
    figures = [
        ("log density", plot_ranks(lp), "Rank plot of the log density"),
        (
            f"kernel entry {worst}, of fewest effective draws",
            plot_ranks(kernel[:, :, site[0], site[1], site[2], site[3]]),
            "Rank plot of the kernel entry of fewest effective draws",
        ),
    ]
    return (
        f"<h3>{html.escape(name)}</h3><p>{html.escape(cmp.diagnosis.verdict)}</p>"
        + _table(head, rows[:_FIRST_ROWS])
        + rest
        + _side(figures)
    )


def _side(figures: Iterable[tuple[str, Axes, str]]) -> str:
    """Figures (caption, axes, description) beside each other where there is room."""
    cells = [_figure(axes, description, caption) for caption, axes, description in figures]
    return f'<div class="side">{"".join(cells)}</div>' if cells else ""


def _figure(axes: Axes, description: str, caption: str = "") -> str:
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    # Lines and letters take the page's colour, so that figures can be read on a dark one.
    svg = buffer.getvalue().replace("#000000", "currentColor")
    svg = svg[svg.index("<svg") :].replace(
        "<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1
    )
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{svg}{below}</figure>"


def _coherence_table(named: Mapping[str, Comparison]) -> str:
    rows = []
    for name, cmp in named.items():
        sampled, theory = cmp.coherence
        for t, s in zip(*np.triu_indices(len(theory), 1), strict=True):
            rows.append((name, f"{t + 1}, {s + 1}", f"{sampled[t, s]:.3f}", f"{theory[t, s]:.3f}"))
    return _table(("network", "steps", "sampled", "theory"), rows) if rows else ""


def _entries(name: str, cmp: Comparison) -> str:
    """Blocks and entries of largest |z| at a glance, every entry folded where a page can hold them."""
    worst = np.argsort(-cmp.table["z"].abs().to_numpy(), kind="stable")
    shown = cmp.table.iloc[worst[:_WORST]]
    rest = "<p>Every entry is in <code>comparison.table</code>.</p>"
    if len(cmp.table) <= _MOST_ROWS:
        every = f"<summary>Every kernel entry ({len(cmp.table)} rows)</summary>"
        rest = f"<details>{every}{_entry_table(cmp.table)}</details>"
    blocks = [
        (f"{t}, {s}", *(f"{value:.4g}" for value in row))
        for (t, s), row in zip(cmp.blocks.index, cmp.blocks.to_numpy(), strict=True)
    ]
    return (
        f"<h3>{html.escape(name)}: blocks of the kernel between steps</h3>"
        + _table(("steps", *(c.replace("_", " ") for c in cmp.blocks.columns)), blocks)
        + f"<h3>{html.escape(name)}: {len(shown)} of {len(cmp.table)} entries, largest |z| first</h3>"
        + _entry_table(shown)
        + rest
    )


def _entry_table(entries: pd.DataFrame) -> str:
    rows = [
        (f"({i[0]}, {i[1]}) ({i[2]}, {i[3]})", *(f"{value:.4g}" for value in row))
        for i, row in zip(entries.index, entries.to_numpy(), strict=True)
    ]
    return _table(("(step, pattern) (step, pattern)", *entries.columns), rows)


def _share(shown: int, count: int) -> str:
    return f"All {count}" if shown == count else f"{shown} of {count}"


def _facts(name: str, cmp: Comparison) -> str:
    attrs = {k: _unpacked(v) for k, v in cmp.draws.attrs.items()}
    theory = {
        "result": str(cmp.theory.result),
        "residual": cmp.theory.residual,
        "free_energy": cmp.theory.free_energy,
        "branches": [
            {"free_energy": b.free_energy, "stable": b.stable} for b in cmp.theory.branches
        ],
    }
    stats = cmp.draws["sample_stats"]
    sampling = {
        "divergences": int(stats["diverging"].sum()),
        "smallest_ess": cmp.smallest_ess,
        "draws_with_flipped_signs": cmp.flipped,
    }
    facts = html.escape(json.dumps({**attrs, "sampling": sampling, "theory": theory}, indent=2))
    return f"<details><summary>Run facts: {html.escape(name)}</summary><pre>{facts}</pre></details>"


def _code(name: str, cmp: Comparison) -> str:
    """Python that makes the run again."""
    network = cmp.theory.network.describe()
    sharing = network["sharing"]
    if isinstance(sharing, dict):
        network["sharing"] = _Raw(f"bk.Sharing({_arguments(sharing)})")
    made = json.loads(str(cmp.draws.attrs["settings"]))
    names = ("space", "sampler", "num_warmup", "num_samples", "num_chains")
    options = _arguments({k: made[k] for k in names if k in made})
    lines = [
        "import jax, numpy as np",
        "import bayeskernel as bk",
        "from numpy import array, nan",
        "",
        *_task_code(cmp.theory.task),
        f"network = bk.Network({_arguments(network)})",
        f"key = jax.random.wrap_key_data(np.array({made.get('rng_key')}, np.uint32))",
        f"draws = bk.sample(key, network, task, {options})",
        "comparison = bk.compare(draws, bk.solve(network, task))",
        'bk.report(comparison, "report.html")',
    ]
    text = html.escape("\n".join(lines))
    return f"<details><summary>Code to repeat: {html.escape(name)}</summary><pre>{text}</pre></details>"


class _Raw(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _arguments(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in values.items())


def _task_code(task: Task) -> list[str]:
    made = f"task = bk.Task(inputs, targets, name={task.name!r})"
    if task.inputs.size + task.targets.size > _WRITTEN_OUT:
        return ["inputs, targets = ...  # constant_data and observed_data of the draws", made]
    with np.printoptions(threshold=_WRITTEN_OUT, floatmode="unique", linewidth=100):
        return [f"inputs = {task.inputs!r}", f"targets = {task.targets!r}", made]


def _unpacked(value: object) -> object:
    text = str(value)
    return json.loads(text) if text.startswith("{") else text


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    table = f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'
