"""How does a kernel change over a grid of problems? Theory and samples at every point, kept as they come."""

from __future__ import annotations

import inspect
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
import xarray as xr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from bayeskernel.errors import BayesKernelError, InputError, instance, mapping
from bayeskernel.inference.checkpoint import digest
from bayeskernel.inference.run import sample as sample_one
from bayeskernel.inference.storage import StorageError, read_record, write_record
from bayeskernel.network import Network
from bayeskernel.sweeps import grid as grids
from bayeskernel.sweeps.dataset import RECORD, open_sweep
from bayeskernel.sweeps.engines import Engine, engine_for
from bayeskernel.sweeps.grid import Grid, TaskOrMaker
from bayeskernel.sweeps.points import Job, SampleJob, TheoryJob, valid

# Told how many results are there.
Advance: TypeAlias = Callable[[int], None]
_OPTIONS = ("space", "sampler", "num_warmup", "num_samples", "num_chains")


class SweepError(BayesKernelError):
    """Some points could not be computed and may be next time; the message says how many are kept."""


def sweep(
    network: Network,
    task: TaskOrMaker,
    grid: Mapping[str, Sequence[Any]],
    *,
    sample: Mapping[str, Any] | None = None,
    solve: bool = True,
    out: str | os.PathLike[str],
    client: Any = None,
) -> xr.Dataset:
    """Solve, sample, or both, at every point of a grid.

    Parameters
    ----------
    network, task
        What the points have in common. To sweep over steps or patterns, ``task`` is a function of their number, or of
        both in this order.
    grid
        Values by axis: "signal" (factor on the targets), "noise", "width", "steps", "patterns", "sharing",
        "activation", "leak", "layers", "seed" (of the samples).
    sample
        Options of `bayeskernel.sample` (space, sampler, num_warmup, num_samples, num_chains); ``{}`` for its
        defaults, None for no samples.
    solve
        Whether to solve the theory, once for all widths and seeds. It is continued along rising and then falling
        signal, so that both branches are found where two coexist.
    out
        Folder for the results, one file per point, written when the point is done. Points already there are not
        computed again: the same call continues after an interruption, and a larger grid adds to a smaller one. A
        folder of another network, task or other options is refused.
    client
        None computes in this process; a number, in that many processes on this machine; a
        ``dask.distributed.Client``, on its workers, who must see the folder.

    Returns
    -------
    What `open_sweep` returns.

    Raises
    ------
    SweepError
        If points failed for a reason that may go away (a full disk, a lost worker). Errors that would occur again,
        and theory that does not converge, are recorded as results: see ``status`` and ``ok`` in the dataset.
    """
    if not isinstance(out, (str, os.PathLike)):
        raise InputError("out", "the path of a folder", repr(out))
    points = grids.checked_grid(network, task, grid)
    if not instance("solve", solve, bool) and sample is None:
        raise InputError("sample, solve", "samples, theory or both", "neither")
    options = None if sample is None else _checked_options(sample)
    folder = Path(out)
    _record(folder, points, options, solve)
    if isinstance(client, (int, float)):
        _check_travels(points)
    failures: list[str] = []
    try:
        with _bar(points, options, solve) as advance, engine_for(client, folder) as engine:
            _drive(_lines(folder, points, options, solve, advance), engine, advance, failures)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped; results so far are kept in {folder}, and the same call goes on"
        ) from None
    if failures:
        shown = "; ".join(dict.fromkeys(failures[:3]))
        raise SweepError(
            f"{len(failures)} job(s) of the sweep failed: {shown}. What was computed is kept in {folder}, "
            "and the same call goes on"
        )
    return open_sweep(folder)


def _drive(
    lines: Iterator[tuple[list[Job], list[Job]]],
    engine: Engine,
    advance: Advance,
    failures: list[str],
) -> None:
    """Keep the engine busy: a line's theory first, then its samples, and other lines beside them."""
    ready = deque[Job]()
    then: dict[tuple[Path, ...], list[Job]] = {}
    running, more = 0, True
    while True:
        room = engine.room
        while running < room and (ready or more):
            if not ready:
                theory, samples = next(lines, (None, []))
                more = theory is not None
                if theory:
                    ready.extend(theory)
                    then[theory[0].files] = samples
                else:
                    ready.extend(samples)
                continue
            engine.submit(ready.popleft())
            running += 1
        if not running:
            return
        for job, error in engine.finished():
            running -= 1
            if error is not None:
                failures.append(str(error) or type(error).__name__)
                # A full disk, or a cluster gone, would fail every other point too.
                if isinstance(error, (StorageError, ConnectionError)):
                    return
            advance(len(job.files))
            # Without theory samples could not know its signs.
            followers = then.pop(job.files, [])
            if error is None:
                ready.extend(followers)
            else:
                failures += [f"theory first: {error}"] * len(followers)


