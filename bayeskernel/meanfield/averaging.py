"""What do many sweeps of moving particles say together, and how well is it known?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bayeskernel.meanfield.laws import Averages
from bayeskernel.meanfield.saddle import Point, Saddle

Floats = NDArray[np.float64]

# Sweeps of a batch, whose scatter tells the error.
_BATCH = 8


class MeanPoint:
    """Mean of the points (C, Ct) of many sweeps and of their laws, and the standard error of the mean C, from batches.

    Batches are merged two by two, and the length that gives the largest error counts: slow modes hide in short ones.

    Attributes
    ----------
    error
        Of C, shape (d, d).
    averages
        Mean moments of all groups.
    saddle, last
        Of the finished mean: F around it, and the point that goes on.
    """

    saddle: Saddle
    last: Point

    def __init__(self, size: int) -> None:
        self._count = 0
        self._C, self._Ct, self._batch = np.zeros((3, size, size))
        self._batches = list[NDArray[np.float32]]()
        self.error = np.full((size, size), np.inf)
        self.averages: tuple[Averages, ...] = ()

    def add(self, C: Floats, Ct: Floats, averages: tuple[Averages, ...]) -> None:
        """One more sweep."""
        self._count += 1
        self._C += C
        self._Ct += Ct
        self._batch += C / _BATCH
        if self._count % _BATCH == 0:
            self._batches.append(self._batch.astype(np.float32))
            self._batch[:] = 0.0
            self.error = _error_of_mean(self._batches)
        self.averages = blended(self.averages, averages, 1 / self._count)

    @property
    def C(self) -> Floats:
        """Mean C."""
        return np.asarray(self._C / self._count)

    @property
    def Ct(self) -> Floats:
        """Mean Ct."""
        return np.asarray(self._Ct / self._count)

    @property
    def relative_error(self) -> float:
        """Of the kernel as a whole, in Frobenius norm."""
        return float(np.linalg.norm(self.error) / np.linalg.norm(self.C))


def blended(
    old: tuple[Averages, ...], new: tuple[Averages, ...], share: float
) -> tuple[Averages, ...]:
    """Averages of all groups with a share of new ones taken in; the new ones where there are no old."""
    return tuple(own.blended(other, share) for own, other in zip(old or new, new, strict=True))


def _error_of_mean(batches: Sequence[NDArray[np.float32]]) -> Floats:
    """Largest standard error of the mean that batches of some length give, (d, d)."""
    values: NDArray[np.floating] = np.array(batches)
    errors = list[Floats]()
    while len(values) >= 3:
        errors.append(values.std(0, ddof=1, dtype=np.float64) / np.sqrt(len(values)))
        odd = len(values) % 2
        values = (values[odd::2] + values[odd + 1 :: 2]) / 2
    return max(errors, key=np.linalg.norm, default=np.full(values.shape[1:], np.inf))
