"""Many correlated sites: moving particles against the closed form of linear networks and against weighted particles."""

import jax
import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel.meanfield import crowd
from bayeskernel.meanfield.fluctuations import FluctuationError
from bayeskernel.meanfield.newton import Status

# Two digits of each class, read in four steps.
TASK = bk.tasks.digits(patterns_per_class=2, steps=4).scaled(2.0)


def relative(one, two):
    return np.linalg.norm(one - two) / np.linalg.norm(two)


@pytest.fixture(autouse=True)
def every_group_is_a_crowd(monkeypatch):
    monkeypatch.setattr(crowd, "_MOST_STATISTICS", 5)


@pytest.mark.parametrize("sharing", ["tied", pytest.param("untied", marks=pytest.mark.slow)])
def test_linear_units_against_their_closed_form(sharing):
    exact = bk.solve(bk.Network(512, "linear", sharing, noise=0.3), TASK)
    network = bk.Network(512, lambda h: 1.0 * h, sharing, noise=0.3)
    theory = bk.solve(network, TASK)
    assert theory.converged
    error = np.linalg.norm(theory.monte_carlo_error) / np.linalg.norm(theory.kernel)
    assert error < 0.008
    assert relative(theory.kernel, exact.kernel) < 5 * error
    assert relative(theory.conjugate, exact.conjugate) < 0.1
    assert theory.output == pytest.approx(exact.output, abs=0.05)
    assert theory.branches[0].curvature == pytest.approx(exact.branches[0].curvature, rel=0.1)
    assert relative(theory.kernel_std(), exact.kernel_std()) < 0.2
    assert np.isnan(theory.free_energy)
    with pytest.raises(FluctuationError):
        theory.kernel_shift()


@pytest.mark.slow
def test_erf_units_against_weighted_particles(monkeypatch):
    network = bk.Network(512, "erf", noise=0.3)
    moving, other = bk.solve(network, TASK), bk.solve(network, TASK, jax.random.key(1))
    assert np.array_equal(moving.kernel, bk.solve(network, TASK).kernel)
    monkeypatch.setattr(crowd, "_MOST_STATISTICS", 300)
    weighted = bk.solve(network, TASK)
    for theory in (other, weighted):
        error = np.hypot(moving.monte_carlo_error, theory.monte_carlo_error)
        assert np.linalg.norm(moving.kernel - theory.kernel) < 5 * np.linalg.norm(error)


def test_an_iteration_that_leaves_the_domain_says_so():
    task = bk.tasks.endpoint(2 * np.eye(4), [400.0, 400.0, -400.0, -400.0], 4)
    theory = bk.solve(bk.Network(64, "relu", noise=0.01), task)
    assert not theory.converged
    assert theory.result in set(Status)
    assert np.isnan(theory.monte_carlo_error).all() or theory.result is Status.MAX_STEPS


def test_trials_with_sites_that_nearly_coincide(monkeypatch):
    """All inputs are the same while an animal fixates, and none come while it answers."""
    task = bk.tasks.decision((0.5,), steps=4, stimulus=1)
    network = bk.Network(512, "erf", noise=1.0)
    moving = bk.solve(network, task)
    monkeypatch.setattr(crowd, "_MOST_STATISTICS", 300)
    weighted = bk.solve(network, task)
    assert moving.converged
    assert weighted.converged
    error = np.hypot(moving.monte_carlo_error, weighted.monte_carlo_error)
    assert np.linalg.norm(error) < 0.01 * np.linalg.norm(weighted.kernel)
    assert np.linalg.norm(moving.kernel - weighted.kernel) < 5 * np.linalg.norm(error)


def test_kernels_out_of_balance_are_not_converged(monkeypatch):
    monkeypatch.setattr(crowd, "_BALANCED", 1e-9)
    theory = bk.solve(bk.Network(64, "erf", noise=1.0), TASK)
    assert theory.result is Status.MAX_STEPS
    assert np.isfinite(theory.kernel).all()
