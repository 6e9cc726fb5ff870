"""What is a task? Arrays of inputs and targets that fit each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayeskernel.errors import LARGEST, InputError, positive, real_array

Floats: TypeAlias = NDArray[np.float64]

# Bytes of one array of a task; NumPy makes a few copies on the way.
_MOST_BYTES = 8 * 10**8


@dataclass(frozen=True, eq=False, repr=False)
class Task:
    """Input sequences with targets at the supervised steps.

    Parameters
    ----------
    inputs
        Shape (T, P, D), finite.
    targets
        Shape (T, P, O), or (T, P) for one output. NaN marks an unsupervised entry; at least one
        entry must be supervised. Whole numbers are taken as the values to regress on.
    name
        Shown in reports.

    Notes
    -----
    Duplicate patterns are allowed: their units are then equal, the kernel is singular, and theory
    and samplers work on its range.

    Raises
    ------
    InputError
        For a wrong number of dimensions, shapes that do not match, inputs that are not finite,
        infinite targets, booleans or complex numbers, or no supervised entry.
    """

    inputs: Floats
    targets: Floats
    name: str = "task"

    def __repr__(self) -> str:
        steps, patterns, features, outputs = self.shape
        sizes = f"T = {steps}, P = {patterns}, D = {features}, O = {outputs}"
        asked = f"{np.count_nonzero(self.supervised)} supervised targets"
        return f"Task({self.name!r}, {sizes}, {asked})"

    def __post_init__(self) -> None:
        inputs = real_array("inputs", self.inputs, (3,), "(T, P, D)")
        targets = real_array("targets", self.targets, (2, 3), "(T, P) or (T, P, O)")
        if targets.ndim == 2:
            targets = targets[..., None]
        if targets.shape[:2] != inputs.shape[:2]:
            raise InputError(
                "targets",
                f"leading shape (T, P) = {inputs.shape[:2]} as in inputs",
                f"shape {np.shape(self.targets)}",
            )
        if 0 in inputs.shape or 0 in targets.shape:
            raise InputError("inputs, targets", "no empty axis", f"{inputs.shape}, {targets.shape}")
        if not np.all(np.isfinite(inputs)):
            raise InputError("inputs", "finite numbers", _first_bad("inputs", inputs))
        if np.any(np.isinf(targets)):
            raise InputError("targets", "finite numbers or NaN (= unsupervised)", "an infinity")
        for name, array in (("inputs", inputs), ("targets", targets)):
            if np.nanmax(np.abs(array), initial=0.0) > LARGEST:
                raise InputError(
                    name, f"numbers up to {LARGEST:g}", f"{np.nanmax(np.abs(array)):g}"
                )
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if np.all(np.isnan(targets)):
            raise InputError("targets", "at least one supervised (non-NaN) entry", "only NaN")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(T, P, D, O): steps, patterns, input features, outputs."""
        return (*self.inputs.shape, self.targets.shape[2])

    @property
    def supervised(self) -> NDArray[np.bool_]:
        """True where a target is given, shape (T, P, O)."""
        return ~np.isnan(self.targets)

    def scaled(self, signal: float) -> Task:
        """Return the same task with all targets multiplied by ``signal`` (0 gives the prior)."""
        factor = 0.0 if signal == 0 else positive("signal", signal)
        return Task(self.inputs, factor * self.targets, self.name)


def check_size(**counts: int) -> None:
    """Refuse a task that would not fit into memory before any of it is made."""
    size = 8 * math.prod(counts.values())
    if size > _MOST_BYTES:
        product = " * ".join(f"{number:,}" for number in counts.values())
        raise InputError(
            ", ".join(counts),
            f"an array of at most {_MOST_BYTES / 1e9:g} GB",
            f"{product} numbers, which take {-(-size // 10**9):,} GB",
        )


def _first_bad(argument: str, array: Floats) -> str:
    where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
    return f"{array[where]} at {argument}{list(where)}"


def new_patterns(inputs: ArrayLike, task: Task) -> Floats:
    """Inputs of new patterns, (T, P*, D), checked: as many steps and features as the task has."""
    # The constructor of Task checks inputs; targets only have to exist.
    array = real_array("inputs", inputs, (3,), "(T, P*, D)")
    new = Task(array, np.zeros(array.shape[:2]))
    steps, _, features, _ = task.shape
    if (new.shape[0], new.shape[2]) != (steps, features):
        raise InputError("inputs", f"shape ({steps}, P*, {features})", f"shape {array.shape}")
    return new.inputs
