"""What architecture is studied: width, activation, scales, and which weights are shared over steps.

Steps are t = 1..T. The recurrent weights act from step 2 on, so their label at step 1 is never used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import jax
import numpy as np

from bayeskernel.activations import Activation, resolve
from bayeskernel.errors import InputError, instance, integers, positive, positive_integer
from bayeskernel.tasks import Task

Pattern: TypeAlias = str | Sequence[int]
Scaling: TypeAlias = Literal["mean_field", "standard"]


@dataclass(frozen=True)
class StepLabels:
    """Which weights act at which step: equal labels mean the same weights.

    Labels are renumbered 0, 1, ... in order of first use, so two lists that describe the same
    sharing give the same object. ``recurrent[0]`` is -1: no recurrent weights act at step 1.

    Attributes
    ----------
    recurrent, input, readout
        One label per step, length T.
    """

    recurrent: tuple[int, ...]
    input: tuple[int, ...]
    readout: tuple[int, ...]

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
    """Separate sharing patterns for the three kinds of weights.

    Parameters
    ----------
    recurrent, input, readout
        Each "tied" (one set of weights for all steps: an RNN), "untied" (a set per step: a DNN), or
        a list of T integer labels, equal label = same weights.
    """

    recurrent: Pattern = "tied"
    input: Pattern = "tied"
    readout: Pattern = "tied"

    def __post_init__(self) -> None:
        for name in ("recurrent", "input", "readout"):
            value = _checked_pattern(f"sharing.{name}", getattr(self, name))
            object.__setattr__(self, name, value)

    def labels(self, steps: int) -> StepLabels:
        """Labels per step for a task of ``steps`` steps; lists must have that length."""
        recurrent = _expand("sharing.recurrent", self.recurrent, steps)
        return StepLabels(
            recurrent=(-1, *_renumber(recurrent[1:])),
            input=_renumber(_expand("sharing.input", self.input, steps)),
            readout=_renumber(_expand("sharing.readout", self.readout, steps)),
        )


@dataclass(frozen=True)
class Network:
    r"""A recurrent or deep network with Gaussian priors on its weights.

    The network and its prior (N = width, D = input dimension, t = 1..T)::

        h[t,a] = W_t phi(h[t-1,a]) + U_t x[t,a],    phi(h[0,a]) = 0
        W_ij ~ N(0, recurrent_std^2 / N),  U_ik ~ N(0, input_std^2 / D),  v_i ~ N(0, readout_std^2)

    and for the two scalings::

        "mean_field":  f = (1/N) v . phi(h),       y = f + N(0, noise / N)     features are learned
        "standard":    f = (1/sqrt N) v . phi(h),  y = f + N(0, noise)         lazy: NNGP as N grows

    Parameters
    ----------
    width
        N, number of units per step.
    activation
        "linear", "erf" (phi(x) = erf(sqrt(pi)/2 x)), "tanh", "relu", or a callable.
    sharing
        "tied" (RNN), "untied" (DNN), a list of T labels used for all weights, or a `Sharing`.
    input_std, recurrent_std, readout_std
        Prior scales, in the units above; independent of width.
    noise
        kappa, the temperature: variance of the observation noise in the units above.
    scaling
        "mean_field" or "standard".

    Raises
    ------
    InputError
        For a scale that is not a finite positive number, an unknown activation, sharing or scaling.
    """

    width: int
    activation: str | Callable[[jax.Array], jax.Array] = "erf"
    sharing: Pattern | Sharing = "tied"
    input_std: float = 1.0
    recurrent_std: float = 1.0
    readout_std: float = 1.0
    noise: float = 0.1
    scaling: Scaling = "mean_field"
    phi: Activation = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "width", positive_integer("width", self.width))
        set_(self, "phi", resolve(self.activation))
        for name in ("input_std", "recurrent_std", "readout_std", "noise"):
            set_(self, name, positive(name, getattr(self, name)))
        if self.scaling not in ("mean_field", "standard"):
            raise InputError("scaling", "'mean_field' or 'standard'", repr(self.scaling))
        if not isinstance(self.sharing, Sharing):
            set_(self, "sharing", _checked_pattern("sharing", self.sharing))

    def labels(self, steps: int) -> StepLabels:
        """Which weights act at which of ``steps`` steps."""
        if isinstance(self.sharing, Sharing):
            return self.sharing.labels(steps)
        labels = _expand("sharing", self.sharing, steps)
        return Sharing(labels, labels, labels).labels(steps)

    def describe(self) -> dict[str, object]:
        """Settings as plain JSON values, enough to recognise the network again."""
        sharing = self.sharing
        plain = vars(sharing) if isinstance(sharing, Sharing) else sharing
        names = ("width", "input_std", "recurrent_std", "readout_std", "noise", "scaling")
        return {
            **{name: getattr(self, name) for name in names},
            "activation": self.phi.name,
            "sharing": plain,
        }


def check_problem(network: object, task: object) -> None:
    """Refuse anything but a `Network` and a `Task` whose numbers of steps fit."""
    steps = instance("task", task, Task).shape[0]
    instance("network", network, Network).labels(steps)


def _checked_pattern(argument: str, pattern: object) -> Pattern:
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
