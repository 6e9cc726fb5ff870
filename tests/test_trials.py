"""Trials of an animal in a laboratory, and those of neurogym."""

import jax
import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel.errors import InputError
from bayeskernel.tasks.trials import TRIALS

KEY = jax.random.key(0)
DELAYED = {name: make for name, make in TRIALS.items() if name != "flip_flop"}


@pytest.mark.parametrize("name", TRIALS)
def test_small_by_default_and_all_patterns_differ(name):
    task = TRIALS[name]()
    assert task.shape[:2] == (8, 8)
    assert len({task.inputs[:, a].tobytes() for a in range(8)}) == 8
    assert np.array_equal(task.inputs, TRIALS[name]().inputs)
    assert np.nanmean(task.targets[-1] ** 2) == pytest.approx(1)
    assert np.nanmean(task.targets[-1]) == 0


@pytest.mark.parametrize("name", DELAYED)
def test_more_steps_are_delay(name):
    short, long = DELAYED[name](), DELAYED[name](steps=13)
    kept = [0, 1, 2, 3, 4, 5, 10, 11, 12] if name != "match_to_sample" else [0, 1, 2, 9, 10, 11, 12]
    there = [0, 1, 2, 3, 4, 5, 5, 6, 7] if name != "match_to_sample" else [0, 1, 2, 4, 5, 6, 7]
    assert np.array_equal(long.inputs[kept], short.inputs[there])
    assert np.array_equal(long.targets[kept], short.targets[there], equal_nan=True)
    delay = [t for t in range(13) if t not in kept]
    assert np.isnan(long.targets[delay]).all()
    assert not np.ptp(long.inputs[delay], axis=0).any()


@pytest.mark.parametrize("name", DELAYED)
def test_the_cue_goes_at_the_response_and_fixation_asks_for_nothing(name):
    task = DELAYED[name](steps=9, fixation=2, response=3)
    assert np.array_equal(task.inputs[:, :, 0], [[1.0] * 8] * 6 + [[0.0] * 8] * 3)
    assert not task.inputs[6:].any()
    assert np.array_equal(task.supervised[:, 0, 0], [True] * 2 + [False] * 4 + [True] * 3)
    assert not task.targets[:2].any()


def test_decision_is_the_side_with_more_evidence():
    task = bk.tasks.decision((0.1, 1.0), stimulus=2)
    evidence = task.inputs[1:3, :, 1:]
    assert evidence[0] == pytest.approx(
        np.array([[0.55, 0.45], [1, 0], [0.45, 0.55], [0, 1]]), abs=1e-12
    )
    assert np.array_equal(evidence[0], evidence[1])
    assert np.array_equal(task.targets[-1, :, 0], [1, 1, -1, -1])


def test_match_needs_both_sample_and_test():
    task = bk.tasks.match_to_sample(5)
    sample, test = task.inputs[1, :, 1:].argmax(-1), task.inputs[5, :, 1:].argmax(-1)
    assert np.array_equal(task.inputs[1:3].sum((0, 2)), [4] * 10)
    assert np.array_equal(task.targets[-1, :, 0], np.where(sample == test, 1, -1))
    for stimulus in range(5):
        for shown in (sample, test):
            assert task.targets[-1, shown == stimulus, 0].sum() == 0


def test_context_says_which_evidence_counts():
    task = bk.tasks.context_decision((0.2, 0.7))
    context, evidence = task.inputs[2, :, 1:3], task.inputs[2, :, 3:]
    assert task.shape == (8, 32, 5, 1)
    assert np.array_equal(task.targets[-1, :, 0], np.sign((context * evidence).sum(-1)))
    assert {*np.abs(evidence).ravel()} == {0.2, 0.7}
    # Each context ignores the other's evidence: its answers go with it as often as against it.
    assert ((1 - context) * evidence * task.targets[-1]).sum() == pytest.approx(0)
    assert np.array_equal(task.inputs[5, :, 1:3], context)


def test_integration_counts_pulses():
    task = bk.tasks.integration(4, 10, fixation=2)
    right, left = task.inputs[2:6, :, 1], task.inputs[2:6, :, 2]
    assert task.shape == (10, 16, 3, 1)
    assert np.array_equal(right + left, np.ones((4, 16)))
    assert task.targets[-1, :, 0] == pytest.approx((right - left).sum(0) / 2)
    assert not task.inputs[6:, :, 1:].any()


@pytest.mark.parametrize("arguments", [{}, {"trials": 6, "rng_key": KEY}])
def test_flip_flop_holds_the_last_pulse(arguments):
    task = bk.tasks.flip_flop(2, 9, spacing=3, **arguments)
    last = np.zeros_like(task.targets[0])
    for t in range(9):
        last = np.where(task.inputs[t] != 0, task.inputs[t], last)
        assert np.array_equal(task.targets[t], last)
    count = np.abs(task.inputs).sum(-1)
    assert np.array_equal(count, np.outer([2, 0, 0, 1, 0, 0, 1, 0, 0], np.ones(task.shape[1])))