def _lines(
    folder: Path, points: Grid, options: Mapping[str, Any] | None, solve: bool, advance: Advance
) -> Iterator[tuple[list[Job], list[Job]]]:
    """What is left to do, line by line: theory (one job or none) and samples.

    Tells ``advance`` the number of results that were there.
    """
    for line in points.lines():
        network, task = points.problem(line)
        signals = points.axes["signal"]
        theory = [grids.theory_file(folder, line | {"signal": s}) for s in signals]
        first: list[Job] = []
        if solve:
            if all(valid(file) for file in theory):
                advance(len(theory))
            else:
                first = [TheoryJob(network, task, signals, tuple(theory))]
        samples: list[Job] = []
        for point in points.within(line) if options is not None else ():
            file = grids.sample_file(folder, point)
            if valid(file):
                advance(1)
            else:
                samples.append(
                    SampleJob(
                        np.asarray(jax.random.key_data(grids.key_of(point))),
                        *points.problem(point),
                        options or {},
                        (file,),
                        grids.theory_file(folder, point) if solve else None,
                    )
                )
        if first or samples:
            yield first, samples


def _record(folder: Path, points: Grid, options: Mapping[str, Any] | None, solve: bool) -> None:
    """Say what the folder holds; refuse that of another sweep."""
    tasks = {_named(sizes): digest(task) for sizes, task in points.tasks.items()}
    fixed = {k: v for k, v in points.network.describe().items() if k not in points.axes}
    shapes = [task.shape for task in points.tasks.values()]
    now = {
        "axes": {k: [grids.label(v) for v in values] for k, values in points.axes.items()},
        "swept": list(points.swept),
        "network": fixed,
        "tasks": tasks,
        "nodes": points.nodes,
        "patterns": max(shape[1] for shape in shapes),
        "outputs": shapes[0][3],
        "sample": None if options is None else dict(options),
        "solve": solve,
    }
    path = folder / RECORD
    before = read_record(path, "out", "a sweep")
    write_record(path, now if before is None else _merged(before, now, folder))


def _merged(old: dict[str, Any], new: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The record of both grids in one folder."""
    pairs = [(name, old[name], new[name]) for name in ("network", "outputs", "solve")]
    pairs.append(("patterns", _patterns(old), _patterns(new)))
    pairs += [
        (f"task of {n}", old["tasks"][n], new["tasks"][n])
        for n in set(old["tasks"]) & set(new["tasks"])
    ]
    if old["sample"] is not None and new["sample"] is not None:
        pairs.append(("sample", old["sample"], new["sample"]))
    for name, before, now in pairs:
        if before != now:
            raise InputError("out", f"a sweep with {name} = {now}", f"{folder}, one with {before}")
    axes = {
        name: sorted(set(old["axes"][name]) | set(values), key=_by_size)
        if values != old["axes"][name]
        else values
        for name, values in new["axes"].items()
    }
    return new | {
        "nodes": max((n for n in (old["nodes"], new["nodes"]) if n is not None), default=None),
        "patterns": max(old["patterns"], new["patterns"]),
        "axes": axes,
        "swept": [name for name in grids.AXES if len(axes[name]) > 1 or name in new["swept"]],
        "tasks": old["tasks"] | new["tasks"],
        "sample": new["sample"] if new["sample"] is not None else old["sample"],
    }


def _named(sizes: grids.Sizes) -> str:
    steps, patterns = sizes
    return f"{steps} steps" + ("" if patterns is None else f" and {patterns} patterns")


def _patterns(record: Mapping[str, Any]) -> object:
    return record["patterns"] if record["axes"]["patterns"] == [None] else "as swept"


def _check_travels(points: Grid) -> None:
    """Refuse activations that other processes could not import."""
    for value in points.axes["activation"]:
        try:
            pickle.dumps(value)
        except (pickle.PicklingError, AttributeError, TypeError):
            raise InputError(
                "activation", "a function of a module, to compute in other processes", value
            ) from None


def _by_size(value: str | float) -> tuple[bool, float, str]:
    return (True, 0.0, value) if isinstance(value, str) else (False, value, "")


def _checked_options(sample: Mapping[str, Any]) -> dict[str, Any]:
    given = mapping("sample", sample)
    unknown = [name for name in given if name not in _OPTIONS]
    if unknown:
        raise InputError("sample", f"options among {_OPTIONS}", unknown)
    defaults = inspect.signature(sample_one).parameters
    return {name: given.get(name, defaults[name].default) for name in _OPTIONS}


@contextmanager
def _bar(points: Grid, options: Mapping[str, Any] | None, solve: bool) -> Iterator[Advance]:
    """One bar for all results, those already there included; silence where nobody looks."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    signals = len(points.axes["signal"])
    total = solve * signals * len(list(points.lines())) + (options is not None) * len(points)
    columns = TextColumn("sweep"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Bars(*columns, console=console) as bars:
        task = bars.add_task("sweep", total=total)
        yield lambda count: bars.advance(task, count)
