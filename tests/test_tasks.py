import jax
import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel.errors import InputError


def test_two_dimensional_targets_mean_one_output():
    task = bk.Task(np.ones((3, 2, 1)), np.ones((3, 2)))
    assert task.shape == (3, 2, 1, 1)


def test_whole_numbers_are_values_to_regress_on():
    task = bk.Task(np.ones((1, 2, 1), int), np.array([[1, -1]]))
    assert task.targets.dtype == np.float64
    assert np.array_equal(task.targets[..., 0], [[1.0, -1.0]])


def test_arrays_are_copied_and_locked():
    inputs = np.ones((1, 1, 1))
    task = bk.Task(inputs, np.ones((1, 1)))
    inputs[:] = 5
    assert task.inputs[0, 0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        task.inputs[:] = 2


def test_endpoint_places_input_first_and_target_last():
    task = bk.tasks.endpoint([[1.0, 2.0], [3.0, 4.0]], [1.0, -1.0], steps=3)
    assert np.array_equal(task.inputs[0], [[1, 2], [3, 4]])
    assert not task.inputs[1:].any()
    assert np.array_equal(task.supervised[..., 0], [[False] * 2, [False] * 2, [True] * 2])


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_digits_are_the_images_row_by_row(steps):
    task = bk.tasks.digits((3, 8), 5, steps)
    assert task.shape == (steps, 10, 64 // steps, 1)
    whole = bk.tasks.digits((3, 8), 5, 1)
    assert np.array_equal(task.inputs.swapaxes(0, 1).reshape(10, 64), whole.inputs[0])
    assert np.array_equal(task.targets[-1, :, 0], [1] * 5 + [-1] * 5)
    assert np.isnan(task.targets[:-1]).all()


def test_digits_scale_and_held_out_patterns():
    everything = bk.tasks.digits((0, 1), 178, 1)
    assert np.mean(everything.inputs**2) == pytest.approx(1, rel=0.02)
    later = bk.tasks.digits((0, 1), 2, 1, start=3)
    assert np.array_equal(later.inputs[0, :2], everything.inputs[0, 3:5])


@pytest.mark.parametrize("classes", [range(10), (7, 2, 4)])
def test_more_than_two_digits_are_centred_one_hot(classes):
    n = len(classes)
    task = bk.tasks.digits(classes, 3, 1, start=2)
    assert task.shape == (1, 3 * n, 64, n)
    assert np.array_equal(task.targets[-1].argmax(-1), np.repeat(np.arange(n), 3))
    assert task.targets[-1].sum(0) == pytest.approx(np.zeros(n))
    assert np.sort(task.targets[-1], axis=1) == pytest.approx(
        np.tile([-1 / n] * (n - 1) + [1 - 1 / n], (3 * n, 1))
    )
    # Up to shift and scale, images of a class are the same beside whatever other class.
    pair = bk.tasks.digits((classes[0], classes[1]), 3, 1, start=2)
    there, here = np.ptp(pair.inputs[0, :6], axis=0), np.ptp(task.inputs[0, :6], axis=0)
    shown = there > 0
    assert here[shown] / there[shown] == pytest.approx(
        np.full(shown.sum(), here.max() / there.max())
    )


def test_held_out_digits_have_the_scale_of_the_others():
    everything = bk.tasks.digits(range(10), 174, 1)
    assert np.mean(everything.inputs**2) == pytest.approx(1, rel=0.02)
    later = bk.tasks.digits(range(10), 4, 1, start=170)
    index = (174 * np.arange(10)[:, None] + np.arange(170, 174)).ravel()
    assert np.array_equal(later.inputs, everything.inputs[:, index])
    assert np.array_equal(later.targets, everything.targets[:, index])


def test_sunspots_windows_continue_into_their_targets():
    task = bk.tasks.sunspots(3, 6, lags=5, stride=2, supervised="all")
    # The target of pattern a, step t is lag 1 + a later year: overlapping windows agree.
    assert np.array_equal(task.inputs[0, 1, -2:], task.targets[:2, 0, 0])
    held_out = bk.tasks.sunspots(3, 6, lags=5, stride=2)
    assert np.array_equal(held_out.supervised[:, 0, 0], [True, False] * 3)


def test_sine_is_a_rotation_of_its_input():
    task = bk.tasks.sine(2, 5, period=8, supervised="all")
    start, angle = task.inputs[0] / np.sqrt(2), 2 * np.pi / 8
    for t in range(5):
        expected = start[:, 1] * np.cos(angle * t) + start[:, 0] * np.sin(angle * t)
        assert task.targets[t, :, 0] == pytest.approx(expected)


def test_teacher_keeps_variance_and_repeats_with_its_key():
    task = bk.tasks.linear_teacher(jax.random.key(0), 400, 4, input_dim=6, supervised="all")
    again = bk.tasks.linear_teacher(jax.random.key(0), 400, 4, input_dim=6, supervised="all")
    assert np.array_equal(task.targets, again.targets)
    variance = task.targets.var(axis=(1, 2))
    assert variance == pytest.approx(np.full(4, variance[0]), rel=0.25)


def test_scaled_multiplies_targets_only():
    task = bk.tasks.digits().scaled(3)
    assert np.nanmax(task.targets) == 3
    assert task.scaled(0).supervised.sum() == task.supervised.sum()


nan, inf = np.nan, np.inf
ones = np.ones
BAD = {
    "inputs of two dimensions": (
        lambda: bk.Task(ones((3, 2)), ones((3, 2))),
        "inputs: expected shape (T, P, D)",
    ),
    "inputs not finite": (
        lambda: bk.Task([[[1.0], [nan]]], ones((1, 2))),
        "inputs: expected finite",
    ),
    "inputs not numbers": (
        lambda: bk.Task([[["a"]]], ones((1, 1))),
        "inputs: expected real numbers",
    ),
    "inputs ragged": (
        lambda: bk.Task([[[1.0], [1.0, 2.0]]], ones((1, 2))),
        "inputs: expected real numbers",
    ),
    "targets one-dimensional": (
        lambda: bk.Task(ones((3, 2, 1)), ones(3)),
        "targets: expected shape",
    ),
    "targets transposed": (
        lambda: bk.Task(ones((3, 2, 1)), ones((2, 3))),
        "targets: expected leading shape",
    ),
    "targets of shape (P, 1)": (
        lambda: bk.Task(ones((3, 2, 1)), ones((2, 1))),
        "targets: expected leading shape",
    ),
    "targets infinite": (
        lambda: bk.Task(ones((1, 2, 1)), [[1.0, inf]]),
        "targets: expected finite",
    ),
    "targets boolean": (
        lambda: bk.Task(ones((1, 1, 1)), [[True]]),
        "targets: expected real numbers",
    ),
    "no supervised entry": (
        lambda: bk.Task(ones((1, 1, 1)), [[nan]]),
        "targets: expected at least one supervised",
    ),
    "empty": (lambda: bk.Task(ones((1, 0, 1)), ones((1, 0))), "expected no empty axis"),
    "patterns of one dimension": (
        lambda: bk.tasks.endpoint([1.0, 2.0], [1.0, 2.0], 2),
        "patterns: expected shape (P, D)",
    ),
    "labels of another length": (
        lambda: bk.tasks.endpoint(ones((3, 2)), [1.0, 2.0], 2),
        "labels: expected 3 rows",
    ),
    "no steps": (
        lambda: bk.tasks.endpoint(ones((3, 2)), ones(3), 0),
        "steps: expected an integer >= 1",
    ),
    "rows do not divide": (lambda: bk.tasks.digits(steps=3), "steps: expected 1, 2, 4 or 8"),
    "one class": (lambda: bk.tasks.digits((1, 1)), "classes: expected two or more different"),
    "a digit twice": (
        lambda: bk.tasks.digits((3, 1, 3)),
        "classes: expected two or more different digits 0..9, got (3, 1, 3)",
    ),
    "no such digit": (
        lambda: bk.tasks.digits(range(11)),
        "classes: expected two or more different digits 0..9, got range(0, 11)",
    ),
    "a negative digit": (lambda: bk.tasks.digits((-1, 1)), "classes: expected two or more"),
    "half a digit": (lambda: bk.tasks.digits((0, 0.5)), "classes: expected two or more"),
    "held-out digits past the end": (
        lambda: bk.tasks.digits(range(10), 5, start=170),
        "start + patterns_per_class: expected at most 174, the images there are of the digit 8, got 175",
    ),
    "a task of many gigabytes": (
        lambda: bk.tasks.sine(10**6, 1000),
        "patterns, steps: expected an array of at most 0.8 GB, got 1,000,000 * 1,000 numbers, which take 8 GB",
    ),
    "a teacher of many gigabytes": (
        lambda: bk.tasks.linear_teacher(jax.random.key(0), 10**4, 10**4),
        "10,000 * 10,000 * 8 numbers, which take 7 GB",
    ),
    "an endpoint of many gigabytes": (
        lambda: bk.tasks.endpoint(ones((10, 10)), ones(10), 10**8),
        "100,000,000 * 100 numbers, which take 80 GB",
    ),
    "too many digits": (lambda: bk.tasks.digits(patterns_per_class=500), "expected at most"),
    "outside the series": (
        lambda: bk.tasks.sunspots(100, 6),
        "expected windows within 1700 to 2008",
    ),
    "unknown step": (lambda: bk.tasks.sine(2, 4, supervised=[5]), "supervised: expected"),
    "signal negative": (
        lambda: bk.tasks.digits().scaled(-1),
        "signal: expected a finite number > 0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(InputError) as caught:
        call()
    assert message in str(caught.value)
    assert ", got " in str(caught.value)
