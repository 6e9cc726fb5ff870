"""Trained networks: Langevin's stationary law is the posterior, descent goes down, and nothing is trained twice alike."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bayeskernel as bk
from bayeskernel.errors import InputError
from bayeskernel.inference import descent, weights
from bayeskernel.inference import train as module
from bayeskernel.inference.curvature import steepest
from bayeskernel.inference.descent import loss, patterns_of
from bayeskernel.inference.record import settings
from bayeskernel.inference.train import arranged

TASK = bk.tasks.endpoint([[1.0, 0.0], [0.5, 1.0], [-0.3, 0.4]], [0.8, -0.5, 0.3], 3)
NETWORK = bk.Network(12, "tanh", noise=0.5)
KEY = jax.random.key(5)


def trained(network=NETWORK, task=TASK, key=KEY, **options):
    options = {"optimizer": "gd", "num_steps": 40, "num_networks": 3, "progress": False} | options
    return bk.train(key, network, task, **options)


@pytest.mark.usefixtures("double")
def test_curvature_of_a_quadratic_is_its_largest_eigenvalue():
    A = np.diag([0.1, 1.0, 7.0])
    found = steepest(
        lambda z: z["x"] @ A @ z["x"] / 2, {"x": jnp.ones(3)}, {"x": jnp.array([1.0, 1.0, 0.2])}
    )
    assert float(found) == pytest.approx(7.0, rel=1e-6)


LINEAR = bk.Network(16, "linear", noise=0.5)
ONE = bk.tasks.endpoint([[1.0]], [1.5], 3)


@pytest.fixture(scope="module")
def exact():
    """Kernels of a linear network, sampled in their own space."""
    draws = bk.sample(
        jax.random.key(1), LINEAR, ONE, num_samples=2000, num_chains=2, progress=False
    )
    assert bk.diagnose(draws).table["ess_bulk"].min() > 1000
    return draws


def langevin(rate=None, steps=2500, count=400, at=()):
    return trained(
        LINEAR,
        ONE,
        optimizer="langevin",
        learning_rate=rate,
        num_steps=steps,
        num_networks=count,
        at=at,
    )


@pytest.mark.long
@pytest.mark.usefixtures("double")
def test_langevin_s_stationary_law_is_the_posterior(exact):
    # Norms of blocks are free of signs.
    tables = [
        bk.diagnose(draws).table.filter(regex="norm|output.3", axis=0)
        for draws in (exact, langevin())
    ]
    (mean, found), (error, own) = ([t[name] for t in tables] for name in ("mean", "mcse"))
    assert len(found) == 7
    assert (own / mean.abs()).max() < 0.06  # small enough for the test to mean something
    assert ((found - mean) / np.hypot(error, own)).abs().max() < 4


@pytest.mark.slow
@pytest.mark.usefixtures("double")
def test_langevin_s_bias_falls_with_the_step(exact):
    """That of the outputs' variance, in the stiffest direction."""
    outputs = exact["posterior"]["output"].to_numpy()[..., 2, 0, 0]
    truth = np.mean((outputs - 1.5) ** 2)
    default = settings(langevin(steps=1, count=8))["learning_rate"]
    bias, error = np.empty(2), np.empty(2)
    for k, (factor, steps) in enumerate(((16.0, 400), (2.0, 1600))):
        at = range(steps // 2, steps, steps // 40)
        path = langevin(factor * default, steps, at=at)["training"]["squared_error"]
        each = path.to_numpy().mean(1) / truth
        bias[k], error[k] = each.mean() - 1, each.std() / np.sqrt(len(each))
    assert bias[0] > 5 * error[0]
    assert bias[0] - bias[1] > 4 * np.hypot(*error)
    assert abs(bias[1]) < bias[0] / 2


@pytest.mark.parametrize("width", [8, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("activation", ["linear", "erf", "tanh", "relu"])
def test_descent_goes_down_at_every_step_of_the_default_rate(activation, width):
    task = bk.tasks.endpoint([[1.0, 0.0], [0.5, 1.0], [-0.3, 0.4]], [0.8, -0.5, 0.3], 2)
    network = bk.Network(width, activation, noise=0.2)
    values = trained(network, task, num_steps=150, at=range(150))["training"]["loss"].to_numpy()
    assert values.shape == (3, 151)
    # Minima of relu networks lie on kinks, about which descent goes to and fro.
    allowed = 5e-3 if activation == "relu" else 1e-5
    assert np.all(np.diff(values, axis=1) < allowed * values[:, :1])
    assert np.all(values[:, -1] < 0.7 * values[:, 0])


@pytest.mark.usefixtures("double")
def test_without_weight_decay_descent_interpolates():
    tree = trained(bk.Network(40, "erf", noise=0.5), weight_decay=0, num_steps=2000)
    error = tree["training"]["squared_error"]
    assert float(error[:, -1].max()) < 1e-6 * float(error[:, 0].min())


@pytest.mark.usefixtures("double")
def test_loss_is_minus_the_log_posterior():
    net, data = weights.structure(NETWORK, 3), weights.arrays(NETWORK, TASK)
    one, two = (weights.draw_prior(jax.random.key(k), net, data) for k in (0, 1))

    def log_posterior(z):
        prior = sum(-jnp.sum(x**2) / 2 for x in z.values())
        return weights.log_likelihood(net, z, data) + prior

    difference = loss(one, data, 1.0, net) - loss(two, data, 1.0, net)
    assert float(difference) == pytest.approx(float(log_posterior(two) - log_posterior(one)))
    h = weights.preactivations(one, net, data)
    output = np.asarray(weights.outputs(one, h, net, data))
    misfit = np.nansum((output - TASK.targets) ** 2) * 12 / 0.5 / 2
    assert float(loss(one, data, 0.0, net)) == pytest.approx(misfit)


@pytest.mark.usefixtures("double")
def test_batches_are_right_on_average():
    net, data = weights.structure(NETWORK, 3), weights.arrays(NETWORK, TASK)
    z = weights.draw_prior(jax.random.key(0), net, data)
    slope = jax.grad(partial(loss, decay=1.0, net=net))
    parts = [slope(z, patterns_of(data, jnp.array([a])), share=1 / 3) for a in range(3)]
    mean = jax.tree.map(lambda *g: sum(g) / 3, *parts)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9), mean, slope(z, data))


@pytest.mark.usefixtures("double")
def test_batches_of_all_patterns_are_descent():
    full = trained(learning_rate=0.01)["training"]
    batch = trained(learning_rate=0.01, optimizer="sgd", batch_size=3)["training"]
    optax_s = trained(optimizer=optax.sgd(0.01))["training"]
    for other in (batch, optax_s):
        np.testing.assert_allclose(other["kernel"], full["kernel"], rtol=1e-9, atol=1e-12)
    small = trained(learning_rate=0.01, optimizer="sgd", batch_size=1)["training"]
    assert not np.allclose(small["kernel"][:, -1], full["kernel"][:, -1], rtol=1e-3)


@pytest.mark.usefixtures("double")
def test_one_of_equal_patterns_counts_for_all():
    task = bk.tasks.endpoint([[1.0, 0.5]] * 3, [0.8] * 3, 2)
    full = trained(task=task, learning_rate=0.01)["training"]
    batch = trained(task=task, learning_rate=0.01, optimizer="sgd", batch_size=1)["training"]
    np.testing.assert_allclose(batch["kernel"], full["kernel"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adam", "num_steps": 300},
        {"optimizer": "sgd", "batch_size": 2, "num_steps": 300},
        {"optimizer": optax.adam(0.02), "batch_size": 2, "num_steps": 300},
    ],
    ids=["adam", "sgd", "optax"],
)
def test_others_learn_too(options):
    error = trained(**options, weight_decay=0)["training"]["squared_error"].to_numpy()
    assert np.all(error[:, -1] < 0.3 * error[:, 0])


@pytest.mark.parametrize(
    "network",
    [
        bk.Network(10, "erf", layers=2, leak=0.5, bias_std=0.3),
        bk.Network(10, "erf", sharing="untied", scaling="standard"),
    ],
    ids=["stack", "lazy"],
)
def test_any_architecture_is_trained(network):
    tree = trained(network, optimizer="langevin", learning_rate=0.01)
    assert np.isfinite(tree["posterior"]["kernel"]).all()
    assert ("layer" in tree["posterior"]["kernel"].dims) == (network.layers > 1)
    assert tree["training"]["kernel"].dims[:2] == ("network", "training_step")
    np.testing.assert_array_equal(
        tree["training"]["kernel"].isel(training_step=-1), tree["posterior"]["kernel"][:, 0]
    )


@pytest.mark.usefixtures("double")
def test_starts_are_prior_draws():
    tree = trained(num_networks=600, num_steps=1, learning_rate=1e-3)
    start = tree["training"]["kernel"].sel(training_step=0).to_numpy()
    prior = bk.sample_prior(jax.random.key(8), NETWORK, TASK, num_samples=600)
    other = prior["prior"]["kernel"].to_numpy()[0]
    error = np.hypot(start.std(0), other.std(0)) / np.sqrt(600)
    assert np.abs((start.mean(0) - other.mean(0)) / error).max() < 4.5


def test_the_same_key_trains_the_same_networks_however_steps_are_cut(monkeypatch):
    options = {"optimizer": "langevin", "learning_rate": 0.01}
    one = trained(**options)["training"]["kernel"]
    monkeypatch.setattr(module, "_MOST", 3)
    np.testing.assert_allclose(one, trained(**options, at=(0,))["training"]["kernel"], rtol=1e-5)
    between = trained(**options, at=(0, 7, 13))["training"]
    assert between["training_step"].to_numpy().tolist() == [0, 7, 13, 40]
    np.testing.assert_allclose(one[:, -1], between["kernel"][:, -1], rtol=1e-5)
    other = trained(**options, key=jax.random.key(6))["training"]["kernel"]
    assert not np.allclose(one[:, 0], other[:, 0], rtol=1e-3)


def test_noise_differs_between_steps_and_networks():
    """Seen where nothing else moves the weights."""
    net, data = weights.structure(NETWORK, 3), weights.arrays(NETWORK, TASK)
    idle = optax.set_to_zero()
    run, keys = descent.Run(net, idle, True, None), jax.random.split(KEY, 2)
    z = descent.starts(keys, data, net)
    state, noise = descent.State(z, jax.vmap(idle.init)(z)), []
    for i in range(3):
        before = state.z["recurrent"]
        state = descent.advance(state, keys, data, 0.5, 1.0, i, i + 1, run)
        noise.append(np.asarray(state.z["recurrent"] - before).reshape(2, -1))
    drawn = np.concatenate(noise)  # sqrt(2 rate) = 1
    assert np.abs(np.corrcoef(drawn) - np.eye(6)).max() < 0.45  # 5 standard errors
    np.testing.assert_allclose(drawn.std(1), 1, atol=0.3)


def test_networks_that_diverged_are_left_out(tmp_path):
    tree = trained(num_networks=5, learning_rate=0.01)
    path = tree["training"].to_dataset()
    rows = {k: path[k].to_numpy() for k in ("kernel", "output", "loss", "squared_error")}
    rows["kernel"] = rows["kernel"].copy()
    rows["kernel"][2, -1, 0, 0, 0, 0] = np.nan
    made = settings(tree)
    less = arranged(rows, [0, 40], NETWORK, TASK, made)
    assert less["training"]["diverged"].to_numpy().tolist() == [False, False, True, False, False]
    np.testing.assert_array_equal(
        less["posterior"]["kernel"], tree["posterior"]["kernel"][[0, 1, 3, 4]]
    )
    assert "some more diverged and are left out: 2" in bk.diagnose(less).verdict
    again = bk.load(bk.save(less, tmp_path / "networks.nc"))
    cmp = bk.compare(again, bk.solve(NETWORK, TASK))
    assert cmp.verdict.startswith("4 trained networks (1 more diverged, left out) and theory")
    assert again["training"].sizes["network"] == 5
    page = bk.report(cmp, tmp_path / "report.html").read_text()
    assert "bk.train(key, network, task, optimizer=&#39;gd&#39;" in page


def test_where_all_diverge_the_learning_rate_is_refused():
    with pytest.raises(InputError, match="learning_rate: expected one at which a network stays"):
        trained(learning_rate=1e4, num_steps=200)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": "newton"}, "optimizer: expected one of"),
        ({"optimizer": optax.sgd(0.1), "learning_rate": 0.1}, "learning_rate: expected none"),
        ({"learning_rate": 0}, "learning_rate: expected a finite number > 0"),
        ({"batch_size": 2}, "batch_size: expected none"),
        ({"optimizer": "sgd"}, "batch_size: expected a whole number of the 3 patterns"),
        ({"optimizer": "sgd", "batch_size": 4}, "batch_size: expected a whole number of the 3"),
        ({"at": (41,)}, "at: expected steps from 0 to 40"),
        ({"at": 3}, "at: expected steps from 0 to 40"),
        ({"num_networks": 0}, "num_networks: expected an integer >= 1"),
        ({"weight_decay": -1}, "weight_decay: expected a finite number > 0"),
    ],
)
def test_what_does_not_fit_is_refused(options, said):
    with pytest.raises(InputError, match=said):
        trained(**options)
