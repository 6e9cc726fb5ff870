"""Progress bars for people, silence for pipes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bayeskernel.inference.chains import Report


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
    with Progress(*columns, console=console, transient=True) as bars:
        tasks = [
            bars.add_task("compiles", total=total, chain=c + 1, step_size=0.0, divergences=0)
            for c in range(chains)
        ]

        def report(chain: int, done: int, warming_up: bool, step: float, divergences: int) -> None:
            bars.update(
                tasks[chain],
                completed=done,
                description="warm-up" if warming_up else "samples",
                step_size=step,
                divergences=divergences,
            )

        yield report


@contextmanager
def training_bar(
    title: str, networks: int, steps: int, show: bool
) -> Iterator[Callable[[int, int, np.ndarray], None]]:
    """Show the steps done, the mean loss of the networks that are finite, and how many are not."""
    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield lambda block, done, loss: None
        return
    said = TextColumn("loss {task.fields[loss]:.4g}{task.fields[diverged]}")
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), said, TimeRemainingColumn())
    latest = dict[int, tuple[int, np.ndarray]]()
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(title, total=steps, loss=np.nan, diverged="")

        def report(block: int, done: int, loss: np.ndarray) -> None:
            latest[block] = done, loss
            losses = np.concatenate([own for _, own in latest.copy().values()])
            finite = np.isfinite(losses)
            bars.update(
                task,
                completed=sum(n * len(own) for n, own in latest.copy().values()) // networks,
                loss=losses[finite].mean() if finite.any() else np.nan,
                diverged=f", {np.sum(~finite)} diverged" if not finite.all() else "",
            )

        yield report
