"""Notebooks run from top to bottom at small size with their claims true, and what readers see is what was run."""

import base64
import re
from pathlib import Path

import jupytext
import matplotlib as mpl
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.md"))
# Sizes that the first cell sets, for a test. Several notebooks share shapes, which compile once.
SMALL = {
    "01_quickstart": {"WIDTH": 128, "DRAWS": 200, "STEPS": 2, "PER_CLASS": 1},
    "02_phase_transition": {
        "WIDTH": 256,
        "DRAWS": 300,
        "LENGTHS": (3, 4, 8),
        "SIGNALS": (0.5, 0.9, 1.1, 1.5),
        "SAMPLED": (0.5, 1.5),
        "JUMP": 2,
    },
    "03_nonlinear_networks": {"WIDTH": 256, "DRAWS": 150, "ACTIVATIONS": ("tanh",)},
    "04_sequences": {
        "STEPS": 4,
        "PATTERNS": 1,
        "DRAWS": 300,
        "TASKS": ("sine",),
        "SUPERVISED": ([3, 4],),
        "GIVEN": [3, 4],
    },
    "05_finite_width": {"STEPS": 4, "DRAWS": 500, "WIDTHS": (32, 512)},
    "06_sharing_patterns": {
        "WIDTH": 512,
        "DRAWS": 300,
        "SIGNALS": (1.0, 6.0),
        "SAMPLED": ("0121",),
    },
    "07_your_own_data": {"WIDTH": 256, "DRAWS": 250, "P": 1},
    "08_leaky_and_stacked": {
        "WIDTH": 512,
        "DRAWS": 300,
        "LEAKS": (1.0, 0.6),
        "LAYERS": (1, 2),
        "SIGNALS": np.array([0.5, 6.0]),
        "SAMPLED": (),
    },
    "09_training": {"WIDTH": 64, "NETWORKS": 16, "STEPS": 8000, "DRAWS": 500},
    "10_real_images": {"PER_CLASS": 2, "SUBSETS": 2, "SIGNALS": (0.3, 10.0), "DRAWS": 50},
    "11_neuroscience_tasks": {
        "DRAWS": 400,
        "STEPS": 5,
        "STIMULUS": 2,
        "SAMPLE": 1,
        "RESPONSE": 1,
        "COHERENCES": (0.128, 0.512),
        "SIGNALS": {"context": 2.0, "decision": 2.5, "match": 3.0, "match of three": 3.0},
    },
}
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# The others have many shapes or long training; what they compute with is tested elsewhere.
QUICK = {"01_quickstart", "03_nonlinear_networks", "07_your_own_data"}
RUN = [p if p.stem in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in NOTEBOOKS]


def source(path):
    return jupytext.read(path, fmt="md:myst").cells


def code(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


@pytest.mark.long
@pytest.mark.parametrize("path", RUN, ids=lambda path: path.stem)
def test_notebook_runs_and_its_claims_hold(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    names = {"__name__": "__main__"}
    try:
        # Matrices are small here, and threads would only wait for each other.
        with threadpool_limits(1, user_api="blas"):
            for k, cell in enumerate(code(source(path))):
                exec(compile(cell.source, path.name, "exec"), names)
                if k == 0:
                    assert names.keys() >= SMALL[path.stem].keys()
                    names |= SMALL[path.stem]
        assert plt.get_fignums(), "a notebook ends in a figure"
    finally:
        plt.close("all")


@every
def test_notebook_asks_claims_and_answers(path):
    text = path.read_text()
    title = next(line for line in text.splitlines() if line.startswith("# "))
    assert title.endswith("?")
    assert "## The answer" in text
    assert any("assert " in cell.source for cell in code(source(path)))


@every
def test_what_readers_see_is_the_source_executed(path):
    """After a change:  python notebooks/make.py ."""
    executed = path.with_suffix(".ipynb")
    assert executed.stat().st_size < 400_000
    notebook = nbformat.read(executed, nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    made = [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert made == [(cell.cell_type, cell.source) for cell in source(path)], "stale"
    ran = code(notebook.cells)
    assert [cell.execution_count for cell in ran] == list(range(1, len(ran) + 1))


@every
def test_what_readers_see_is_a_figure_and_no_clutter(path):
    notebook = nbformat.read(path.with_suffix(".ipynb"), nbformat.NO_CONVERT)
    outputs = [output for cell in code(notebook.cells) for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    (answer,) = code(notebook.cells)[-1].outputs
    assert base64.b64decode(answer.data["image/png"]).startswith(b"\x89PNG")
    text = "".join(output.get("text", "") for output in outputs)
    assert not re.search(r"/(home|root|tmp|work|Users)\b|0x[0-9a-f]{6}|\d seconds", text)


@every
def test_executed_notebooks_keep_nothing_of_the_machine_that_ran_them(path):
    notebook = nbformat.read(path.with_suffix(".ipynb"), nbformat.NO_CONVERT)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for k, cell in enumerate(notebook.cells):
        assert (cell.id, cell.metadata) == (f"cell-{k}", {})


def test_there_are_eleven():
    assert [path.stem for path in NOTEBOOKS] == list(SMALL)
