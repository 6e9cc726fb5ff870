"""Trained networks: Langevin's stationary law is the posterior, descent goes down, and nothing is trained twice alike."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bayeskernel as bk
from bayeskernel.errors import InputError
from bayeskernel.inference import descent, ensemble, weights
from bayeskernel.inference.curvature import steepest
from bayeskernel.inference.descent import loss, patterns_of
from bayeskernel.inference.record import settings
from bayeskernel.inference.train import arranged
from tests.conftest import normals

# One shape and one float type for most tests, as each is compiled for.
pytestmark = pytest.mark.usefixtures("double")
TASK = bk.tasks.endpoint([[1.0, 0.0], [0.5, 1.0], [-0.3, 0.4]], [0.8, -0.5, 0.3], 2)
NETWORK = bk.Network(12, "tanh", noise=0.5)
KEY = jax.random.key(5)


def trained(network=NETWORK, task=TASK, key=KEY, **options):
    options = {"optimizer": "gd", "num_steps": 40, "num_networks": 4, "progress": False} | options
    return bk.train(key, network, task, **options)


def parts(seed=0):
    """Structure, data and a position of the network of these tests."""
    net, data = weights.structure(NETWORK, 2), weights.arrays(NETWORK, TASK)
    return net, data, normals(net, TASK, seed)


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
        jax.random.key(1), LINEAR, ONE, num_warmup=300, num_samples=2000, num_chains=2, progress=False
    )  # fmt: skip
    assert bk.diagnose(draws).table["ess_bulk"].min() > 1000
    return draws


def langevin(rate=None, steps=500, count=400, at=()):
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
def test_langevin_s_stationary_law_is_the_posterior(exact):
    found = langevin()
    # Norms of blocks are free of signs.
    tables = [
        bk.diagnose(draws).table.filter(regex="norm|output.3", axis=0) for draws in (exact, found)
    ]
    (mean, other), (error, own) = ([t[name] for t in tables] for name in ("mean", "mcse"))
    assert len(other) == 7
    assert (own / mean.abs()).max() < 0.06  # small enough for the test to mean something
    assert ((other - mean) / np.hypot(error, own)).abs().max() < 4
    # Variances too: fluctuations are what a temperature sets.
    spread = [t["std"].filter(like="output") for t in tables]
    assert float(spread[1].iloc[0] / spread[0].iloc[0]) == pytest.approx(1, abs=5 / np.sqrt(800))


@pytest.mark.slow
def test_langevin_s_bias_falls_with_the_step(exact):
    """That of the outputs' variance, in the stiffest direction."""
    outputs = exact["posterior"]["output"].to_numpy()[..., 2, 0, 0]
    truth = np.mean((outputs - 1.5) ** 2)
    default = settings(langevin(steps=1, count=8))["learning_rate"]
    bias, error = np.empty(2), np.empty(2)
    for k, (factor, steps) in enumerate(((2.0, 600), (1.0, 1200))):
        at = range(steps // 2, steps, steps // 40)
        path = langevin(factor * default, steps, at=at)["training"]["squared_error"]
        each = path.to_numpy().mean(1) / truth
        bias[k], error[k] = each.mean() - 1, each.std() / np.sqrt(len(each))
    assert bias[0] > 5 * error[0]
    assert bias[0] - bias[1] > 4 * np.hypot(*error)
    assert abs(bias[1]) < bias[0] / 3


def test_langevin_steps_average_the_noise_of_neighbours():
    """Step by step from the equation in `descent`."""
    net, data, _ = parts()
    run = descent.Run(net, optax.scale(-1.0), True, None)
    keys, rate = jax.random.split(KEY, 4), 0.02
    z = start = descent.starts(keys, data, net)
    state = descent.begin(z, keys, data, rate, run)
    slope = jax.jit(jax.vmap(jax.grad(lambda z: loss(z, data, 1.0, net))))
    at = jax.jit(
        jax.vmap(
            lambda key, i: descent.draw_noise(jax.random.fold_in(key, i), net, data), (0, None)
        )
    )
    noise = [at(keys, i) for i in range(4)]
    near = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    jax.tree.map(near, descent.position(state, keys, 0, data, rate, run), start)
    for i in range(3):
        z = jax.tree.map(
            lambda z, g, now, then: z - rate * g + np.sqrt(rate / 2) * (now + then),
            z, slope(z), noise[i], noise[i + 1],
        )  # fmt: skip
    state = descent.advance(state, keys, data, rate, 1.0, 0, 3, run)
    jax.tree.map(near, descent.position(state, keys, 3, data, rate, run), z)


def test_noise_has_unit_variance_and_differs_between_steps_networks_and_sites():
    net, data, _ = parts()
    keys = jax.vmap(partial(jax.random.fold_in, KEY))(jnp.arange(400))
    drawn = jax.jit(jax.vmap(lambda key: descent.draw_noise(key, net, data)))(keys)
    assert {k: v.shape[1:] for k, v in drawn.items()} == weights.site_shapes(net, 2, 1)
    x = np.concatenate([np.asarray(v).reshape(400, -1) for v in drawn.values()], 1)
    assert abs(x.mean()) < 5 / np.sqrt(x.size)
    assert abs((x**2).mean() - 1) < 5 * np.sqrt(1.75 / x.size)
    assert (x**4).mean() == pytest.approx(2.75, rel=0.03)
    between = [x @ x.T / x.shape[1] - np.eye(400), x.T @ x / 400 - np.diag((x**2).mean(0))]
    for overlap, count in zip(between, x.shape[::-1], strict=True):
        assert np.abs(overlap).max() < 6 / np.sqrt(count)


@pytest.mark.parametrize(
    ("activation", "width"),
    [
        ("relu", 12),  # of these the first to notice a rate too large
        *(pytest.param(a, 12, marks=pytest.mark.slow) for a in ("linear", "erf", "tanh")),
        *(pytest.param(a, 40, marks=pytest.mark.slow) for a in ("linear", "erf", "tanh", "relu")),
    ],
)
def test_descent_goes_down_at_every_step_of_the_default_rate(activation, width):
    network = bk.Network(width, activation, noise=0.2)
    values = trained(network, num_steps=150, at=range(150))["training"]["loss"].to_numpy()
    assert values.shape == (4, 151)
    # Minima of relu networks lie on kinks, about which descent goes to and fro.
    allowed = 5e-3 if activation == "relu" else 1e-5
    assert np.all(np.diff(values, axis=1) < allowed * values[:, :1])
    assert np.all(values[:, -1] < 0.7 * values[:, 0])


def test_without_weight_decay_descent_interpolates():
    error = trained(weight_decay=0, num_steps=3000)["training"]["squared_error"]
    assert float(error[:, -1].max()) < 1e-6 * float(error[:, 0].min())


def test_loss_is_minus_the_log_posterior():
    net, data, one = parts(0)
    two = parts(1)[2]

    @jax.jit
    def log_posterior(z):
        prior = sum(-jnp.sum(x**2) / 2 for x in z.values())
        return weights.log_likelihood(net, z, data) + prior

    own = jax.jit(partial(loss, net=net))
    difference = own(one, data, 1.0) - own(two, data, 1.0)
    assert float(difference) == pytest.approx(float(log_posterior(two) - log_posterior(one)))
    h = weights.preactivations(one, net, data)
    output = np.asarray(weights.outputs(one, h, net, data))
    misfit = np.nansum((output - TASK.targets) ** 2) * 12 / 0.5 / 2
    assert float(own(one, data, 0.0)) == pytest.approx(misfit)


def test_training_goes_down_the_loss_that_was_asked_for():
    """Three steps by hand, at a weight decay that is not the default."""
    net, data, _ = parts()
    z = descent.starts(jax.random.split(jax.random.split(KEY, 3)[0], 4), data, net)
    slope = jax.jit(jax.vmap(jax.grad(lambda z: loss(z, data, 0.7, net))))
    for _ in range(3):
        z = jax.tree.map(lambda x, g: x - 0.01 * g, z, slope(z))
    path = trained(learning_rate=0.01, weight_decay=0.7, num_steps=3)["training"]
    for name in ("kernel", "loss"):
        expected = descent.observed(z, data, 0.7, net)[name]
        np.testing.assert_allclose(path[name][:, -1], expected, rtol=1e-9, atol=1e-12)


def test_batches_are_right_on_average():
    net, data, z = parts()
    slope = jax.jit(jax.grad(partial(loss, decay=1.0, net=net)))
    pieces = [slope(z, patterns_of(data, jnp.array([a])), share=1 / 3) for a in range(3)]
    mean = jax.tree.map(lambda *g: sum(g) / 3, *pieces)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9), mean, slope(z, data, share=1.0))


