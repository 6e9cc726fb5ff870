"""How good are predictions for patterns that were held out? Accuracy and squared error, with standard errors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

from bayeskernel.errors import InputError, instance, real_array
from bayeskernel.inference.convergence import mean_and_error
from bayeskernel.meanfield.predict import Prediction
from bayeskernel.problem import Floats
from bayeskernel.tasks import Task


class HeldOut(NamedTuple):
    """How good predictions are, on average over patterns.

    Attributes
    ----------
    accuracy
        Share of right decisions, 0 to 1: the sign of one output, the largest of several. Ties count as guesses.
        Targets of zero are not scored, nor are steps where only some of several outputs have a target or where no
        target is largest; NaN if nothing is scored.
    accuracy_error
        Its standard error, from the scatter over patterns and, where there are draws, over draws.
    mse
        Mean of (f - y)^2 over supervised outputs.
    mse_error
        Its standard error, likewise.
    patterns
        Number of patterns P*.
    """

    accuracy: float
    accuracy_error: float
    mse: float
    mse_error: float
    patterns: int

    def __str__(self) -> str:
        return (
            f"accuracy {100 * self.accuracy:.1f} ± {100 * self.accuracy_error:.1f} %, "
            f"squared error {self.mse:.3g} ± {self.mse_error:.2g} ({self.patterns} patterns)"
        )


def held_out(outputs: Prediction | xr.Dataset | ArrayLike, task: Task) -> HeldOut:
    """Score predicted outputs against the targets of patterns that were held out.

    Parameters
    ----------
    outputs
        For ``task.inputs``: a prediction of `MeanField.predict` or `nngp`; draws of `bayeskernel.predict`; or outputs of
        anything else, shape (T, P*, O), or (networks, T, P*, O) of independent networks. Draws and networks are
        scored one by one and the scores averaged, which rates a single network; to rate the ensemble, average its
        outputs first.
    task
        The held-out patterns with their targets, scaled as in training.

    Raises
    ------
    InputError
        For outputs of another shape than the targets, or that are not finite.
    """
    targets = instance("task", task, Task).targets
    values = _outputs(outputs, targets.shape)
    right, wrong = _right(values, targets), (values - targets) ** 2
    return HeldOut(*_average(right), *_average(wrong), targets.shape[1])


def _outputs(outputs: Prediction | xr.Dataset | ArrayLike, shape: tuple[int, ...]) -> Floats:
    """Outputs (chain, draw, T, P*, O); what has no chains is independent."""
    given = outputs
    if isinstance(outputs, Prediction):
        given = outputs.mean
    elif isinstance(outputs, xr.Dataset):
        if "output" not in outputs:
            raise InputError("outputs", "a Dataset with output, from bayeskernel.predict", outputs)
        given = outputs["output"].to_numpy()
    expected = "(T, P*, O) = {}, {}, {}, after axes of networks or of chains and draws".format(
        *shape
    )
    array = real_array("outputs", given, (3, 4, 5), expected)
    if array.shape[-3:] != shape:
        raise InputError("outputs", f"shape {expected}", f"shape {array.shape}")
    if not np.all(np.isfinite(array)):
        raise InputError("outputs", "finite numbers", "some that are not")
    if array.ndim == 4:
        array = array[:, None]
    return array if array.ndim == 5 else array[None, None]


def _right(outputs: Floats, targets: Floats) -> Floats:
    """How right every decision is, 0 to 1, NaN where none is asked for: (chain, draw, T, P*, 1)."""
    if targets.shape[-1] == 1:
        asked, right = np.abs(targets) > 0, (1 + np.sign(outputs * targets)) / 2
    else:
        # NaN is no largest target.
        best = targets == targets.max(-1, keepdims=True)
        largest = outputs == outputs.max(-1, keepdims=True)
        asked = best.sum(-1, keepdims=True) == 1
        right = (largest & best).sum(-1, keepdims=True) / largest.sum(-1, keepdims=True)
    return np.where(asked, right, np.nan)


def _average(values: Floats) -> tuple[float, float]:
    """Mean over patterns, draws and what is asked of each pattern, and its standard error; (chain, draw, T, P*, O)."""
    counted = ~np.isnan(values[0, 0]).all((0, 2))
    if not counted.any():
        return np.nan, np.nan
    of_pattern = np.nanmean(values[:, :, :, counted], axis=(2, 4))
    mean, error, _ = mean_and_error(of_pattern.mean(-1))
    if of_pattern[..., 0].size == 1:
        error = np.zeros(())
    count = int(counted.sum())
    scatter = of_pattern.mean((0, 1)).std(ddof=1) / np.sqrt(count) if count > 1 else np.nan
    return float(mean), float(np.hypot(error, scatter))
