r"""What happens to the kernels as the signal is raised and lowered again?

Each solution is the start of the next. Where two branches coexist, the way up stays on the one that comes from
the prior until it ends, the way down on the one that strong signals lead to: hysteresis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from bayeskernel.meanfield.solve import MAX_STEPS, TOLERANCE, MeanField, mean_field, posed
from bayeskernel.network import Network
from bayeskernel.tasks import Task

# The way down begins at this multiple of the last signal, where only the coherent branch is left.
_ABOVE = 2.0


class Stage(NamedTuple):
    """A solution on the way.

    Attributes
    ----------
    direction
        "up" or "down".
    position
        Place among the signals.
    theory
        The solution at that signal; its task is scaled.
    """

    direction: Literal["up", "down"]
    position: int
    theory: MeanField


def solve_path(network: Network, task: Task, signals: Sequence[float]) -> Iterator[Stage]:
    """Solve along rising and then along falling signals, each from the solution before.

    Parameters
    ----------
    network, task
        As in `solve`; the task's targets are multiplied by the signals.
    signals
        In any order, without repetitions, >= 0; the path goes through them by size.

    Yields
    ------
    A `Stage` for every signal on the way up, then for every signal on the way down, as they are reached.
    """
    search = posed(network, task, None, TOLERANCE, MAX_STEPS, None)
    values = np.array(signals, np.float64)
    order = [int(k) for k in np.argsort(values)]
    # (signal, what to yield) in the order of the path.
    path: list[tuple[float, tuple[Literal["up", "down"], int] | None]]
    path = [(values[k], ("up", k)) for k in order]
    path += [(_ABOVE * values[order[-1]], None)]
    path += [(values[k], ("down", k)) for k in reversed(order)]
    solved = search.along([signal for signal, _ in path])
    for signal, stage in path:
        with np.errstate(all="ignore"):
            solutions = next(solved)
        if stage is not None:
            yield Stage(*stage, mean_field(network, task.scaled(float(signal)), solutions))