def test_batches_of_all_patterns_are_descent():
    full = trained(learning_rate=0.01)["training"]["kernel"]
    batch = trained(learning_rate=0.01, optimizer="sgd", batch_size=3)["training"]["kernel"]
    np.testing.assert_allclose(batch, full, rtol=1e-9, atol=1e-12)
    small = trained(learning_rate=0.01, optimizer="sgd", batch_size=1)["training"]["kernel"]
    assert not np.allclose(small[:, -1], full[:, -1], rtol=1e-3)


def test_one_of_equal_patterns_counts_for_all():
    task = bk.tasks.endpoint([[1.0, 0.5]] * 3, [0.8] * 3, 2)
    full = trained(task=task, learning_rate=0.01)["training"]
    batch = trained(task=task, learning_rate=0.01, optimizer="sgd", batch_size=1)["training"]
    np.testing.assert_allclose(batch["kernel"], full["kernel"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"optimizer": "adam"}, {"optimizer": optax.adam(0.02), "batch_size": 2}],
    ids=["adam", "optax"],
)
def test_others_learn_too(options):
    error = trained(**options, num_steps=300, weight_decay=0)["training"]["squared_error"]
    assert np.all(error[:, -1] < 0.3 * error[:, 0])


def test_any_architecture_is_trained():
    network = bk.Network(10, "erf", "untied", layers=2, leak=0.5, bias_std=0.3, scaling="standard")
    tree = trained(network, optimizer="adam", num_steps=10, keep=("weights",))
    assert np.isfinite(tree["posterior"]["kernel"]).all()
    assert "layer" in tree["posterior"]["kernel"].dims
    assert tree["training"]["kernel"].dims[:2] == ("network", "training_step")
    np.testing.assert_array_equal(
        tree["training"]["kernel"].isel(training_step=-1), tree["posterior"]["kernel"][:, 0]
    )
    assert (
        tree["posterior"].sizes["recurrent_label"]
        == tree["posterior"]["recurrent_weights"].shape[2]
    )


