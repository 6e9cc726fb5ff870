"""Which tasks do animals do in experiments? Trials of epochs: fixation, stimulus, delay, response.

Every condition of a task is a pattern; with ``noise`` each is repeated ``trials`` times, pattern
``condition * trials + trial``. Targets are 0 during fixation, the answer during the response and unsupervised (NaN)
between, so that the network is free to choose how it remembers. The delay has the steps that the other epochs
leave: more ``steps`` require a longer memory. No two patterns may have identical inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product

import jax
import numpy as np
from numpy.typing import ArrayLike

from bayeskernel.errors import InputError, positive_integer, real_array
from bayeskernel.tasks.epochs import all_different, cued, epochs, generator, made, noise_at
from bayeskernel.tasks.task import Floats, Task, check_size


def decision(
    coherences: ArrayLike = (0.064, 0.128, 0.256, 0.512),
    steps: int = 8,
    *,
    fixation: int = 1,
    stimulus: int = 3,
    response: int = 2,
    noise: float = 0.0,
    trials: int = 1,
    rng_key: jax.Array | None = None,
) -> Task:
    """Which way do the dots move? Two-alternative perceptual decision, answered after a delay.

    Random-dot motion of Britten et al. (1992), with the coherences of Roitman and Shadlen (2002) without 0 and
    3.2 %; evidence for both directions enters as in the model of Wong and Wang (2006).

    Parameters
    ----------
    coherences
        Shares of dots that move together, in (0, 1], shape (n,). Each comes in both directions: conditions are
        the n coherences to the right, then the n to the left.
    steps
        T. The delay takes what fixation, stimulus and response leave.
    fixation, stimulus, response
        Steps of these epochs.
    noise
        Standard deviation of normal noise, independent for every trial, on the evidence at each step of the
        stimulus.
    trials
        Trials of each condition.
    rng_key
        JAX key that fixes the noise; only with ``noise``.

    Returns
    -------
    A task with P = 2 n trials and D = 3: fixation cue (1 until the response), evidence for right and for left,
    (1 + c) / 2 and (1 - c) / 2. O = 1: +1 for right and -1 for left.

    Raises
    ------
    InputError
        For epochs that do not fit into ``steps``, two patterns with identical inputs, or a task that does not
        fit into memory.
    """
    levels = _coherences(coherences)
    trials = positive_integer("trials", trials)
    steps, at = epochs(steps, fixation=fixation, stimulus=stimulus, delay=None, response=response)
    check_size(steps=steps, patterns=2 * levels.size * trials, input_dim=3)
    signed = np.concatenate([levels, -levels])
    inputs = cued(steps, signed.size, 3, at)
    inputs[at["stimulus"], :, 1:] = np.stack([1 + signed, 1 - signed], axis=-1) / 2
    noisy = noise_at(inputs, at["stimulus"], 1)
    return made("decision", inputs, np.sign(signed), at, noisy, noise, trials, rng_key)


def match_to_sample(
    stimuli: int = 4,
    steps: int = 8,
    *,
    fixation: int = 1,
    sample: int = 2,
    test: int = 1,
    response: int = 2,
    noise: float = 0.0,
    trials: int = 1,
    rng_key: jax.Array | None = None,
) -> Task:
    """Is the test the sample seen before the delay? Delayed match to sample, as in Miller et al. (1996).

    Every stimulus is the sample of one match and of one non-match, whose test is the next stimulus: neither sample
    nor test alone predicts the answer.

    Parameters
    ----------
    stimuli
        Number n of stimuli, at least 2, one input channel each.
    steps
        T. The delay, between sample and test, takes what the other epochs leave.
    fixation, sample, test, response
        Steps of these epochs.
    noise, trials, rng_key
        As in `decision`, on the stimulus channels while sample and test are shown.

    Returns
    -------
    A task with P = 2 n trials (matches first) and D = 1 + n: fixation cue, then one channel for each stimulus.
    O = 1: +1 for a match, -1 for a non-match.

    Raises
    ------
    InputError
        As `decision`.
    """
    stimuli = positive_integer("stimuli", stimuli, minimum=2)
    trials = positive_integer("trials", trials)
    steps, at = epochs(
        steps, fixation=fixation, sample=sample, delay=None, test=test, response=response
    )
    check_size(steps=steps, patterns=2 * stimuli * trials, input_dim=1 + stimuli)
    inputs = cued(steps, 2 * stimuli, 1 + stimuli, at)
    shown = np.eye(stimuli)
    inputs[at["sample"], :, 1:] = np.concatenate([shown, shown])
    inputs[at["test"], :, 1:] = np.concatenate([shown, np.roll(shown, -1, axis=0)])
    noisy = noise_at(inputs, at["sample"], 1) | noise_at(inputs, at["test"], 1)
    answers = np.repeat([1.0, -1.0], stimuli)
    return made("match to sample", inputs, answers, at, noisy, noise, trials, rng_key)


def context_decision(
    coherences: ArrayLike = (0.5,),
    steps: int = 8,
    *,
    fixation: int = 1,
    stimulus: int = 3,
    response: int = 2,
    noise: float = 0.0,
    trials: int = 1,
    rng_key: jax.Array | None = None,
) -> Task:
    """Motion or colour, depending on the context? Context-dependent decision, as in Mante et al. (2013).

    Parameters
    ----------
    coherences
        Strengths of motion and of colour, in (0, 1], shape (n,); each comes with both signs, in every
        combination.
    steps
        T. The delay takes what fixation, stimulus and response leave.
    fixation, stimulus, response
        Steps of these epochs.
    noise, trials, rng_key
        As in `decision`, on motion and colour.

    Returns
    -------
    A task with P = 2 (2 n)^2 trials, ordered by context, motion, colour, and D = 5: fixation cue; the contexts
    motion and colour, one of them 1 until the response; signed motion and colour during the stimulus. O = 1:
    the sign of the one that the context names.

    Raises
    ------
    InputError
        As `decision`.
    """
    levels = _coherences(coherences)
    trials = positive_integer("trials", trials)
    steps, at = epochs(steps, fixation=fixation, stimulus=stimulus, delay=None, response=response)
    check_size(steps=steps, patterns=8 * levels.size**2 * trials, input_dim=5)
    signed = np.concatenate([levels, -levels])
    conditions = np.array([*product((0, 1), signed, signed)])
    context, evidence = conditions[:, 0].astype(int), conditions[:, 1:]
    inputs = cued(steps, len(conditions), 5, at)
    inputs[: at["response"].start, :, 1:3] = np.eye(2)[context]
    inputs[at["stimulus"], :, 3:] = evidence
    answers = np.sign(evidence[np.arange(len(evidence)), context])
    noisy = noise_at(inputs, at["stimulus"], 3)
    return made("context decision", inputs, answers, at, noisy, noise, trials, rng_key)


def integration(
    pulses: int = 3,
    steps: int = 8,
    *,
    fixation: int = 1,
    response: int = 2,
    noise: float = 0.0,
    trials: int = 1,
    rng_key: jax.Array | None = None,
) -> Task:
    """How many more pulses on the right than on the left? Integration of discrete evidence.

    Pulses as in Brunton et al. (2013), here one a step; the sum is to be held as by the integrator of Seung
    (1996).

    Parameters
    ----------
    pulses
        Number n of pulses, one at each step after fixation, right or left in every combination.
    steps
        T. The delay takes what fixation, pulses and response leave.
    fixation, response
        Steps of these epochs.
    noise, trials, rng_key
        As in `decision`, on both sides while there are pulses.

    Returns
    -------
    A task with P = 2^n trials and D = 3: fixation cue, pulses on the right, pulses on the left. O = 1: right
    minus left, over sqrt(n), so that its mean square over patterns is 1.

    Raises
    ------
    InputError
        As `decision`.
    """
    pulses, trials = positive_integer("pulses", pulses), positive_integer("trials", trials)
    steps, at = epochs(steps, fixation=fixation, pulses=pulses, delay=None, response=response)
    # Capped, as 2^n of a large n is itself too large to write down.
    check_size(steps=steps, patterns=2 ** min(pulses, 64) * trials, input_dim=3)
    sides = _signs(pulses)
    inputs = cued(steps, len(sides), 3, at)
    inputs[at["pulses"], :, 1:] = np.stack([sides.T > 0, sides.T < 0], axis=-1)
    answers = sides.sum(axis=1) / np.sqrt(pulses)
    noisy = noise_at(inputs, at["pulses"], 1)
    return made("integration", inputs, answers, at, noisy, noise, trials, rng_key)


def flip_flop(
    bits: int = 3,
    steps: int = 8,
    *,
    spacing: int = 2,
    trials: int = 1,
    rng_key: jax.Array | None = None,
) -> Task:
    """What was the last pulse of each channel? The flip-flop of Sussillo and Barak (2013).

    At step 1 a pulse of +1 or -1 in every channel sets all bits. From then on one channel gets a pulse every
    ``spacing`` steps: without a key channels take turns, and each pulse flips its bit; with a key channel and
    sign are random, and a pulse of the sign already held changes nothing.

    Parameters
    ----------
    bits
        Number of bits B, one input and one output channel each.
    steps
        T.
    spacing
        Steps from one pulse to the next.
    trials
        Random sequences for each initial state, all different; only with a key.
    rng_key
        JAX key that fixes the random pulses.

    Returns
    -------
    A task with P = 2^B trials, ordered by initial state, and D = O = B. Targets are the bits, ±1, at all steps.

    Raises
    ------
    InputError
        For more trials than there are sequences of pulses, or a task that does not fit into memory.
    """
    bits, steps = positive_integer("bits", bits), positive_integer("steps", steps)
    spacing, trials = positive_integer("spacing", spacing), positive_integer("trials", trials)
    check_size(steps=steps, patterns=2 ** min(bits, 64) * trials, bits=bits)
    starts = np.repeat(_signs(bits), trials, axis=0)
    inputs = np.zeros((steps, *starts.shape))
    inputs[0] = starts
    times, patterns = np.arange(spacing, steps, spacing), np.arange(len(starts))
    if rng_key is None:
        for turn, t in enumerate(times.tolist()):
            bit, flips_before = turn % bits, turn // bits
            inputs[t, :, bit] = starts[:, bit] * (-1) ** (flips_before + 1)
    else:
        pulses = _random_pulses(rng_key, len(starts) // trials, trials, times.size, bits)
        for t, pulse in zip(times.tolist(), pulses.T, strict=True):
            inputs[t, patterns, pulse // 2] = 1.0 - 2.0 * (pulse % 2)
    states = inputs.copy()
    for t in range(1, steps):
        states[t] = np.where(inputs[t] == 0, states[t - 1], inputs[t])
    return all_different(Task(inputs, states, "flip-flop"))


# Trials by name, for the command line and the files of sweeps.
TRIALS: Mapping[str, Callable[..., Task]] = {
    make.__name__: make
    for make in (decision, match_to_sample, context_decision, integration, flip_flop)
}


def _coherences(coherences: ArrayLike) -> Floats:
    levels = real_array("coherences", coherences, (1,), "(n,)")
    if not levels.size or not np.all((levels > 0) & (levels <= 1)):
        raise InputError("coherences", "one or more numbers in (0, 1]", repr(coherences))
    return levels


def _signs(count: int) -> Floats:
    """All combinations of ``count`` signs, shape (2^count, count), those with + first before others."""
    minus = np.arange(2**count)[:, None] >> np.arange(count)[::-1] & 1
    return np.where(minus, -1.0, 1.0)


def _random_pulses(
    rng_key: jax.Array, states: int, trials: int, count: int, bits: int
) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Different sequences for each state, as 2 channel + (sign < 0), shape (states trials, count)."""
    draw = generator(rng_key)
    if trials > (2 * bits) ** count:
        raise InputError(
            "trials", f"at most {(2 * bits) ** count}, the sequences of {count} pulses", trials
        )
    sequences = list[tuple[int, ...]]()
    for _ in range(states):
        different = dict[tuple[int, ...], None]()  # keeps its order, unlike a set
        while len(different) < trials:
            different[tuple(draw.integers(2 * bits, size=count).tolist())] = None
        sequences += different
    return np.array(sequences, np.int64).reshape(states * trials, count)
