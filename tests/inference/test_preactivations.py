"""The whitened pre-activation model against explicit formulas; rank-deficient tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer.util import log_density
from scipy.stats import norm

import bayeskernel as bk
from bayeskernel.inference import coordinates as co
from bayeskernel.inference import preactivations as pre
from bayeskernel.inference import readout
from bayeskernel.problem import problem

from . import references

SHARING = bk.Sharing([0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1])
SCALES = {"input_std": 0.7, "recurrent_std": 1.3, "readout_std": 1.2, "noise": 0.2}


def posterior(network, task):
    defined = problem(network, task)
    return co.coordinates(defined, co.find_pivots(defined)), co.arrays(defined)


def preactivations(z, coordinates, data):
    return np.stack([np.asarray(step.h) for step in pre.unfold(z, coordinates, data)[0]])


@pytest.mark.parametrize("scaling", ["mean_field", "standard"])
@pytest.mark.parametrize("activation", ["linear", "erf", "relu"])
def test_density_is_its_definition(activation, scaling, general_task, double):
    network = bk.Network(9, activation, SHARING, scaling=scaling, **SCALES)
    coordinates, data = posterior(network, general_task)
    K, S = references.kernel_maps(network, general_task, SHARING)

    def phi(x):
        return np.asarray(network.phi(jnp.asarray(x)))

    def expected(z):
        h = references.preactivations(z, network, general_task, K, phi)
        h_here = preactivations(jnp.asarray(z), coordinates, data).reshape(8, 9)
        assert h_here == pytest.approx(h, rel=1e-8)
        return references.log_evidence(phi(h) @ phi(h).T / 9, network, general_task, S)

    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 8, 9))
    values = [float(pre.log_likelihood(jnp.asarray(z), coordinates, data)) for z in (one, two)]
    # The package leaves out constants, ln N for scaling.
    assert values[0] - values[1] == pytest.approx(expected(one) - expected(two), rel=1e-9)


def differentiable(z, network, task, coordinates, data):
    """The same function by library calls, for automatic differentiation; pivots are known."""
    T, P = task.shape[:2]
    recurrent = jnp.repeat(jnp.repeat(data.recurrent, P, 0), P, 1)
    C, h = jnp.zeros((T * P, T * P)), jnp.zeros((0, network.width))
    pivots, used, sites = coordinates.pivots, 0, []
    for t in range(T):
        K = data.input_kernel + recurrent * jnp.pad(C[: -P or None, : -P or None], ((P, 0), (P, 0)))
        sites = sites + [t * P + a for a in pivots[t]]
        used += len(pivots[t])
        index = np.array(sites)
        L = jnp.linalg.cholesky(K[index][:, index])
        own = np.arange(t * P, (t + 1) * P)
        A = jax.scipy.linalg.solve_triangular(L, K[index][:, own], lower=True).T
        h = jnp.concatenate([h, A @ z[:used]])
        activities = jnp.pad(network.phi(h), ((0, T * P - len(h)), (0, 0)))
        C = activities @ activities.T / network.width
    total, count = 0.0, network.width if coordinates.mean_field else 1
    for o in range(task.shape[3]):
        sites = np.flatnonzero(task.supervised[..., o].ravel())
        readout_ = jnp.repeat(jnp.repeat(data.readout, P, 0), P, 1)
        S = (readout_ * C)[sites][:, sites] + network.noise * jnp.eye(len(sites))
        y = task.targets[..., o].ravel()[sites]
        total -= count / 2 * y @ jnp.linalg.solve(S, y) + jnp.linalg.slogdet(S)[1] / 2
    return total


GRADIENTS = {
    "mixed": (bk.Network(9, "erf", SHARING, **SCALES), None),
    "standard": (bk.Network(9, "relu", SHARING, scaling="standard", **SCALES), None),
    "duplicates": (
        bk.Network(12, "tanh"),
        bk.tasks.endpoint([[1.0, 0.5], [0.3, -1.0], [1.0, 0.5]], [1.0, -1.0, 0.5], 3),
    ),
    "fewer inputs than patterns": (
        bk.Network(200, "erf", noise=0.3),
        bk.tasks.digits(patterns_per_class=10, steps=4).scaled(2.0),
    ),
    "many outputs, first step alone": (
        bk.Network(9, "erf"),
        bk.Task(
            np.random.default_rng(0).normal(size=(2, 3, 4)),
            np.stack([np.eye(3), np.full((3, 3), np.nan)]),
        ),
    ),
    "one step": (bk.Network(9, "tanh"), bk.tasks.endpoint(np.eye(3), [1.0, -1.0, 0.5], 1)),
}


_LENGTHY = ("fewer inputs than patterns", "many outputs, first step alone")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in _LENGTHY else n for n in GRADIENTS],
)
def test_gradient_is_that_of_automatic_differentiation(name, general_task, double):
    network, task = GRADIENTS[name]
    task = task or general_task
    coordinates, data = posterior(network, task)
    z = jnp.asarray(np.random.default_rng(1).normal(size=(coordinates.rank, network.width)))
    reference = jax.value_and_grad(differentiable)
    (value, expected), (found, gradient) = (
        jax.jit(f)(z)
        for f in (
            lambda z: reference(z, network, task, coordinates, data),
            lambda z: pre.log_likelihood_and_gradient(z, coordinates, data),
        )
    )
    assert float(found) == pytest.approx(float(value), rel=1e-10)
    error = np.abs(np.asarray(gradient - expected)).max()
    assert error < 1e-10 * np.abs(np.asarray(expected)).max()
    pulled = jax.grad(lambda z: 3.0 * pre.log_likelihood(z, coordinates, data))(z)
    assert np.abs(np.asarray(pulled - 3 * gradient)).max() < 1e-9 * np.abs(np.asarray(pulled)).max()


def test_numpyro_model_is_prior_times_likelihood(general_task, double):
    network = bk.Network(9, "erf", SHARING, **SCALES)
    coordinates, data = posterior(network, general_task)
    z = jax.random.normal(jax.random.key(1), (8, 9))
    value, trace = log_density(pre.model, (coordinates, data), {}, {"z": z})
    expected = float(pre.log_likelihood(z, coordinates, data)) + norm.logpdf(np.asarray(z)).sum()
    assert float(value) == pytest.approx(expected, rel=1e-12)
    phi = np.asarray(network.phi(preactivations(z, coordinates, data)))
    kernel = np.einsum("tai,sbi->tasb", phi, phi) / 9
    assert trace["kernel"]["value"] == pytest.approx(kernel)


@pytest.mark.parametrize("activation", ["linear", "relu"])
def test_duplicate_patterns_are_equal_units(activation, double):
    task = bk.tasks.endpoint([[1.0, 0.5], [0.3, -1.0], [1.0, 0.5]], [1.0, -1.0, 0.5], 3)
    network = bk.Network(12, activation)
    coordinates, data = posterior(network, task)
    assert [len(p) for p in coordinates.pivots] == [2, 2, 2]
    z = jax.random.normal(jax.random.key(0), (coordinates.rank, 12))
    h = preactivations(z, coordinates, data)
    assert h[:, 0] == pytest.approx(h[:, 2], abs=1e-9)
    gradient = pre.log_likelihood_and_gradient(z, coordinates, data)[1]
    assert np.isfinite(np.asarray(gradient)).all()


def test_more_patterns_than_reachable_directions(double):
    """d > N + D: at step 2 only N directions of W phi(h) + U x are new."""
    rng = np.random.default_rng(0)
    task = bk.tasks.endpoint(rng.normal(size=(7, 3)), rng.normal(size=7), 3)
    network = bk.Network(4, "tanh")
    coordinates, data = posterior(network, task)
    # One matrix W of 4 columns serves both steps: 3 + 4 directions in all.
    assert [len(p) for p in coordinates.pivots] == [3, 4, 0]
    h = preactivations(jax.random.normal(jax.random.key(2), (7, 4)), coordinates, data)
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
    coordinates, data = posterior(network, task)
    count = 20_224  # whole batches: compiled once
    keys = jax.random.split(jax.random.key(0), count)

    @jax.jit
    def kernels(keys):
        z = jax.vmap(lambda k: jax.random.normal(k, (coordinates.rank, 6)))(keys)
        return jax.lax.map(
            lambda z: pre.full_kernel(pre.unfold(z, coordinates, data)[0], coordinates), z
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
    coordinates, data = posterior(network, task)
    phi = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 5)))
    count = 40_000
    draw = jax.vmap(lambda k: readout.draw(k, phi, coordinates, data))
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


def test_correlated_sites_in_float32():
    """Conditioned in float32 they had no likelihood: K, rounded, was not positive."""
    network, task = bk.Network(128, "erf", noise=0.1), bk.tasks.digits((0, 1), 24, 4)
    coordinates, data = posterior(network, task)
    z = np.random.default_rng(0).normal(size=(coordinates.rank, 128))
    likelihood = jax.jit(pre.log_likelihood_and_gradient, static_argnums=1)
    value, gradient = likelihood(jnp.float32(z), coordinates, data)
    assert value.dtype == gradient.dtype == jnp.float32
    with jax.enable_x64(True):
        exact, slope = likelihood(jnp.asarray(z), coordinates, co.arrays(problem(network, task)))
    assert float(value) == pytest.approx(float(exact), rel=3e-4)
    assert np.linalg.norm(np.asarray(gradient) - np.asarray(slope)) < 0.01 * np.linalg.norm(slope)