def test_starts_are_prior_draws():
    net, data, _ = parts()
    four = [descent.starts(keys, data, net) for keys in jax.random.split(KEY, (50, 4))]
    x = np.stack(
        [
            np.concatenate([np.asarray(v[k]).ravel() for v in z.values()])
            for z in four
            for k in range(4)
        ]
    )
    assert abs(x.mean()) < 5 / np.sqrt(x.size)
    assert abs((x**2).mean() - 1) < 5 * np.sqrt(2 / x.size)
    assert np.abs(x @ x.T / x.shape[1] - np.diag((x**2).mean(1))).max() < 6 / np.sqrt(x.shape[1])
    # Networks begin there, whatever noise comes.
    first = descent.starts(jax.random.split(jax.random.split(KEY, 3)[0], 4), data, net)
    kernel = descent.observed(first, data, 1.0, net)["kernel"]
    for optimizer in ("gd", "langevin"):
        start = trained(optimizer=optimizer, learning_rate=0.01)["training"]["kernel"]
        np.testing.assert_allclose(start.sel(training_step=0), kernel, rtol=1e-9)


def test_weights_that_are_kept_are_those_of_the_network():
    """The network run by hand gives the kernels and outputs that are stored."""
    tree = trained(optimizer="langevin", learning_rate=0.01, keep=("weights",))
    posterior = tree["posterior"]
    W, U, v = (
        posterior[f"{kind}_weights"][:, 0, 0].to_numpy()
        for kind in ("recurrent", "input", "readout")
    )
    for n in range(4):
        first = np.tanh(TASK.inputs[0] @ U[n].T)
        phi = np.stack([first, np.tanh(first @ W[n].T + TASK.inputs[1] @ U[n].T)])
        kernel = np.einsum("tai,sbi->tasb", phi, phi) / 12
        np.testing.assert_allclose(posterior["kernel"][n, 0], kernel, rtol=1e-9)
        np.testing.assert_allclose(posterior["output"][n, 0], phi @ v[n].T / 12, rtol=1e-9)
    assert "recurrent_weights" not in trained(optimizer="langevin", learning_rate=0.01)["posterior"]


