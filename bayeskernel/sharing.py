"""Which weights are shared over the steps of a chain? Labels per step, equal label = same weights.

Steps are t = 1..T. The recurrent weights act from step 2 on, so their label at step 1 is never used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from bayeskernel.errors import InputError, integers

Pattern: TypeAlias = str | Sequence[int]
_KINDS = ("recurrent", "input", "readout", "feedforward")


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
    feedforward: tuple[int, ...]


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
        for name in _KINDS:
            value = checked_pattern(f"sharing.{name}", getattr(self, name))
            object.__setattr__(self, name, value)


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
        given = [(f"sharing.{kind}", getattr(pattern, kind)) for kind in _KINDS]
    else:
        given = [("sharing", checked_pattern("sharing", pattern))] * len(_KINDS)
    recurrent, *rest = (_expand(argument, own, steps) for argument, own in given)
    return StepLabels((-1, *_renumber(recurrent[1:])), *map(_renumber, rest))
