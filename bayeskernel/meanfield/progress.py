"""A bar for people who wait for a solution, silence for pipes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from bayeskernel.meanfield.newton import Progress
from bayeskernel.meanfield.solve import TOLERANCE


@contextmanager
def solver_bar() -> Iterator[Progress | None]:
    """Show the stage, and how many of the decades of residual above the tolerance are done."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("solving"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    decades = -math.log10(TOLERANCE)
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task("compiles", total=decades)

        def report(stage: str, step: int, residual: float) -> None:
            done = -math.log10(residual) if residual > 0 else decades
            said = f"{stage}, step {step}, residual {residual:.1e} of {TOLERANCE:.0e}"
            bars.update(task, completed=min(max(done, 0.0), decades), description=said)

        yield report