def test_flip_flop_in_turn_flips():
    task = bk.tasks.flip_flop(2, 7, spacing=1)
    flips = task.targets[1:] != task.targets[:-1]
    assert np.array_equal(flips[:, 0], [[True, False], [False, True]] * 3)
    assert (flips == flips[:, :1]).all()


def test_all_sequences_of_pulses_can_be_asked_for_but_not_one_more():
    task = bk.tasks.flip_flop(1, 7, trials=8, rng_key=KEY)
    assert len({task.inputs[:, a].tobytes() for a in range(16)}) == 16
    with pytest.raises(InputError, match="trials: expected at most 8"):
        bk.tasks.flip_flop(1, 7, trials=9, rng_key=KEY)


NOISY_CHANNELS = {
    "decision": (slice(1, 4), [1, 2]),
    "match_to_sample": ([1, 2, 5], [1, 2, 3, 4]),
    "context_decision": (slice(1, 4), [3, 4]),
    "integration": (slice(1, 4), [1, 2]),
}


@pytest.mark.parametrize("name", DELAYED)
def test_noise_is_on_the_stimulus_alone(name):
    clean, noisy = DELAYED[name](), DELAYED[name](noise=0.3, trials=100, rng_key=KEY)
    assert np.array_equal(noisy.targets, np.repeat(clean.targets, 100, axis=1), equal_nan=True)
    noise = noisy.inputs - np.repeat(clean.inputs, 100, axis=1)
    steps, channels = NOISY_CHANNELS[name]
    there = noise[steps][..., channels].copy()
    # Of n independent normal numbers: the mean square is 0.09 to sqrt(2 / n), the mean 0 to 0.3 / sqrt(n).
    assert np.mean(there**2) == pytest.approx(0.09, rel=5 * np.sqrt(2 / there.size))
    assert abs(there.mean()) < 5 * 0.3 / np.sqrt(there.size)
    noise[np.ix_(np.arange(8)[steps], np.arange(800), channels)] = 0
    assert not noise.any()


def test_noise_repeats_with_its_key():
    def made(seed):
        return bk.tasks.decision(noise=1.0, rng_key=jax.random.key(seed)).inputs

    assert np.array_equal(made(1), made(1))
    assert not np.array_equal(made(1), made(2))
    raw = bk.tasks.decision(noise=1.0, rng_key=jax.random.PRNGKey(1)).inputs
    assert np.array_equal(made(1), raw)


