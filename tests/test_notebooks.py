"""Notebooks run from top to bottom at small size, and what they claim holds there."""

from pathlib import Path

import jupytext
import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.md"))


def cells(path):
    return [
        cell.source for cell in jupytext.read(path, fmt="md:myst").cells if cell.cell_type == "code"
    ]


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_its_claims_hold(path, tmp_path, monkeypatch):
    monkeypatch.setenv("BAYESKERNEL_SMALL", "1")
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    names = {"__name__": "__main__"}
    try:
        for cell in cells(path):
            exec(compile(cell, path.name, "exec"), names)
        assert plt.get_fignums(), "a notebook ends in a figure"
    finally:
        plt.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_asks_claims_and_answers(path):
    text = path.read_text()
    title = next(line for line in text.splitlines() if line.startswith("# "))
    assert title.endswith("?")
    assert "## The answer" in text
    assert any("assert " in cell for cell in cells(path))


def test_there_are_seven():
    assert len(NOTEBOOKS) == 7
