"""What do many sweeps of moving particles at one point say, and how well is it known?"""

from __future__ import annotations

import jax
import numpy as np
from numpy.typing import NDArray

from bayeskernel.meanfield.laws import Averages
from bayeskernel.problem import Floats


class MeanTarget:
    """Mean of the points (C, Ct) that batches of sweeps ask for, and of their averages.

    The standard error of C is from the scatter of batches. They are merged two by two, and for each entry the length that gives
    the largest error counts: slow modes hide in short ones, and of few long ones some entries agree by chance.

    Attributes
    ----------
    C, Ct, error
        Means, and the error of that of C; shape (d, d).
    averages
        Mean moments of all groups.
    """

    def __init__(self, size: int) -> None:
        self._C = list[NDArray[np.float32]]()
        self._sum = np.zeros((2, size, size))
        self.error = np.full((size, size), np.inf)
        self.averages: tuple[Averages, ...] = ()

    def add(self, C: Floats, Ct: Floats, averages: tuple[Averages, ...]) -> None:
        """One more batch."""
        self._C.append(C.astype(np.float32))
        self._sum += np.array([C, Ct])
        self.error = error_of_mean(np.array(self._C))
        self.averages = blended(self.averages, averages, 1 / len(self._C))
        self.C, self.Ct = self._sum / len(self._C)

    @property
    def relative_error(self) -> float:
        """Of the kernel as a whole, in Frobenius norm."""
        return float(np.linalg.norm(self.error) / np.linalg.norm(self.C))


def blended(
    old: tuple[Averages, ...], new: tuple[Averages, ...], share: float
) -> tuple[Averages, ...]:
    """Averages of all groups with a share of new ones taken in; the new ones where there are no old."""
    return jax.tree.map(lambda a, b: a + share * (b - a), old or new, new)


def error_of_mean(batches: NDArray[np.float32]) -> Floats:
    """Largest standard error of each entry of the mean that batches of some length give; (b, d, d) -> (d, d)."""
    values: NDArray[np.floating] = batches
    errors = list[Floats]()
    while len(values) >= 3:
        errors.append(values.std(0, ddof=1, dtype=np.float64) / np.sqrt(len(values)))
        odd = len(values) % 2
        values = (values[odd::2] + values[odd + 1 :: 2]) / 2
    return np.max(errors, axis=0) if errors else np.full(values.shape[1:], np.inf)
