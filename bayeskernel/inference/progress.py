"""Progress bars for people, silence for pipes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from bayeskernel.inference.chains import Progress, Report


@contextmanager
def chain_bars(title: str, chains: int, total: int, show: bool) -> Iterator[Report | None]:
    """Show one bar per chain: phase, draws, step size, divergences."""
    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield None
        return
    columns = (
        TextColumn("chain {task.fields[chain]} {task.description:8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(
            "step size {task.fields[step_size]:.3g}, {task.fields[divergences]} divergences"
        ),
        TimeRemainingColumn(),
    )
    console.print(f"sampling {title}", highlight=False)
    with Bars(*columns, console=console, transient=True) as bars:
        tasks = [
            bars.add_task("compiles", total=total, chain=c + 1, step_size=0.0, divergences=0)
            for c in range(chains)
        ]

        def report(p: Progress) -> None:
            bars.update(
                tasks[p.chain],
                completed=p.done,
                description="warm-up" if p.warming_up else "samples",
                step_size=p.step_size,
                divergences=p.divergences,
            )

        yield report


@contextmanager
def training_bar(title: str, steps: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Show how many steps of training are done."""
    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield lambda done: None
        return
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task(title, total=steps)
        yield lambda done: bars.update(task, completed=done)
