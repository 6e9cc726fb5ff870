"""One HTML file that shows a comparison and opens anywhere: no scripts, no network, no other files."""

from __future__ import annotations

import html
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bayeskernel.compare import Comparison
from bayeskernel.errors import InputError
from bayeskernel.plots import plot_coherence, plot_comparison

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #2a7; --bad: #d33; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 62rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.verdict { border-left: .4rem solid var(--bad); background: var(--soft); padding: .6rem 1rem; margin: .6rem 0; }
.verdict.good { border-color: var(--good); }
figure { margin: 1rem 0; overflow-x: auto; } figure svg { max-width: 100%; height: auto; background: #fff; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .7rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
summary { cursor: pointer; } pre { overflow-x: auto; background: var(--soft); padding: .6rem; }
@media print { body { max-width: none; } details > * { display: block; } }
"""


def report(
    comparisons: Comparison | Mapping[str, Comparison], path: str | os.PathLike[str]
) -> Path:
    """Write a self-contained HTML report.

    Parameters
    ----------
    comparisons
        One comparison, or several by name to be shown side by side.
    path
        File to write; its folder must exist.

    Returns
    -------
    The path written.
    """
    named = {"network": comparisons} if isinstance(comparisons, Comparison) else dict(comparisons)
    if not named or not all(isinstance(cmp, Comparison) for cmp in named.values()):
        raise InputError("comparisons", "a Comparison or a mapping from names to them", comparisons)
    target = Path(path)
    if not target.parent.is_dir():
        raise InputError("path", "a file in an existing folder", str(target))
    target.write_text(_page(named), encoding="utf-8")
    return target


def _page(named: Mapping[str, Comparison]) -> str:
    task = next(iter(named.values())).theory.task
    T, P, D, O = task.shape  # noqa: E741
    title = f"Sampled and analytic kernels: {html.escape(task.name)}"
    coherence = plot_coherence(named).get_figure()
    assert isinstance(coherence, Figure)
    sections = [
        f"<h1>{title}</h1>",
        *(_verdict(name, cmp) for name, cmp in named.items()),
        f"<p>Task: {T} steps, {P} patterns, {D} input features, {O} outputs; "
        f"{int(task.supervised.sum())} of {task.supervised.size} targets supervised.</p>",
        "<h2>Kernels</h2><p>Rows and columns are sites (step, pattern), ordered by step.</p>",
        _figure(
            plot_comparison(named), "Kernel heat maps: sampled, theory and z score per network"
        ),
        "<h2>Coherence between steps</h2>",
        _figure(coherence, "Correlation of every step's representation with the last step's"),
        _coherence_table(named),
        *(_entries(name, cmp) for name, cmp in named.items()),
        *(_facts(name, cmp) for name, cmp in named.items()),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _verdict(name: str, cmp: Comparison) -> str:
    good = " good" if cmp.agrees else ""
    chains = f"Chains: {cmp.diagnosis.verdict}"
    return (
        f'<p class="verdict{good}"><b>{html.escape(name)}</b>. {html.escape(cmp.verdict)}'
        f"<br>{html.escape(chains)}</p>"
    )


def _figure(figure: Figure, description: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(
        "<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1
    )
    return f"<figure>{svg}</figure>"


def _coherence_table(named: Mapping[str, Comparison]) -> str:
    rows = []
    for name, cmp in named.items():
        sampled, theory = cmp.coherence
        for t, s in zip(*np.triu_indices(len(theory), 1), strict=True):
            rows.append((name, f"{t + 1}, {s + 1}", f"{sampled[t, s]:.3f}", f"{theory[t, s]:.3f}"))
    return _table(("network", "steps", "sampled", "theory"), rows) if rows else ""


def _entries(name: str, cmp: Comparison) -> str:
    columns = tuple(cmp.table.columns)
    rows = [
        (f"({i[0]}, {i[1]}) ({i[2]}, {i[3]})", *(f"{value:.4g}" for value in row))
        for i, row in zip(cmp.table.index, cmp.table.to_numpy(), strict=True)
    ]
    head = f"Every kernel entry: {html.escape(name)} ({len(rows)} rows)"
    table = _table(("(step, pattern) (step, pattern)", *columns), rows)
    return f"<details><summary>{head}</summary>{table}</details>"


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
        "smallest_ess": float(cmp.table["ess"].min()),
        "draws_with_flipped_signs": cmp.flipped,
    }
    facts = html.escape(json.dumps({**attrs, "sampling": sampling, "theory": theory}, indent=2))
    return f"<details><summary>Run facts: {html.escape(name)}</summary><pre>{facts}</pre></details>"


def _unpacked(value: object) -> object:
    text = str(value)
    return json.loads(text) if text.startswith("{") else text


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table><thead>{line(head, "th")}</thead><tbody>{body}</tbody></table></div>'
