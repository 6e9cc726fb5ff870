"""Which weights are shared over the steps of a chain? Labels per step, equal label = same weights.

Steps are t = 1..T. The recurrent weights act from step 2 on, so their label at step 1 is never used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from bayeskernel.errors import InputError, integers

Pattern: TypeAlias = str | Sequence[int]


@dataclass(frozen=True)
class StepLabels:
    """Which weights act at which step: equal labels mean the same weights.

    Labels are renumbered 0, 1, ... in order of first use, so two lists that describe the same
    sharing give the same object. ``recurrent[0]`` is -1: no recurrent weights act at step 1.

    Attributes
    ----------
    recurrent, input, readout, feedforward
        One label per step, length T.
    """

    recurrent: tuple[int, ...]
    input: tuple[int, ...]
    readout: tuple[int, ...]
    feedforward: tuple[int, ...] = ()

    @property
    def counts(self) -> tuple[int, int, int]:
        """Number of distinct recurrent, input and readout weight sets."""
        return max(self.recurrent) + 1, max(self.input) + 1, max(self.readout) + 1

    def masks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """M_W, M_U, M_V of shape (T, T): True where two steps use the same weights."""
        recurrent, inputs, readout = (
            np.equal.outer(labels, labels)
            for labels in (np.array(self.recurrent), np.array(self.input), np.array(self.readout))
        )
        return recurrent, inputs, readout


@dataclass(frozen=True)
class Sharing:
    """Separate sharing patterns for each kind of weights; in a stack every layer has the same patterns.

    Parameters
    ----------
    recurrent, input, readout, feedforward
        Weights between steps, from the inputs, to the outputs, and from layer to layer at the same step. Each is
        "tied" (one set of weights for all steps: an RNN), "untied" (one set per step: a DNN), or a list of T
        integer labels, where steps with equal labels use the same weights.
    """

    recurrent: Pattern = "tied"
    input: Pattern = "tied"
    readout: Pattern = "tied"
    feedforward: Pattern = "tied"

    def __post_init__(self) -> None:
        for name in ("recurrent", "input", "readout", "feedforward"):
            value = checked_pattern(f"sharing.{name}", getattr(self, name))
            object.__setattr__(self, name, value)

    def labels(self, steps: int) -> StepLabels:
        """Labels per step for a task of ``steps`` steps; lists must have that length."""
        recurrent = _expand("sharing.recurrent", self.recurrent, steps)
        return StepLabels(
            recurrent=(-1, *_renumber(recurrent[1:])),
            input=_renumber(_expand("sharing.input", self.input, steps)),
            readout=_renumber(_expand("sharing.readout", self.readout, steps)),
            feedforward=_renumber(_expand("sharing.feedforward", self.feedforward, steps)),
        )


def checked_pattern(argument: str, pattern: object) -> Pattern:
    """Refuse what is no sharing pattern of one kind of weights."""
    expected = "'tied', 'untied' or a list of integer labels, one per step"
    if isinstance(pattern, str):
        if pattern not in ("tied", "untied"):
            raise InputError(argument, expected, repr(pattern))
        return pattern
    labels = integers(argument, pattern, expected)
    if not labels:
        raise InputError(argument, expected, repr(pattern))
    return tuple(labels)


def _expand(argument: str, pattern: Pattern, steps: int) -> tuple[int, ...]:
    if pattern == "tied":
        return (0,) * steps
    if pattern == "untied":
        return tuple(range(steps))
    if len(pattern) != steps:
        raise InputError(argument, f"{steps} labels, one per step", f"{len(pattern)}: {pattern}")
    return tuple(int(label) for label in pattern)


def _renumber(labels: tuple[int, ...]) -> tuple[int, ...]:
    order = {label: index for index, label in enumerate(dict.fromkeys(labels))}
    return tuple(order[label] for label in labels)


def labels_of(pattern: Pattern | Sharing, steps: int) -> StepLabels:
    """Labels per step, from one pattern for all kinds of weights or from a `Sharing`."""
    if isinstance(pattern, Sharing):
        return pattern.labels(steps)
    labels = _expand("sharing", pattern, steps)
    return Sharing(labels, labels, labels, labels).labels(steps)
