"""Exact weights from pre-activations, and predictions for new patterns from every space."""

import arviz as az
import jax
import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel.errors import InputError
from bayeskernel.sharing import labels_of
from tests.conftest import as_run, fake_draws

SHARINGS = ["tied", "untied", bk.Sharing([0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1])]
# Tests of one shape share what is compiled.
SINE = bk.tasks.sine(2, 3, supervised=[1, 3])
QUICK = {"num_warmup": 30, "num_samples": 4, "num_chains": 2, "progress": False}


def run(network, task, **settings):
    return bk.sample(jax.random.key(3), network, task, **{**QUICK, **settings})


@pytest.mark.parametrize(
    ("sharing", "space"),
    [
        pytest.param(
            sharing,
            space,
            marks=pytest.mark.long if (k, space) == (2, "preactivations") else pytest.mark.slow,
        )
        for k, sharing in enumerate(SHARINGS)
        for space in ("preactivations", "weights")
    ],
)
def test_weights_reproduce_preactivations_and_outputs(sharing, space, general_task, double):
    network = bk.Network(16, "tanh", sharing, recurrent_std=1.2, input_std=0.8)
    draws = run(network, general_task, space=space, keep=("preactivations",))
    drawn = bk.weights(jax.random.key(0), draws, network, general_task)
    labels = labels_of(network.sharing, 4)
    for chain, draw in ((0, 0), (1, 3)):
        h = draws["posterior"]["preactivation"].to_numpy()[chain, draw]
        W, U, v = (
            drawn[f"{name}_weights"].to_numpy()[chain, draw]
            for name in ("recurrent", "input", "readout")
        )
        for t in range(4):
            again = general_task.inputs[t] @ U[labels.input[t]].T
            if t:
                again = again + np.tanh(h[t - 1]) @ W[labels.recurrent[t]].T
            assert again == pytest.approx(h[t], abs=1e-10)
            output = np.tanh(h[t]) @ v[labels.readout[t]].T / 16
            assert output == pytest.approx(
                draws["posterior"]["output"].to_numpy()[chain, draw, t], abs=1e-10
            )


