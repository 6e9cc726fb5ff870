"""The package's own errors: every refusal names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

T = TypeVar("T")

# Squares of larger numbers, over squares of the inverse, leave the range of float64.
LARGEST = 1e50


class BayesKernelError(Exception):
    """Base class of all errors that bayeskernel raises deliberately."""


class InputError(BayesKernelError, ValueError):
    """An argument cannot be used.

    Parameters
    ----------
    argument
        Name of the offending argument as the caller wrote it.
    expected, got
        What would have been accepted, and what was passed.
    """

    def __init__(self, argument: str, expected: str, got: object) -> None:
        self.argument, self.expected, self.got = argument, expected, got
        super().__init__(f"{argument}: expected {expected}, got {got}")

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, object]]:
        return type(self), (self.argument, self.expected, self.got)


def instance(argument: str, value: object, kind: type[T]) -> T:
    """Return ``value`` if it is an instance of ``kind``, else refuse it."""
    if not isinstance(value, kind):
        raise InputError(argument, f"a {kind.__name__}", f"{type(value).__name__}: {value!r:.80}")
    return value


def mapping(argument: str, value: object) -> dict[str, Any]:
    """Return a mapping with names for keys as a dict, else refuse it."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise InputError(argument, "a mapping of names", repr(value))
    return dict(value)


def positive(argument: str, value: object) -> float:
    """Return ``value`` as a float if it is a finite positive number, else refuse it."""
    if not _is_real(value):
        raise InputError(argument, "a positive number", repr(value))
    number = float(value)  # type: ignore[arg-type]
    if not (math.isfinite(number) and number > 0):
        raise InputError(argument, "a finite number > 0", repr(value))
    if not 1 / LARGEST <= number <= LARGEST:
        raise InputError(argument, f"a number from {1 / LARGEST:g} to {LARGEST:g}", repr(value))
    return number


def positive_integer(argument: str, value: object, minimum: int = 1) -> int:
    """Return ``value`` as an int if it is a whole number >= ``minimum``, else refuse it."""
    number = _whole(value)
    if number is None or number < minimum:
        raise InputError(argument, f"an integer >= {minimum}", repr(value))
    return number


def integers(argument: str, value: object, expected: str) -> list[int]:
    """Return a sequence of whole numbers as a list, else refuse it."""
    if not isinstance(value, (str, bytes, Mapping, Set)):
        try:
            found = [_whole(v) for v in value]  # type: ignore[attr-defined]
        except TypeError:  # not iterable; arrays of no dimension have the method all the same
            found = [None]
        if None not in found:
            return found  # type: ignore[return-value]
    raise InputError(argument, expected, repr(value))


def real_array(
    argument: str, value: ArrayLike, ndims: Sequence[int], shape: str
) -> NDArray[np.float64]:
    """Return a copy of ``value`` in float64 if it has one of the numbers of dimensions, else refuse it."""
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "iuf":
            raise TypeError
    except (TypeError, ValueError):
        got = getattr(value, "dtype", type(value).__name__)
        raise InputError(argument, f"real numbers of shape {shape}", str(got)) from None
    if array.ndim not in ndims:
        raise InputError(argument, f"shape {shape}", f"shape {array.shape}")
    return np.array(array, np.float64)


def _whole(value: object) -> int | None:
    """The integer that a number is, None if it is not one."""
    if not _is_real(value) or not float(value).is_integer():  # type: ignore[arg-type]
        return None
    # Python's integers may exceed what a float holds exactly.
    return value if isinstance(value, int) else int(float(value))  # type: ignore[arg-type]


def _is_real(value: object) -> bool:
    # NumPy and JAX scalars convert; strings and booleans do too, but are never meant as numbers here.
    if isinstance(value, (bool, str, bytes)) or getattr(value, "ndim", 0) != 0:
        return False
    if hasattr(value, "dtype") and getattr(value.dtype, "kind", "O") not in "iuf":
        return False
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False
    return True