BAD = {
    "epochs longer than the trial": (
        lambda: bk.tasks.decision(steps=5),
        "steps: expected at least 6, the steps of fixation, stimulus, response, got 5",
    ),
    "no response": (
        lambda: bk.tasks.integration(response=0),
        "response: expected an integer >= 1",
    ),
    "no coherence": (lambda: bk.tasks.decision((0.0,)), "coherences: expected one or more"),
    "too coherent": (lambda: bk.tasks.context_decision((2.0,)), "coherences: expected one or more"),
    "one stimulus": (lambda: bk.tasks.match_to_sample(1), "stimuli: expected an integer >= 2"),
    "a coherence twice": (
        lambda: bk.tasks.decision((0.1, 0.2, 0.1)),
        "the same inputs in patterns 0 and 2",
    ),
    "a stimulus twice": (
        lambda: bk.tasks.match_to_sample(trials=2),
        "the same inputs in patterns 0 and 1",
    ),
    "pulses twice": (
        lambda: bk.tasks.flip_flop(trials=2),
        "the same inputs in patterns 0 and 1",
    ),
    "noise without a key": (lambda: bk.tasks.decision(noise=1.0), "rng_key: expected one JAX key"),
    "a key without noise": (
        lambda: bk.tasks.decision(rng_key=KEY),
        "rng_key: expected None without noise",
    ),
    "noise negative": (
        lambda: bk.tasks.decision(noise=-1.0, rng_key=KEY),
        "noise: expected a finite number > 0",
    ),
    "too many pulses": (
        lambda: bk.tasks.integration(30, 40),
        "40 * 1,073,741,824 * 3 numbers, which take 1,031 GB",
    ),
    "absurdly many pulses": (lambda: bk.tasks.integration(10**9, 10**10), "at most 0.8 GB"),
    "too many bits": (lambda: bk.tasks.flip_flop(10**6), "at most 0.8 GB"),
    "too many trials": (
        lambda: bk.tasks.decision(trials=10**7, noise=1.0, rng_key=KEY),
        "steps, patterns, input_dim: expected an array of at most 0.8 GB, "
        "got 8 * 80,000,000 * 3 numbers, which take 16 GB",
    ),
    "too many stimuli": (lambda: bk.tasks.match_to_sample(10**5), "at most 0.8 GB"),
    "too many contexts": (
        lambda: bk.tasks.context_decision(np.linspace(0.1, 1, 10**4)),
        "at most 0.8 GB",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(InputError) as caught:
        call()
    assert message in str(caught.value)
    assert ", got " in str(caught.value)


class Dataset:
    """What a neurogym dataset shows of itself: four trials of fixation and a choice of 1 or 2."""

    seq_len, batch_size = 3, 4

    def __init__(self, batch_first=False):
        self.batch_first = batch_first
        self.env = type("Env", (), {"action_space": type("Discrete", (), {"n": 3})})
        self.observations = np.arange(24, dtype=np.float32).reshape(3, 4, 2)
        self.actions = np.array([[0] * 4, [0, 0, 0, 1], [1, 1, 2, 1]])

    def __call__(self):
        if self.batch_first:
            return self.observations.swapaxes(0, 1), self.actions.T
        return self.observations, self.actions


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mask_fixation", [False, True])
def test_neurogym_actions_become_centred_one_hot(batch_first, mask_fixation):
    dataset = Dataset(batch_first)
    task = bk.tasks.from_neurogym(dataset, mask_fixation=mask_fixation)
    assert task.shape == (3, 4, 2, 3)
    assert np.array_equal(task.inputs, dataset.observations)
    free = np.repeat((dataset.actions == 0)[..., None], 3, axis=2) & mask_fixation
    assert np.array_equal(task.supervised, ~free)
    assert task.targets[2, 2] == pytest.approx(np.array([-1, -1, 2]) / 3)
    assert np.nansum(task.targets) == pytest.approx(0)
    whole = bk.tasks.from_neurogym(dataset).targets
    assert np.array_equal(whole.argmax(-1), dataset.actions)


def test_neurogym_without_an_environment_counts_the_actions_it_meets():
    dataset = Dataset()
    assert bk.tasks.from_neurogym(lambda: dataset()).shape == (3, 4, 2, 3)
    assert bk.tasks.from_neurogym(lambda: (dataset()[0], dataset()[1] * 2.0)).shape[3] == 5


def changed(**attributes):
    dataset = Dataset()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return dataset


LAYOUTS = {
    "no dataset": (3, "int, which cannot be called"),
    "no pair": (lambda: 5, "TypeError"),
    "three arrays": (lambda: (1, 2, 3), "ValueError"),
    "an argument needed": (lambda a: a, "TypeError"),
    "at its end": (lambda: next(iter(())), "StopIteration"),
    "no steps": (changed(observations=np.ones((3, 4))), "shape (3, 4)"),
    "continuous actions": (changed(actions=np.ones((3, 4, 2))), "shape (3, 4, 2)"),
    "fractions": (changed(actions=np.full((3, 4), 0.5)), "the action 0.5"),
    "negative": (changed(actions=np.full((3, 4), -1)), "the action -1"),
    "not a number": (changed(actions=np.full((3, 4), np.nan)), "the action nan"),
    "infinite": (changed(actions=np.full((3, 4), np.inf)), "the action inf"),
    "unknown action": (changed(actions=np.full((3, 4), 7)), "the action 7 of 3 actions"),
    "words": (changed(actions=np.full((3, 4), "go")), "<U2"),
    "transposed actions": (changed(actions=np.ones((4, 3), int)), "actions of shape (4, 3)"),
    "batch first unsaid": (changed(seq_len=4, batch_size=3), "[3, 4] in the arrays, [4, 3]"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_unknown_layouts_of_neurogym_are_refused(name):
    dataset, message = LAYOUTS[name]
    with pytest.raises(InputError, match=r"dataset: expected .*a neurogym Dataset") as caught:
        bk.tasks.from_neurogym(dataset)
    assert message in str(caught.value)
    assert "(seq_len, batch" in str(caught.value)


def test_trials_are_described_in_the_file_of_a_sweep(tmp_path):
    from bayeskernel.sweeps.description import read_description

    def described(arguments):
        file = tmp_path / "sweep.toml"
        file.write_text(f'[task]\nname = "decision"\n{arguments}\n[grid]\nsteps = [6, 9]\n')
        return read_description(file)["task"](9).inputs

    assert np.array_equal(described("fixation = 2"), bk.tasks.decision(steps=9, fixation=2).inputs)
    noisy = bk.tasks.decision(steps=9, noise=0.5, rng_key=jax.random.key(3)).inputs
    assert np.array_equal(described("noise = 0.5\nseed = 3"), noisy)