def test_weights_given_prior_preactivations_are_prior_weights():
    """h from prior weights, then weights from h: the new weights must again be N(0, scale^2)."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(3, 4))
    task = bk.tasks.endpoint(inputs, np.zeros(3), 3)
    network = bk.Network(40, "erf", noise=1e6)  # targets carry no information
    W = rng.normal(size=(2, 10, 40, 40)) / np.sqrt(40)
    h = [inputs @ rng.normal(size=(2, 10, 4, 40)) / 2]
    for _ in range(2):
        h.append(np.asarray(network.phi(h[-1])) @ W)
    h = np.stack(h, 2)
    phi = np.asarray(network.phi(h))
    made = {
        "kernel": np.einsum("cdtai,cdsbi->cdtasb", phi, phi) / 40,
        "output": np.zeros((2, 10, 3, 3, 1)),
        "preactivation": h,
        "readout_weights": rng.normal(size=(2, 10, 1, 1, 40)),
    }
    draws = as_run(made, network, task)
    W = bk.weights(jax.random.key(1), draws, network, task)["recurrent_weights"].to_numpy()
    scaled = W * np.sqrt(40)
    assert abs(scaled.mean()) < 5 / np.sqrt(scaled.size)
    assert abs(scaled.var() - 1) < 5 * np.sqrt(2 / scaled.size)


@pytest.mark.long
def test_training_patterns_predict_themselves(general_task, double):
    network = bk.Network(16, "tanh", SHARINGS[2])
    draws = run(network, general_task, space="preactivations", keep=("preactivations",))
    again = bk.predict(jax.random.key(0), draws, network, general_task, general_task.inputs)
    stored = draws["posterior"]["output"].to_numpy()
    assert again["output"].to_numpy() == pytest.approx(stored, abs=1e-6)


@pytest.mark.parametrize(
    ("activation", "space", "apart"),
    [
        ("erf", "preactivations", 1e-4),
        ("linear", "kernels", 1e-4),
        # A share of 10^-6 is known in kernel space, which is in float64.
        ("linear", "kernels", 1e-3),
    ],
)
def test_what_draws_do_not_know_is_left_open(activation, space, apart):
    """Two patterns hardly differ along a direction, which may be lost to rounding; a new pattern lies there."""
    task = bk.tasks.endpoint([[1.0, 0.0], [1.0, apart]], [1.0, 1.0], 2)
    new = np.zeros((2, 1, 2))
    new[0, 0] = [0.0, 1.0]
    network = bk.Network(256, activation, "untied", noise=0.5)
    keep = ("preactivations",) if space == "preactivations" else ()
    draws = run(network, task, space=space, keep=keep, num_warmup=100, num_samples=200)
    if keep:
        # Prior weights: standard deviation 1 over the root of two features.
        weights = bk.weights(jax.random.key(1), draws, network, task)["input_weights"]
        across = weights.to_numpy()[..., 0, :, 1].ravel() * np.sqrt(2)
        assert abs(across.var() - 1) < 5 * np.sqrt(2 / across.size)
    outputs = bk.predict(jax.random.key(7), draws, network, task, new)["output"].to_numpy()
    # Nothing is known of it at the first step, and nothing was learned there.
    prior = bk.prior_kernel(network, bk.tasks.endpoint([[0.0, 1.0]], [0.0], 2))[0, 0, 0, 0]
    first = outputs[..., 0, 0, 0]
    assert first.std() == pytest.approx(np.sqrt(prior / 256), rel=5 / np.sqrt(2 * first.size))
    if activation == "linear":
        last, expected = outputs[..., 1, 0, 0], bk.solve(network, task).predict_std(new)[1, 0, 0]
        assert last.std() == pytest.approx(expected, rel=5 / np.sqrt(2 * last.size))


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["erf", "linear"])
def test_all_spaces_predict_the_same(activation):
    """Mean and variance of outputs for new patterns, weights against the other spaces."""
    new = np.zeros((3, 2, 2))
    new[0] = [[1.0, -0.5], [0.2, 1.3]]
    network = bk.Network(12, activation, noise=0.5)
    spaces = {"weights": ("weights",), "preactivations": ("preactivations",)}
    if activation == "linear":
        spaces["kernels"] = ()
    moments = {}
    for space, keep in spaces.items():
        draws = run(network, SINE, space=space, keep=keep, num_warmup=300, num_samples=500)
        outputs = bk.predict(jax.random.key(7), draws, network, SINE, new)["output"]
        values = outputs.to_numpy().astype(np.float64)[..., 0]
        ess = az.ess(outputs.to_dataset())["output"].to_numpy()[..., 0]
        assert ess.min() > 100
        moments[space] = (values.mean((0, 1)), values.var((0, 1)), ess)
    mean, variance, ess = moments.pop("weights")
    for other_mean, other_variance, other_ess in moments.values():
        error = np.sqrt(variance / ess + other_variance / other_ess)
        assert np.abs((mean - other_mean) / error).max() < 5
        spread = np.sqrt(3) * np.sqrt(variance**2 / ess + other_variance**2 / other_ess)
        assert np.abs((variance - other_variance) / spread).max() < 5


def test_bad_input_is_named(table1_task):
    network = bk.Network(8, "linear")
    theory = bk.solve(network, table1_task)
    draws = fake_draws(theory)
    with pytest.raises(InputError, match="draws: expected draws made with keep"):
        bk.weights(jax.random.key(0), draws, network, table1_task)
    with pytest.raises(InputError, match="draws: expected draws made with keep"):
        bk.predict(jax.random.key(0), draws, network, table1_task, table1_task.inputs)
    kept = fake_draws(theory, preactivation=(3, 1, 8), readout_weights=(1, 1, 8))
    with pytest.raises(InputError, match="rng_key: expected"):
        bk.weights(0, kept, network, table1_task)
