"""Which points does a sweep have, and where is the result of each kept?

Theory does not depend on width and seed, and is continued along the signal: points that differ in signal alone
form a *line*. Samples are drawn point by point. In a sweep's folder, theory lies in
``theory/LINE/signal=S.npz`` and samples in ``samples/LINE/signal=S,width=N,seed=K.npz``.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from bayeskernel.errors import (
    InputError,
    instance,
    integers,
    mapping,
    positive,
    positive_integer,
)
from bayeskernel.network import Network, check_problem
from bayeskernel.sharing import Sharing
from bayeskernel.tasks import Task

# Axes in the order of a sweep's dataset. What is left out of a grid has the network's value, signal 1, seed 0.
_LINE = ("sharing", "activation", "leak", "layers", "steps", "patterns", "noise")
_WITHIN_LINE = ("signal", "width", "seed")
AXES = (*_LINE, *_WITHIN_LINE)
# Axes of which a task is made, in the order of its arguments.
SIZES = ("steps", "patterns")
# What most sweeps do not have is named only where they do; no number of patterns is that of the task.
_ABSENT = {"leak": 1.0, "layers": 1, "patterns": None}

TaskOrMaker: TypeAlias = Task | Callable[..., Task]
Point: TypeAlias = dict[str, Any]
Sizes: TypeAlias = tuple[int, int | None]


@dataclass(frozen=True, eq=False)
class Grid:
    """Values of the axes, checked.

    Attributes
    ----------
    axes
        Values by axis, in the order of `AXES`; every axis is there, with one value where it is not swept.
    swept
        The axes of the user's grid.
    network
        What the points have in common.
    tasks
        By the number of steps and that of patterns.
    """

    axes: dict[str, tuple[Any, ...]]
    swept: tuple[str, ...]
    network: Network
    tasks: Mapping[Sizes, Task]

    @property
    def nodes(self) -> int | None:
        """Most nodes of any point's graph; None where all are chains, whose nodes are steps."""
        graphs = [
            network.graph_of(task.shape[0]) for network, task in map(self.problem, self.lines())
        ]
        chains = all(graph.noun == "step" for graph in graphs)
        return None if chains else max(graph.size for graph in graphs)

    def lines(self) -> Iterator[Point]:
        """Coordinates of the lines."""
        return self._product(_LINE)

    def within(self, line: Point) -> Iterator[Point]:
        """Coordinates of the points of a line."""
        return (line | rest for rest in self._product(_WITHIN_LINE))

    def __len__(self) -> int:
        """Number of points."""
        return int(np.prod([len(values) for values in self.axes.values()]))

    def problem(self, point: Point) -> tuple[Network, Task]:
        """Network and task of a line, or of a point."""
        own = {name: value for name, value in point.items() if hasattr(self.network, name)}
        task = self.tasks[point["steps"], point["patterns"]]
        return replace(self.network, **own), task.scaled(point.get("signal", 1.0))

    def _product(self, names: Sequence[str]) -> Iterator[Point]:
        for values in itertools.product(*(self.axes[name] for name in names)):
            yield dict(zip(names, values, strict=True))


def checked_grid(network: Network, task: TaskOrMaker, grid: Mapping[str, Sequence[Any]]) -> Grid:
    """Refuse unknown axes and values no network or task could take."""
    instance("network", network, Network)
    given = mapping("grid", grid)
    unknown = [name for name in given if name not in AXES]
    if unknown:
        raise InputError("grid", f"axes among {AXES}", unknown)
    defaults = {name: getattr(network, name, None) for name in AXES} | {"signal": 1.0, "seed": 0}
    axes: dict[str, tuple[Any, ...]] = {}
    for name in AXES:
        axes[name] = _values(name, given[name]) if name in given else (defaults[name],)
    swept = tuple(name for name in AXES if name in given)
    tasks = _tasks(task, axes, swept)
    axes["steps"] = tuple(dict.fromkeys(steps for steps, _ in tasks))
    found = Grid(axes, swept, network, tasks)
    for line in found.lines():
        check_problem(*found.problem(line))
    return found


