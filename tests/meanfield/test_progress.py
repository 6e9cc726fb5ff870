"""What people see while a solution is found."""

import io

from rich.console import Console

from bayeskernel.meanfield import progress


def shown(monkeypatch, terminal):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120)
    monkeypatch.setattr(progress, "Console", lambda stderr: console)
    with progress.solver_bar() as report:
        if report is not None:
            report("polish", 3, 2e-5)
    return file.getvalue()


def test_the_bar_shows_stage_and_residual_against_tolerance(monkeypatch):
    assert "polish, step 3, residual 2.0e-05 of 1e-07" in shown(monkeypatch, True)


def test_nothing_is_shown_where_nobody_looks(monkeypatch):
    assert shown(monkeypatch, False) == ""
