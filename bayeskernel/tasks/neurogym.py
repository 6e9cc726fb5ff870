"""How do trials of neurogym become a task? By the interface of its `Dataset`; the package is not needed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bayeskernel.errors import InputError, real_array
from bayeskernel.tasks.task import Floats, Task, check_size

_LAYOUT = (
    "a neurogym Dataset that gives observations (seq_len, batch, obs) and actions (seq_len, batch), "
    "whole numbers from 0 on, both batch first if its batch_first is True"
)


def from_neurogym(dataset: Any, *, mask_fixation: bool = False) -> Task:
    """One batch of a neurogym dataset as a task: sequences are patterns, actions become one-hot.

    Parameters
    ----------
    dataset
        A ``neurogym.Dataset`` of an environment with discrete actions, or anything that is called in the same way:
        without arguments, it returns a pair of arrays, observations (seq_len, batch, obs) and actions (seq_len,
        batch), with the batch first if ``dataset.batch_first``. If it has ``seq_len`` and ``batch_size``, arrays have
        to agree with them. Every call draws a new batch; seed the dataset to draw the same again.
    mask_fixation
        Leave steps whose action is 0, fixation in neurogym, unsupervised.

    Returns
    -------
    A task with T = seq_len, P = batch, D = obs. Targets are centred one-hot: O is the number n of actions
    (``dataset.env.action_space.n`` if there, else the largest action met plus one), and the target is 1 - 1/n for
    the action taken, -1/n for the others. Sequences that neurogym repeats stay repeated.

    Raises
    ------
    InputError
        For any other layout, and for what `Task` refuses.
    """
    if not isinstance(mask_fixation, bool):
        raise InputError("mask_fixation", "True or False", repr(mask_fixation))
    if not callable(dataset):
        raise InputError("dataset", _LAYOUT, f"{type(dataset).__name__}, which cannot be called")
    try:
        observations, actions = dataset()
    except (TypeError, ValueError, StopIteration) as error:
        raise InputError("dataset", _LAYOUT, f"{type(error).__name__}: {error}") from error
    inputs = real_array("dataset", observations, (3,), f"(seq_len, batch, obs), as {_LAYOUT} has")
    actions = _whole_numbers(actions, inputs.shape)
    if getattr(dataset, "batch_first", False):
        inputs, actions = inputs.swapaxes(0, 1), actions.T
    stated = [getattr(dataset, name, None) for name in ("seq_len", "batch_size")]
    found = list(actions.shape)
    if any(size is not None and size != length for size, length in zip(stated, found, strict=True)):
        raise InputError(
            "dataset",
            _LAYOUT,
            f"seq_len, batch = {found} in the arrays, {stated} in the dataset",
        )
    return Task(inputs, _one_hot(dataset, actions, mask_fixation), "neurogym")


def _whole_numbers(actions: Any, sites: tuple[int, ...]) -> NDArray[np.int64]:
    numbers = real_array("dataset", actions, (2,), f"(seq_len, batch), as {_LAYOUT} has")
    if numbers.shape != sites[:2]:
        raise InputError(
            "dataset", _LAYOUT, f"observations of shape {sites}, actions of shape {numbers.shape}"
        )
    counted = (numbers >= 0) & (numbers < 1e9) & (numbers == np.floor(numbers))
    if not np.all(counted):
        raise InputError("dataset", _LAYOUT, f"the action {numbers[~counted][0]:g}")
    return numbers.astype(np.int64)


def _one_hot(dataset: Any, actions: NDArray[np.int64], mask_fixation: bool) -> Floats:
    largest = int(np.max(actions, initial=0))
    space = getattr(getattr(dataset, "env", None), "action_space", None)
    count = int(getattr(space, "n", largest + 1))
    if largest >= count:
        raise InputError("dataset", _LAYOUT, f"the action {largest} of {count} actions")
    check_size(steps=len(actions), patterns=actions.shape[1], actions=count)
    targets = np.where(actions[..., None] == np.arange(count), 1.0, 0.0) - 1 / count
    if mask_fixation:
        targets[actions == 0] = np.nan
    return targets
