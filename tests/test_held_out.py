"""Held-out patterns: scores, the baseline without feature learning, and theory beside samples."""

import jax
import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import DotProduct
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import accuracy_score, mean_squared_error

import bayeskernel as bk
from bayeskernel.errors import InputError
from bayeskernel.inference.convergence import mean_and_error

KAPPA = 0.3
STDS = {"input_std": 1.2, "recurrent_std": 0.8, "readout_std": 0.7, "noise": KAPPA}


def digits(start, count, classes=(3, 5), steps=2):
    return bk.tasks.digits(classes, count, steps, start=start)


# Second moments of phi under N(0, K), written down again: Williams (1997), Cho and Saul (2009).
def erf_moments(K):
    norm = 1 + np.pi / 2 * np.diag(K)
    return 2 / np.pi * np.arcsin(np.pi / 2 * K / np.sqrt(np.outer(norm, norm)))


def relu_moments(K):
    std = np.sqrt(np.diag(K))
    angle = np.arccos(np.clip(K / np.outer(std, std), -1, 1))
    return np.outer(std, std) * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)


MOMENTS = {"linear": lambda K: K, "erf": erf_moments, "relu": relu_moments}


def last_kernel(moments, inputs):
    """Prior covariance of the last step's outputs: a step's block follows from that of the step before."""
    C = 0.0
    for x in inputs:
        C = moments(1.2**2 * x @ x.T / x.shape[1] + 0.8**2 * C)
    return 0.7**2 * C


@pytest.mark.parametrize("sharing", ["tied", "untied"])
@pytest.mark.parametrize("activation", MOMENTS)
def test_nngp_is_kernel_regression_of_scikit_learn(activation, sharing):
    task, test = digits(0, 6, steps=4), digits(6, 10, steps=4)
    network = bk.Network(1, activation, sharing, **STDS)
    kernel = last_kernel(MOMENTS[activation], np.concatenate([task.inputs, test.inputs], 1))
    ridge = KernelRidge(alpha=KAPPA, kernel="precomputed")
    ridge.fit(kernel[:12, :12], task.targets[-1])
    found = bk.nngp(network, task, test.inputs)
    assert found.mean[-1] == pytest.approx(ridge.predict(kernel[12:, :12]), abs=1e-9)
    assert found.monte_carlo_error.max() == 0
    assert found.kernel.shape == (4, 20, 4, 20)
    assert found.cross_kernel.shape == (4, 20, 4, 12)


def test_nngp_of_one_linear_step_is_the_gaussian_process_of_scikit_learn():
    task, test = digits(0, 6, (0, 1, 2), steps=1), digits(6, 10, (0, 1, 2), steps=1)
    network, units = bk.Network(1, "linear", noise=KAPPA), np.sqrt(64)
    process = GaussianProcessRegressor(DotProduct(0.0, "fixed"), alpha=KAPPA, optimizer=None)
    process.fit(task.inputs[0] / units, task.targets[0])
    expected = process.predict(test.inputs[0] / units)
    found = bk.nngp(network, task, test.inputs)
    assert found.mean[0] == pytest.approx(expected, abs=1e-9)
    score = bk.held_out(found, test)
    assert score.accuracy == accuracy_score(test.targets[0].argmax(1), expected.argmax(1))
    assert score.mse == pytest.approx(mean_squared_error(test.targets[0], expected))


def masked(inputs, key):
    """Two outputs that are supervised at different steps and patterns."""
    targets = np.random.default_rng(key).normal(size=(*inputs.shape[:2], 2))
    targets[0, :, 0] = targets[1, ::2, 1] = np.nan
    return bk.Task(inputs, targets)


@pytest.mark.parametrize("activation", ["linear", "erf"])
def test_nngp_reads_each_output_where_it_was_supervised(activation):
    inputs = np.random.default_rng(0).normal(size=(2, 9, 3))
    task, network = masked(inputs[:, :5], 1), bk.Network(1, activation, **STDS)
    kernel = 0.7**2 * bk.prior_kernel(network, bk.Task(inputs, np.zeros((2, 9))))
    found = bk.nngp(network, task, inputs[:, 5:]).mean
    for o, asked in enumerate(task.supervised.transpose(2, 0, 1)):
        old = kernel[:, :5][asked][:, :, :5][:, asked]
        new = kernel[:, 5:][:, :, :, :5][:, :, asked]
        dual = np.linalg.solve(old + KAPPA * np.eye(len(old)), task.targets[..., o][asked])
        assert found[..., o] == pytest.approx(new @ dual, abs=1e-9)


@pytest.mark.parametrize("activation", ["linear", "erf"])
def test_nngp_is_the_theory_in_standard_scaling(activation):
    task, test = digits(0, 1), digits(1, 3)
    standard = bk.solve(bk.Network(1, activation, scaling="standard", noise=KAPPA), task)
    lazy = bk.nngp(bk.Network(1, activation, noise=KAPPA), task, test.inputs)
    for one, other in zip(standard.predict(test.inputs), lazy, strict=True):
        assert one == pytest.approx(other, abs=1e-9)


def test_nngp_is_the_limit_of_small_targets():
    task, test = digits(0, 3), digits(3, 5)
    network = bk.Network(1, "linear", noise=KAPPA)
    theory = bk.solve(network, task.scaled(1e-3))
    expected = 1e-3 * bk.nngp(network, task, test.inputs).mean
    assert theory.predict(test.inputs).mean == pytest.approx(expected, rel=1e-4)


