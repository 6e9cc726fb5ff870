"""How is an ensemble trained? In blocks of networks, a thread each, whose state may be kept on disk.

Narrow networks share a block and are vectorised; a wide one is a block of its own, as batched products of wide matrices
take several times as long as one after the other. Blocks depend on the width and the number of networks alone, and the noise of
a step on its network and its number: results depend neither on the number of threads nor on how steps are cut into calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event
from typing import NamedTuple

import jax
import numpy as np

from bayeskernel.inference import weights
from bayeskernel.inference.chains import side_by_side
from bayeskernel.inference.checkpoint import Checkpoint, Draws, joined
from bayeskernel.inference.descent import (
    Position,
    Run,
    State,
    advance,
    begin,
    observed,
    position,
    scaled,
)

# Time that a call into compiled code should take, and most steps of one.
_SECONDS, _MOST = 0.5, 100_000
# Time between two writes of a block to its checkpoint: at least so many seconds, and so many times what a write takes.
_WRITE_SECONDS, _WRITE_SHARE = 1.0, 20.0
# Weights of a matrix times networks in a block, at most.
_BLOCK = 2**16

Report = Callable[[int, int, np.ndarray], None]


class Course(NamedTuple):
    """What is done with every network.

    Attributes
    ----------
    run, data, rate, decay
        As in `descent`.
    seen
        Steps at which loss, squared error and norms are recorded; the last is the end.
    at
        Those of them at which kernels and outputs are.
    keep_weights
        Whether those at the end are.
    """

    run: Run
    data: weights.Data
    rate: float
    decay: float
    seen: tuple[int, ...]
    at: frozenset[int]
    keep_weights: bool


def train_ensemble(
    course: Course,
    z: Position,
    keys: jax.Array,
    report: Report,
    checkpoint: Checkpoint | None = None,
) -> Draws:
    """Train networks from z; what was recorded, (networks, steps, ...), and their weights, (networks, ...).

    ``report`` is told of a block, the steps it has done, and the latest loss of its networks.
    """
    count = len(keys)
    size = block_size(course.run.net.width, count)
    blocks = [slice(first, first + size) for first in range(0, count, size)]

    def one(block: int, stop: Event) -> tuple[Draws, Draws]:
        own = jax.tree.map(lambda x: x[blocks[block]], z)
        return _train_block(course, own, keys[blocks[block]], block, report, checkpoint, stop)

    # Compile here: threads that meet an uncompiled function would each compile it.
    first, own = jax.tree.map(lambda x: x[blocks[0]], z), keys[blocks[0]]
    state = begin(first, own, course.data, course.rate, course.run)
    state = advance(state, own, course.data, course.rate, course.decay, 0, 0, course.run)
    _record(course, state, own, 0)
    done = side_by_side(one, len(blocks), checkpoint)
    rows, kept = zip(*done, strict=True)
    recorded = {
        name: np.concatenate([np.swapaxes(own[name], 0, 1) for own in rows]) for name in rows[0]
    }
    return recorded | {name: np.concatenate([own[name] for own in kept]) for name in kept[0]}


def block_size(width: int, count: int) -> int:
    """Networks in a block: a divisor of their number, as every size of a block is compiled for."""
    most = max(1, min(count, _BLOCK // width**2))
    return next(size for size in range(most, 0, -1) if count % size == 0)


def _train_block(
    course: Course,
    z: Position,
    keys: jax.Array,
    block: int,
    report: Report,
    checkpoint: Checkpoint | None,
    stop: Event,
) -> tuple[Draws, Draws]:
    run, data, rate, decay = course[:4]
    state = begin(z, keys, data, rate, run)
    done = files = 0
    parts = list[Draws]()
    if checkpoint is not None:
        state, done, files = checkpoint.load(block, state)
    if not done:
        parts.append(_record(course, state, keys, 0))
    chunk, written, cost = 1, time.monotonic(), 0.0
    for goal in course.seen:
        while done < goal and not stop.is_set():
            n, began = min(chunk, goal - done), time.perf_counter()
            state = jax.block_until_ready(
                advance(state, keys, data, rate, decay, done, done + n, run)
            )
            chunk = int(np.clip(n * _SECONDS / (time.perf_counter() - began), 1, _MOST))
            done += n
            if done == goal:
                parts.append(_record(course, state, keys, done))
                report(block, done, parts[-1]["loss"][0])
            waited = time.monotonic() - written
            due = waited > max(_WRITE_SECONDS, _WRITE_SHARE * cost) or done == course.seen[-1]
            if checkpoint is not None and (due or stop.is_set()):
                began = time.monotonic()
                files = checkpoint.save(block, state, done, files, joined(parts))
                parts, written = [], time.monotonic()
                cost = written - began
    rows = joined(parts) if checkpoint is None else checkpoint.rows(block)
    if not course.keep_weights:
        return rows, {}
    ends = scaled(position(state, keys, done, data, rate, run), data, run.net)
    return rows, {name: np.asarray(values) for name, values in ends.items()}


def _record(course: Course, state: State, keys: jax.Array, done: int) -> Draws:
    """What is recorded of a block at a step, with an axis of length one for steps, or zero where it is not."""
    z = position(state, keys, done, course.data, course.rate, course.run)
    seen = observed(z, course.data, course.decay, course.run.net)
    whole = done in course.at
    return {
        name: np.asarray(values)[None][: whole or name not in ("kernel", "output")]
        for name, values in seen.items()
    }