def _tasks(
    task: TaskOrMaker, axes: Mapping[str, tuple[Any, ...]], swept: Sequence[str]
) -> dict[Sizes, Task]:
    """The task of every number of steps and patterns."""
    own = [name for name in SIZES if name in swept]
    if isinstance(task, Task):
        if own:
            raise InputError(
                "task", f"a function of {' and '.join(own)}, to sweep over it", "a Task"
            )
        return {(task.shape[0], None): task}
    if not callable(task) or not own:
        expected = "a Task, or with steps or patterns in the grid a function that makes one"
        raise InputError("task", expected, type(task).__name__)
    tasks: dict[Sizes, Task] = {}
    for steps, patterns in itertools.product(axes["steps"], axes["patterns"]):
        given = {k: n for k, n in zip(SIZES, (steps, patterns), strict=True) if k in own}
        call = f"task({', '.join(own)})"
        made = instance(call, task(*given.values()), Task)
        for name, found in zip(SIZES, made.shape, strict=False):
            if found != given.get(name, found):
                raise InputError(call, f"a task of {given[name]} {name}", found)
        tasks[made.shape[0], patterns] = made
    kept = {"outputs": 3} | {name: axis for axis, name in enumerate(SIZES) if name not in own}
    for name, axis in kept.items():
        if len(numbers := {made.shape[axis] for made in tasks.values()}) > 1:
            raise InputError("task", f"as many {name} at all sizes", numbers)
    return tasks


def _values(name: str, values: object) -> tuple[Any, ...]:
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__iter__"):
        raise InputError(f"grid[{name!r}]", "a list of values", repr(values))
    where = f"grid[{name!r}]"
    listed: list[Any]
    if name in ("width", "layers", *SIZES):
        listed = [positive_integer(where, v) for v in values]
    elif name == "seed":
        listed = integers(where, values, "a list of whole numbers")
        if any(not 0 <= v < 2**32 for v in listed):
            raise InputError(where, "whole numbers from 0 to 2^32 - 1", listed)
    elif name == "noise":
        listed = [positive(where, v) for v in values]
    elif name == "signal":
        listed = [0.0 if v == 0 else positive(where, v) for v in values]
    else:
        # A network refuses what it cannot have, and brings lists of labels to one form.
        listed = [getattr(Network(1, **{name: v}), name) for v in values]
    labels = [label(v) for v in listed]
    if not listed or len(set(labels)) < len(labels):
        raise InputError(where, "at least one value, none twice", labels)
    return tuple(listed)


def label(value: Any) -> str | float | int | None:
    """The plain value that stands for a value in files and datasets."""
    if value is None or isinstance(value, (str, float, int)):
        return value
    if isinstance(value, tuple):
        return ",".join(str(v) for v in value)
    if isinstance(value, Sharing):
        return ";".join(f"{name}={label(v)}" for name, v in vars(value).items())
    return Network(1, activation=value).phi.name


def theory_file(folder: Path, point: Point) -> Path:
    """Where the theory at a point is kept."""
    return folder / "theory" / _name(point, _LINE) / f"signal={point['signal']!r}.npz"


def sample_file(folder: Path, point: Point) -> Path:
    """Where the samples of a point are kept."""
    return folder / "samples" / _name(point, _LINE) / f"{_name(point, _WITHIN_LINE)}.npz"


def key_of(point: Point) -> jax.Array:
    """The point's own randomness: it depends on its coordinates, not on the grid around it."""
    return jax.random.fold_in(
        jax.random.key(point["seed"]), zlib.crc32(_name(point, AXES).encode())
    )


def _name(point: Point, axes: Sequence[str]) -> str:
    # Names of users' functions may hold what a file name may not.
    named = [name for name in axes if point[name] != _ABSENT.get(name)]
    words = ",".join(f"{name}={label(point[name])}" for name in named)
    return "".join(c if c.isalnum() or c in "=,.;-+_" else "_" for c in words)