def test_new_patterns_must_fit():
    with pytest.raises(InputError, match=r"inputs: expected shape \(2, P\*, 32\)"):
        bk.nngp(bk.Network(1), digits(0, 1), np.zeros((2, 3, 8)))


def test_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    test = digits(0, 20)
    outputs = test.targets + rng.normal(size=test.targets.shape)
    outputs[0] = 9.0  # nothing is asked there
    given, answers = outputs[-1, :, 0], test.targets[-1, :, 0]
    score = bk.held_out(outputs, test)
    right = given * answers > 0
    assert 0.5 < score.accuracy < 1
    assert score.patterns == 40
    assert score.accuracy == accuracy_score(answers > 0, given > 0)
    assert score.accuracy_error == pytest.approx(right.std(ddof=1) / np.sqrt(40))
    assert score.mse == pytest.approx(mean_squared_error(answers, given))


def test_errors_cover_patterns_and_draws():
    """Over many sets of patterns and draws, scores stray from the truth as their errors say."""
    rng, z = np.random.default_rng(1), []
    for _ in range(300):
        answers = rng.choice([-1.0, 1.0], 30)
        test = bk.Task(np.ones((1, 30, 1)), answers[None])
        shared = 0.5 * rng.normal(size=(8, 1, 1, 1))
        outputs = answers[:, None] * (1 + shared + rng.normal(size=(1, 1, 30, 1)))
        z.append(bk.held_out(outputs, test).mse - 1.25)
        z[-1] /= bk.held_out(outputs, test).mse_error
    assert np.std(z) == pytest.approx(1.0, abs=0.25)


def test_steps_without_a_decision_do_not_count():
    targets = np.array([[[0.0], [0.0]], [[1.0], [np.nan]]])
    test = bk.Task(np.ones((2, 2, 1)), targets)
    score = bk.held_out(np.full((2, 2, 1), 0.5), test)
    assert (score.accuracy, score.mse) == (1.0, 0.25)
    assert bk.held_out(np.zeros((2, 2, 1)), test).accuracy == 0.5
    nothing = bk.held_out(np.zeros((2, 2, 1)), test.scaled(0))
    assert np.isnan(nothing.accuracy)
    assert nothing.mse == 0


def test_the_largest_output_decides():
    test = digits(0, 2, (0, 1, 2))
    score = bk.held_out(np.where(np.isnan(test.targets), 0.0, test.targets), test)
    assert (score.accuracy, score.mse) == (1.0, 0.0)
    assert bk.held_out(np.ones((2, 6, 3)), test).accuracy == pytest.approx(1 / 3)
    always_second = np.broadcast_to([0.0, 1.0, 0.0], (2, 6, 3))
    assert bk.held_out(always_second, test).accuracy == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (
            np.zeros((2, 3, 1)),
            r"after axes of networks or of chains and draws, got shape \(2, 3, 1\)",
        ),
        (np.zeros(4), r"expected shape \(T, P\*, O\) = 2, 4, 1"),
        (np.full((2, 4, 1), np.nan), "outputs: expected finite numbers"),
        ("words", "outputs: expected real numbers"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(outputs, message):
    with pytest.raises(InputError, match=message):
        bk.held_out(outputs, digits(0, 2))
    with pytest.raises(InputError, match="task: expected a Task"):
        bk.held_out(np.zeros((2, 4, 1)), "digits")


def z_scores(draws, network, task, test, theory, shift=0.0):
    """Of the mean outputs for held-out patterns at the last step, after a gate on effective draws."""
    found = bk.predict(jax.random.key(1), draws, network, task, test.inputs)
    mean, error, ess = mean_and_error(found["output"].to_numpy()[:, :, -1])
    assert ess.min() > 150
    said = theory.predict(test.inputs)
    scale = np.sqrt(error**2 + said.monte_carlo_error[-1] ** 2 + shift**2)
    score = bk.held_out(found, test)
    expected = bk.held_out(said, test)
    assert abs(score.accuracy - expected.accuracy) <= 5 * score.accuracy_error
    return (mean - said.mean[-1]) / scale


def test_theory_and_samples_agree_on_held_out_images():
    """So wide that shifts of order 1/N do not count; linear networks are sampled at any width."""
    task, test = digits(0, 1, steps=4).scaled(2.0), digits(1, 6, steps=4).scaled(2.0)
    network = bk.Network(2**16, "linear", noise=KAPPA)
    draws = bk.sample(
        jax.random.key(0), network, task, num_warmup=200, num_samples=100, progress=False
    )
    z = z_scores(draws, network, task, test, bk.solve(network, task))
    assert np.abs(z).max() < 5


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["tied", "untied"])
def test_theory_and_samples_agree_on_held_out_images_in_erf_networks(sharing):
    width, steps = 1024, 4
    task, test = digits(0, 2, steps=steps).scaled(2.0), digits(2, 16, steps=steps).scaled(2.0)
    network = bk.Network(width, "erf", sharing, noise=KAPPA)
    draws = bk.sample(
        jax.random.key(0),
        network,
        task,
        num_samples=500,
        keep=("preactivations",),
        progress=False,
    )
    theory = bk.solve(network, task)
    # A held-out image is a pattern without a target; the larger shift of two sets the scale of all.
    some = test.inputs[:, ::16]
    unknown = np.full((steps, some.shape[1], 1), np.nan)
    more = np.concatenate([task.targets, unknown], 1)
    together = bk.solve(network, bk.Task(np.concatenate([task.inputs, some], 1), more))
    shift = np.abs(together.output_shift()[-1]).max()
    z = z_scores(draws, network, task, test, theory, shift)
    assert np.abs(z).max() < 5