def test_the_same_key_trains_the_same_networks_however_steps_are_cut(monkeypatch):
    options = {"optimizer": "langevin", "learning_rate": 0.01}
    one = trained(**options)["training"]["kernel"]
    monkeypatch.setattr(ensemble, "_MOST", 3)
    np.testing.assert_array_equal(one, trained(**options)["training"]["kernel"])
    between = trained(**options, at=(0, 7, 13))["training"]
    assert between["training_step"].to_numpy().tolist() == [0, 7, 13, 40]
    np.testing.assert_array_equal(one[:, -1], between["kernel"][:, -1])
    other = trained(**options, key=jax.random.key(6))["training"]["kernel"]
    assert not np.allclose(one[:, 0], other[:, 0], rtol=1e-3)


def test_blocks_of_networks_are_trained_as_each_alone(monkeypatch):
    options = {"optimizer": "langevin", "learning_rate": 0.01}
    together = trained(**options)["training"]["kernel"]
    monkeypatch.setattr(ensemble, "_BLOCK", 1)
    np.testing.assert_allclose(together, trained(**options)["training"]["kernel"], rtol=1e-9)
    assert ensemble.block_size(12, 4) == 1
    monkeypatch.undo()
    assert [
        ensemble.block_size(*given) for given in ((12, 3), (64, 20), (100, 8), (1024, 8), (100, 7))
    ] == [3, 10, 4, 1, 1]


def diverged(tree, network):
    """Networks as they come, with numbers of one of them not finite."""
    path, trace = (tree[group].to_dataset() for group in ("training", "trace"))
    rows = {k: path[k].to_numpy().copy() for k in ("kernel", "output")}
    rows |= {k: trace[k].to_numpy().copy() for k in ("norm", "loss", "squared_error")}
    rows["kernel"][network, -1, 0, 0, 0, 0] = np.nan
    return arranged(rows, trace["training_step"].to_numpy().tolist(), NETWORK, TASK, settings(tree))


def test_networks_that_diverged_are_left_out(tmp_path):
    tree = trained(learning_rate=0.01)
    less = diverged(tree, 2)
    assert less["training"]["diverged"].to_numpy().tolist() == [False, False, True, False]
    np.testing.assert_array_equal(
        less["posterior"]["kernel"], tree["posterior"]["kernel"][[0, 1, 3]]
    )
    assert "some more diverged and are left out: 2" in bk.diagnose(less).verdict
    again = bk.load(bk.save(less, tmp_path / "networks.nc"))
    cmp = bk.compare(again, bk.solve(NETWORK, TASK))
    assert cmp.verdict.startswith("3 networks trained by gd (1 more diverged, left out) ")
    np.testing.assert_allclose(
        cmp.kernel[0], tree["posterior"]["kernel"][[0, 1, 3], 0, 0].mean("chain")
    )
    assert again["training"].sizes["network"] == 4
    page = bk.report(cmp, tmp_path / "report.html").read_text()
    assert "bk.train(key, network, task, optimizer=&#39;gd&#39;" in page


def test_a_network_that_diverges_on_its_own_is_left_out(monkeypatch):
    """One start far outside, whose descent is unstable at a rate that suits the others."""
    begin = descent.starts

    def far(keys, data, net):
        z = begin(keys, data, net)
        return z | {"readout": z["readout"].at[1].multiply(1e160)}

    monkeypatch.setattr("bayeskernel.inference.train.starts", far)
    tree = trained(learning_rate=0.01)
    assert tree["training"]["diverged"].to_numpy().tolist() == [False, True, False, False]
    assert settings(tree)["left_out"] == [1]
    assert tree["posterior"].sizes["chain"] == 3
    assert np.isfinite(tree["posterior"]["kernel"]).all()


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
        ({"keep": ("preactivations",)}, r"keep: expected \(\) or \('weights',\)"),
        ({"keep": "weights"}, r"keep: expected \(\) or \('weights',\)"),
        ({"checkpoint": 3}, "checkpoint: expected the path of a folder"),
        ({"weight_decay": -1}, "weight_decay: expected a finite number > 0"),
    ],
)
def test_what_does_not_fit_is_refused(options, said):
    with pytest.raises(InputError, match=said):
        trained(**options)
