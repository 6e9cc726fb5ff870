"""How is a trial put together from its epochs?"""

from __future__ import annotations

import jax
import numpy as np
from numpy.typing import NDArray

from bayeskernel.errors import InputError, positive, positive_integer
from bayeskernel.keys import check_key
from bayeskernel.tasks.task import Floats, Task


def epochs(steps: object, **lengths: object) -> tuple[int, dict[str, slice]]:
    """T and the steps of every epoch; the delay, None, has those that the others leave."""
    steps = positive_integer("steps", steps)
    known = {
        name: positive_integer(name, length, minimum=0 if name == "fixation" else 1)
        for name, length in lengths.items()
        if name != "delay"
    }
    left = steps - sum(known.values())
    if left < 0:
        raise InputError(
            "steps", f"at least {steps - left}, the steps of {', '.join(known)}", steps
        )
    at, start = dict[str, slice](), 0
    for name in lengths:
        at[name] = slice(start, start := start + known.get(name, left))
    return steps, at


def cued(steps: int, conditions: int, input_dim: int, at: dict[str, slice]) -> Floats:
    """Inputs with nothing but the fixation cue, in the first channel until the response."""
    inputs = np.zeros((steps, conditions, input_dim))
    inputs[: at["response"].start, :, 0] = 1
    return inputs


def noise_at(inputs: Floats, epoch: slice, first_channel: int) -> NDArray[np.bool_]:
    """True at steps and channels, shape (T, 1, D), with noise: the epoch, from a channel on."""
    noisy = np.zeros((len(inputs), 1, inputs.shape[2]), bool)
    noisy[epoch, :, first_channel:] = True
    return noisy


def made(
    name: str,
    inputs: Floats,
    answers: Floats,
    at: dict[str, slice],
    noisy: NDArray[np.bool_],
    noise: float,
    trials: int,
    rng_key: jax.Array | None,
) -> Task:
    """Conditions of inputs (T, conditions, D) and answers (conditions,), repeated with noise."""
    inputs = np.repeat(inputs, trials, axis=1)
    targets = np.full((*inputs.shape[:2], 1), np.nan)
    targets[at["fixation"]] = 0
    targets[at["response"]] = np.repeat(answers, trials)[:, None]
    if isinstance(noise, (int, float)) and not isinstance(noise, bool) and noise == 0:
        if rng_key is not None:
            raise InputError("rng_key", "None without noise", repr(rng_key))
    else:
        normal = generator(rng_key).standard_normal(inputs.shape)
        inputs = inputs + positive("noise", noise) * noisy * normal
    return all_different(Task(inputs, targets, name))


def all_different(task: Task) -> Task:
    """Refuse a task two of whose patterns have the same inputs: nothing tells them apart."""
    first = dict[bytes, int]()
    for a in range(task.shape[1]):
        pattern = (task.inputs[:, a] + 0.0).tobytes()  # -0 becomes 0
        if pattern in first:
            raise InputError(
                "inputs",
                "no two patterns alike (conditions repeat only with noise or random pulses)",
                f"the same inputs in patterns {first[pattern]} and {a}",
            )
        first[pattern] = a
    return task


def generator(rng_key: object) -> np.random.Generator:
    """NumPy's generator from a JAX key: the same numbers whatever JAX's settings, none compiled."""
    return np.random.default_rng(np.asarray(jax.random.key_data(check_key(rng_key))))
