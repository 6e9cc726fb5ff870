import jax
import numpy as np
import pytest
from scipy.integrate import dblquad
from scipy.special import erf

import bayeskernel as bk
from bayeskernel.activations import resolve
from bayeskernel.meanfield.prior import gaussian_average

K = np.array([[1.3, 0.4], [0.4, 0.7]])
EVERY = np.ones((2, 2), bool)
PHI = {
    "linear": float,
    "erf": lambda x: erf(np.sqrt(np.pi) / 2 * x),
    "relu": lambda x: max(x, 0.0),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("name", PHI)
def test_gaussian_average_is_its_integral(name, double):
    phi, function = resolve(name), PHI[name]
    inverse, norm = np.linalg.inv(K), 2 * np.pi * np.sqrt(np.linalg.det(K))

    def integrand(y, x):
        h = np.array([x, y])
        return function(x) * function(y) * np.exp(-h @ inverse @ h / 2) / norm

    expected = dblquad(integrand, -7, 7, -7, 7, epsabs=1e-6)[0]
    assert gaussian_average(phi, K, *EVERY)[0, 1] == pytest.approx(expected, abs=1e-5)


def test_quadrature_agrees_with_the_closed_form(double):
    named = resolve("erf")
    same = resolve(lambda x: named(x))
    expected = gaussian_average(named, K, *EVERY)
    assert gaussian_average(same, K, *EVERY) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("activation", "sharing"),
    [
        pytest.param("linear", "tied", marks=pytest.mark.slow),
        pytest.param("linear", "untied", marks=pytest.mark.slow),
        pytest.param("erf", "tied", marks=pytest.mark.slow),
        pytest.param("erf", "untied", marks=pytest.mark.slow),
    ],
)
def test_prior_draws_approach_the_recursion_as_one_over_root_width(activation, sharing):
    """Each draw strays by about std/sqrt(N); the mean by O(1/N) and its Monte-Carlo error."""
    task = bk.Task(np.random.default_rng(2).normal(size=(3, 2, 3)), np.ones((3, 2)))
    spread, count = [], 400
    for width in (32, 128, 512):
        network = bk.Network(width, activation, sharing)
        expected = bk.prior_kernel(network, task)
        kernels = bk.sample_prior(jax.random.key(width), network, task, num_samples=count)["prior"][
            "kernel"
        ][0]
        values = kernels.to_numpy()
        std = values.std(axis=0)
        bias = 5 * np.sqrt(std**2 / count + (std**2 / np.abs(expected).max()) ** 2)
        assert (np.abs(values.mean(axis=0) - expected) < bias + 1e-6).all()
        spread.append(np.sqrt(np.mean((values - expected) ** 2)))
    # The standard error of a standard deviation from 400 draws is 3.5 %; entries are correlated.
    assert spread[0] / spread[1] == pytest.approx(2, rel=0.15)
    assert spread[1] / spread[2] == pytest.approx(2, rel=0.15)
