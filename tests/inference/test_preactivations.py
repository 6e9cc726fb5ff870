"""The whitened pre-activation model against explicit formulas; rank-deficient tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer.util import log_density
from scipy.stats import norm

import bayeskernel as bk
from bayeskernel.inference import preactivations as pre
from bayeskernel.inference import rotation

from . import references

SHARING = bk.Sharing([0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1])
SCALES = {"input_std": 0.7, "recurrent_std": 1.3, "readout_std": 1.2, "noise": 0.2}


def coordinates(network, task):
    return pre.coordinates(network, pre.find_pivots(jax.random.key(0), network, task))


@pytest.mark.parametrize("scaling", ["mean_field", "standard"])
@pytest.mark.parametrize("activation", ["linear", "erf", "relu"])
def test_density_is_its_definition(activation, scaling, general_task, double):
    network = bk.Network(9, activation, SHARING, scaling=scaling, **SCALES)
    at, given = coordinates(network, general_task), pre.data(network, general_task)
    z = np.random.default_rng(0).normal(size=(8, 9))
    K, S = references.kernel_maps(network, general_task, SHARING)
    h = references.preactivations(
        z, network, general_task, K, lambda x: np.asarray(network.phi(jnp.asarray(x)))
    )
    assert np.asarray(pre.preactivations(jnp.asarray(z), at, given)).reshape(8, 9) == pytest.approx(
        h, rel=1e-8
    )
    phi = np.asarray(network.phi(jnp.asarray(h)))
    expected = references.log_evidence(phi @ phi.T / 9, network, general_task, S)
    evidence = float(
        rotation.log_likelihood(lambda d: pre.model(at, d))({"z": jnp.asarray(z)}, given)
    )
    # The package leaves out constants: ln N for scaling, ln kappa for entries without a target.
    other = np.random.default_rng(1).normal(size=(8, 9))
    h2 = references.preactivations(
        other, network, general_task, K, lambda x: np.asarray(network.phi(jnp.asarray(x)))
    )
    phi2 = np.asarray(network.phi(jnp.asarray(h2)))
    expected -= references.log_evidence(phi2 @ phi2.T / 9, network, general_task, S)
    evidence -= float(
        rotation.log_likelihood(lambda d: pre.model(at, d))({"z": jnp.asarray(other)}, given)
    )
    assert evidence == pytest.approx(expected, rel=1e-9)


def test_numpyro_model_is_prior_times_evidence(general_task, double):
    network = bk.Network(9, "erf", SHARING, **SCALES)
    at, given = coordinates(network, general_task), pre.data(network, general_task)
    z = {"z": jax.random.normal(jax.random.key(1), (8, 9))}
    evidence = float(rotation.log_likelihood(lambda d: pre.model(at, d))(z, given))
    value, trace = log_density(pre.model, (at, given), {}, z)
    assert float(value) == pytest.approx(
        evidence + norm.logpdf(np.asarray(z["z"])).sum(), rel=1e-12
    )
    h = pre.preactivations(z["z"], at, given)
    assert trace["kernel"]["value"] == pytest.approx(np.asarray(pre.kernel_of(network.phi(h), at)))


@pytest.mark.parametrize("activation", ["linear", "relu"])
def test_duplicate_patterns_are_equal_units(activation, double):
    task = bk.tasks.endpoint([[1.0, 0.5], [0.3, -1.0], [1.0, 0.5]], [1.0, -1.0, 0.5], 3)
    network = bk.Network(12, activation)
    at, given = coordinates(network, task), pre.data(network, task)
    assert [len(p) for p in at.pivots] == [2, 2, 2]
    z = jax.random.normal(jax.random.key(0), (at.rank, 12))
    h = np.asarray(pre.preactivations(z, at, given))
    assert h[:, 0] == pytest.approx(h[:, 2], abs=1e-9)
    gradient = jax.grad(
        lambda z: pre.log_evidence(
            pre.kernel_of(network.phi(pre.preactivations(z, at, given)), at), at, given
        )
    )(z)
    assert np.isfinite(np.asarray(gradient)).all()


def test_more_patterns_than_reachable_directions(double):
    """d > N + D: at step 2 only N directions of W phi(h) + U x are new."""
    rng = np.random.default_rng(0)
    task = bk.tasks.endpoint(rng.normal(size=(7, 3)), rng.normal(size=7), 3)
    network = bk.Network(4, "tanh")
    at, given = coordinates(network, task), pre.data(network, task)
    # One matrix W of 4 columns serves both steps: 3 + 4 directions in all.
    assert [len(p) for p in at.pivots] == [3, 4, 0]
    h = np.asarray(pre.preactivations(jax.random.normal(jax.random.key(2), (7, 4)), at, given))
    x, phi = task.inputs, np.tanh(h)
    before = np.concatenate([phi[0], phi[1]])
    W = np.linalg.lstsq(before, np.concatenate([h[1], h[2]]), rcond=None)[0]
    assert before @ W == pytest.approx(np.concatenate([h[1], h[2]]), abs=1e-7)
    U = np.linalg.lstsq(x[0], h[0], rcond=None)[0]
    assert x[0] @ U == pytest.approx(h[0], abs=1e-9)


def test_prior_of_the_map_is_the_prior_of_the_network():
    """z ~ N(0, 1) must give the kernels that weights from the prior give, at the same narrow width."""
    task = bk.Task(np.random.default_rng(2).normal(size=(3, 2, 3)), np.ones((3, 2)))
    network = bk.Network(6, "relu", [0, 0, 1], recurrent_std=1.2)
    at, given = coordinates(network, task), pre.data(network, task)
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)

    @jax.jit
    def kernels(keys):
        z = jax.vmap(lambda k: jax.random.normal(k, (at.rank, 6)))(keys)
        return jax.lax.map(
            lambda z: pre.kernel_of(network.phi(pre.preactivations(z, at, given)), at), z
        )

    mapped = np.asarray(kernels(keys), np.float64)
    direct = bk.sample_prior(jax.random.key(1), network, task, num_samples=count)["prior"]["kernel"]
    direct = direct.to_numpy()[0].astype(np.float64)
    for power in (1, 2):
        one, two = mapped**power, direct**power
        error = np.sqrt((one.var(axis=0) + two.var(axis=0)) / count)
        assert np.abs((one.mean(axis=0) - two.mean(axis=0)) / error).max() < 5


def test_readout_is_drawn_from_its_conditional(double):
    """Mean and covariance of v given activities and targets, against Gaussian conditioning."""
    task = bk.tasks.sine(2, 3, supervised=[1, 3])
    network = bk.Network(5, "tanh", bk.Sharing(readout=[0, 1, 0]), noise=0.3, readout_std=1.4)
    at, given = coordinates(network, task), pre.data(network, task)
    phi = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 5)))
    count = 40_000
    draw = jax.vmap(lambda k: pre.draw_readout(k, phi, at, given))
    v = np.asarray(draw(jax.random.split(jax.random.key(0), count)))[:, :, 0]
    # Readout 0 reads steps 1 and 3 and sees all targets; readout 1 stays at its prior.
    A = np.asarray(phi)[[0, 2]].reshape(4, 5) / 5
    precision = np.eye(5) / 1.4**2 + A.T @ A / (0.3 / 5)
    covariance = np.linalg.inv(precision)
    mean = covariance @ A.T @ task.targets[[0, 2], :, 0].ravel() / (0.3 / 5)
    assert np.abs((v[:, 0].mean(0) - mean) / np.sqrt(np.diag(covariance) / count)).max() < 5
    error = np.sqrt((np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2) / count)
    assert np.abs((np.cov(v[:, 0].T) - covariance) / error).max() < 5
    assert np.abs(v[:, 1].mean(0)).max() < 5 * 1.4 / np.sqrt(count)
