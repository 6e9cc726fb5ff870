r"""What happens to the kernels as the signal is raised and lowered again?

Each solution is the start of the next. Where two branches coexist, the way up stays on the one that comes from
the prior until it ends, the way down on the one that strong signals lead to: hysteresis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np

from bayeskernel.errors import InputError
from bayeskernel.meanfield.newton import Progress
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


def solve_path(
    network: Network,
    task: Task,
    signals: Sequence[float],
    rng_key: jax.Array | None = None,
    *,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
    progress: Progress | None = None,
) -> Iterator[Stage]:
    """Solve along rising and then along falling signals, each from the solution before.

    Parameters
    ----------
    network, task
        As in `solve`; the task's targets are multiplied by the signals.
    signals
        In any order, without repetitions, >= 0; the path goes through them by size.
    rng_key, tolerance, max_steps, progress
        As in `solve`.

    Yields
    ------
    A `Stage` for every signal on the way up, then for every signal on the way down, as they are reached.
    """
    search = posed(network, task, rng_key, tolerance, max_steps, progress)
    values = np.array([float(s) for s in signals])
    distinct = len(values) and len(np.unique(values)) == len(values)
    if not distinct or not np.all(np.isfinite(values)) or np.any(values < 0):
        raise InputError("signals", "distinct finite numbers >= 0", list(signals))
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
            direction, k = stage
            yield Stage(direction, k, mean_field(network, task.scaled(float(signal)), solutions))
