"""Exact theory for any activation: tables, closed forms, the other solver, independent integrals."""

import jax
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import erf

import bayeskernel as bk
from bayeskernel.gauge import flip_kernel
from bayeskernel.meanfield import grid
from bayeskernel.meanfield.fluctuations import FluctuationError
from bayeskernel.meanfield.prior import prior_kernel

ENDPOINT = bk.tasks.endpoint([[1.0]], [2.0], 3)
ERF = bk.Network(512, "erf", noise=0.1)


def matrix(kernel):
    size = kernel.shape[0] * kernel.shape[1]
    return kernel.reshape(size, size)


@pytest.fixture(scope="module")
def coherent():
    return bk.solve(ERF, ENDPOINT)


def test_reference_table_2(coherent):
    C = np.abs(matrix(coherent.kernel))
    # Printed to four digits in docs/theory.
    assert np.diag(C) == pytest.approx([0.5055, 0.5228, 0.6543], abs=3e-4)
    assert [C[0, 1], C[0, 2], C[1, 2]] == pytest.approx([0.2364, 0.2021, 0.4482], abs=4e-4)
    assert coherent.free_energy == pytest.approx(3.633, abs=5e-4)
    assert coherent.converged
    assert coherent.residual < 1e-7
    assert not coherent.monte_carlo_error.any()
    weak = bk.solve(ERF, ENDPOINT.scaled(0.5))
    assert np.diag(matrix(weak.kernel)) == pytest.approx([0.4764, 0.3779, 0.3944], abs=1e-4)
    assert np.abs(bk.coherence(weak.kernel) - np.eye(3)).max() < 1e-9


def test_branches_of_a_broken_symmetry(coherent):
    stable, saddle_point = coherent.branches
    assert stable.stable
    assert not saddle_point.stable
    assert stable.free_energy < saddle_point.free_energy
    untied = bk.solve(bk.Network(512, "erf", "untied", noise=0.1), ENDPOINT)
    assert saddle_point.kernel == pytest.approx(untied.kernel, abs=1e-5)
    assert saddle_point.free_energy == pytest.approx(untied.free_energy, abs=1e-6)


def test_one_step_against_an_independent_integral():
    """T = 1: one scalar equation, Ct = a^2, C = <phi^2> under exp(-h^2/2 + Ct phi^2/2)."""
    y, noise = 2.0, 0.1

    def phi(h):
        return erf(np.sqrt(np.pi) / 2 * h)

    def average(f, Ct):
        return quad(lambda h: f(h) * np.exp(-(h**2) / 2 + Ct * phi(h) ** 2 / 2), -12, 12)[0]

    def kernel(Ct):
        return average(lambda h: phi(h) ** 2, Ct) / average(lambda h: 1.0, Ct)

    C = brentq(lambda C: C - kernel((y / (C + noise)) ** 2), 0.05, 0.999, xtol=1e-13)
    theory = bk.solve(ERF, bk.Task(np.ones((1, 1, 1)), [[y]]))
    assert theory.kernel.item() == pytest.approx(C, abs=1e-7)
    Ct = (y / (C + noise)) ** 2
    Z = average(lambda h: 1.0, Ct) / np.sqrt(2 * np.pi)
    F = y**2 / (C + noise) / 2 + Ct * C / 2 - np.log(Z)
    assert theory.free_energy == pytest.approx(F, abs=1e-7)


@pytest.mark.parametrize("sharing", ["tied", [0, 0, 1], "untied"])
def test_linear_networks_against_the_gaussian_solver(sharing):
    """Kernel, F, fluctuations and 1/N shift: Wick's law against sums over a grid."""
    network = bk.Network(64, "linear", sharing, noise=0.5)
    task = bk.tasks.endpoint([[1.0]], [4.5], 3)
    gaussian = bk.solve(network, task)
    general = bk.solve(bk.Network(64, lambda h: 1.0 * h, sharing, noise=0.5), task)
    # Linear statistics reach far: the grid holds 6.5 standard deviations.
    assert general.kernel == pytest.approx(gaussian.kernel, rel=1e-5, abs=1e-5)
    assert general.free_energy == pytest.approx(gaussian.free_energy, abs=1e-6)
    assert general.conjugate == pytest.approx(gaussian.conjugate, abs=1e-4)
    assert general.kernel_std() == pytest.approx(gaussian.kernel_std(), rel=1e-3)
    # Second differences over 0.01 standard deviations err by its square.
    assert general.kernel_shift() == pytest.approx(gaussian.kernel_shift(), rel=1e-3, abs=1e-4)
    assert general.output_std() == pytest.approx(gaussian.output_std(), rel=1e-3)
    assert general.output_shift() == pytest.approx(gaussian.output_shift(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    "activation",
    [
        "erf",
        pytest.param("tanh", marks=pytest.mark.slow),
        pytest.param("relu", marks=pytest.mark.slow),
    ],
)
def test_grid_and_particles_agree(activation, monkeypatch):
    network = bk.Network(64, activation, noise=0.1)
    exact = bk.solve(network, ENDPOINT)
    monkeypatch.setattr(grid, "DIMENSIONS", 0)
    sampled = bk.solve(network, ENDPOINT)
    assert sampled.converged
    error = sampled.monte_carlo_error
    assert np.all(error > 0)
    assert np.linalg.norm(error) < 0.01 * np.linalg.norm(exact.kernel)
    assert np.abs((sampled.kernel - exact.kernel) / error).max() < 5
    off = abs(sampled.free_energy - exact.free_energy)
    # The weights that particles gather on their way leave 0.2 to 1 %; ln Z from scratch leaves 1e-5.
    assert off < 5 * sampled.free_energy_error < 5e-4 * exact.free_energy
    again = bk.solve(network, ENDPOINT)
    assert np.array_equal(again.kernel, sampled.kernel)
    other = bk.solve(network, ENDPOINT, jax.random.key(3))
    both = np.hypot(other.monte_carlo_error, error)
    assert np.abs((other.kernel - sampled.kernel) / both).max() < 5
    assert not np.array_equal(other.kernel, sampled.kernel)


def test_shifts_across_kinks(monkeypatch):
    """Particles that a displacement carries over a kink make noise, which was larger than the shift."""
    network, task = bk.Network(1, "relu", noise=1.0), bk.tasks.endpoint([[1.0]], [1.5], 3)
    exact = bk.solve(network, task).kernel_shift()
    monkeypatch.setattr(grid, "DIMENSIONS", 0)
    for seed in range(2):
        sampled = bk.solve(network, task, jax.random.key(seed)).kernel_shift()
        assert np.linalg.norm(sampled - exact) < 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize("activation", ["erf", pytest.param("relu", marks=pytest.mark.slow)])
def test_refining_the_grid_changes_nothing(activation, monkeypatch):
    network = bk.Network(64, activation, noise=0.3)
    coarse = bk.solve(network, ENDPOINT)
    monkeypatch.setitem(grid._NODES, 3, 57)
    monkeypatch.setitem(grid._PANEL_NODES, 3, 44)
    fine = bk.solve(network, ENDPOINT)
    assert fine.kernel == pytest.approx(coarse.kernel, abs=1e-6)
    assert fine.free_energy == pytest.approx(coarse.free_energy, abs=1e-6)


@pytest.mark.slow
def test_free_energy_is_the_integral_over_the_signal():
    """dF/ds = s y^T S^-1 y at a stationary point: thermodynamic integration along the homotopy."""
    nodes, weights = np.polynomial.legendre.leggauss(6)
    # The transition at 1.4596 / 2 of these targets bends the integrand; integrate both sides of it.
    edge = 1.45955159890529 / 2
    total = 0.0
    for low, high in ((0.0, edge), (edge, 1.0)):
        for x, w in zip(nodes, weights, strict=True):
            s = (low + high) / 2 + (high - low) / 2 * x
            C = bk.solve(ERF, ENDPOINT.scaled(s)).kernel[2, 0, 2, 0]
            total += w * (high - low) / 2 * s * 4.0 / (C + 0.1)
    assert total == pytest.approx(bk.solve(ERF, ENDPOINT).free_energy, abs=1e-5)


@pytest.mark.parametrize("activation", ["erf", "relu", "tanh"])
def test_limits_where_data_do_not_act(activation):
    network = bk.Network(64, activation, noise=0.1)
    prior = prior_kernel(network, ENDPOINT)
    weak = bk.solve(network, ENDPOINT.scaled(1e-4))
    assert weak.kernel == pytest.approx(prior, abs=1e-6)
    noisy = bk.solve(bk.Network(64, activation, noise=1e6), ENDPOINT)
    assert noisy.kernel == pytest.approx(prior, abs=1e-5)
    lazy = bk.solve(bk.Network(64, activation, noise=0.1, scaling="standard"), ENDPOINT)
    assert lazy.kernel == pytest.approx(prior, abs=1e-6)
    assert not np.any(np.abs(lazy.conjugate) > 1e-6)
    # The NNGP's posterior mean.
    C = matrix(prior)
    assert lazy.output.ravel() == pytest.approx(C[:, 2] * 2.0 / (C[2, 2] + 0.1), abs=1e-5)


def test_particles_keep_an_unbroken_symmetry():
    """Sampling noise in entries that the symmetry forbids would bias draws aligned to it."""
    task = bk.tasks.endpoint([[1.0, 0.3], [-0.2, 0.8]], [0.7, -0.7], 3)
    theory = bk.solve(bk.Network(512, "erf", noise=0.3), task)
    assert theory.converged
    assert theory.branches[0].stable
    assert np.any(theory.monte_carlo_error > 0)
    flip = np.array([1, -1, 1])
    assert np.array_equal(flip_kernel(theory.kernel, flip), theory.kernel)
    assert not theory.output[1].any()
    assert theory.output_shift()[1] == pytest.approx(0, abs=1e-15)
    strong = bk.solve(bk.Network(512, "erf", noise=0.1), task.scaled(4))
    assert strong.converged
    assert strong.branches[0].stable
    assert bk.coherence(strong.kernel)[1, 2] > 0.1


def test_readouts_shared_between_independent_steps():
    """Steps that share no recurrent weight but a readout: unsupervised outputs have mean zero, and spread."""
    sharing = bk.Sharing([0, 1], [0, 1], [0, 0])
    task = bk.tasks.endpoint([[1.0]], [3.0], 2)
    gaussian = bk.solve(bk.Network(64, "linear", sharing, noise=0.5), task)
    general = bk.solve(bk.Network(64, lambda h: 1.0 * h, sharing, noise=0.5), task)
    assert not general.output[0].any()
    assert general.output_std() == pytest.approx(gaussian.output_std(), rel=1e-3)


def test_outputs_in_standard_scaling():
    """A Gaussian process: the variance given the targets, at order one, whatever the width."""
    network = bk.Network(64, "erf", noise=0.1, scaling="standard")
    theory = bk.solve(network, ENDPOINT)
    C = matrix(prior_kernel(network, ENDPOINT))
    expected = np.diag(C) - C[:, 2] ** 2 / (C[2, 2] + 0.1)
    assert theory.output_std().ravel() ** 2 == pytest.approx(expected, abs=1e-6)
    assert np.array_equal(theory.output_std(7), theory.output_std())


def test_duplicate_patterns_and_silent_sites():
    """Patterns that repeat follow from their twins; two halves of the evidence of one."""
    twice = bk.tasks.endpoint([[1.0], [1.0]], [2.0, 2.0], 2)
    once = bk.tasks.endpoint([[1.0]], [2.0], 2)
    network, quieter = bk.Network(64, "erf", noise=0.2), bk.Network(64, "erf", noise=0.1)
    double = matrix(bk.solve(network, twice).kernel)
    single = matrix(bk.solve(quieter, once).kernel)
    assert double[::2, ::2] == pytest.approx(single, abs=1e-6)
    assert double[1::2, ::2] == pytest.approx(single, abs=1e-6)


def test_several_outputs():
    one = bk.tasks.endpoint([[1.0]], [2.0], 2)
    two = bk.tasks.endpoint([[1.0]], [[2.0 * np.cos(1.0), 2.0 * np.sin(1.0)]], 2)
    network = bk.Network(64, "tanh", noise=0.1)
    first, second = bk.solve(network, one), bk.solve(network, two)
    # Outputs may be rotated into each other, and one that is zero everywhere pulls at nothing.
    assert second.kernel == pytest.approx(first.kernel, abs=1e-7)
    assert second.free_energy == pytest.approx(first.free_energy, abs=1e-7)


def test_predictions_extend_the_training_solution():
    task = bk.tasks.endpoint([[1.0, 0.0]], [2.0], 3)
    theory = bk.solve(ERF, task)
    new = np.zeros((3, 2, 2))
    new[0, 0], new[0, 1] = [1.0, 0.0], [0.0, 1.0]
    found = theory.predict(new)
    # A training pattern met again, and an orthogonal one.
    assert found.mean[:, 0, 0] == pytest.approx(theory.output[:, 0, 0], abs=0.02)
    assert found.kernel[:, 0, :, 0] == pytest.approx(theory.kernel[:, 0, :, 0], abs=0.02)
    assert found.cross_kernel[:, 1, :, 0] == pytest.approx(np.zeros((3, 3)), abs=0.02)


@pytest.mark.slow
def test_linear_predictions_by_sampling():
    network = bk.Network(64, "linear", noise=0.5)
    task = bk.tasks.endpoint([[1.0, 0.5]], [4.5], 3)
    new = np.zeros((3, 1, 2))
    new[0, 0] = [1.0, -1.0]
    gaussian = bk.solve(network, task)
    general = bk.solve(bk.Network(64, lambda h: 1.0 * h, noise=0.5), task)
    exact, sampled = gaussian.predict(new), general.predict(new)
    # New activities are a regression on those of training: only what they have of their own is random.
    assert sampled.monte_carlo_error.max() < 1e-10
    assert sampled.mean == pytest.approx(exact.mean, abs=1e-5)
    assert sampled.cross_kernel == pytest.approx(exact.cross_kernel, abs=1e-5)
    scale = np.abs(exact.kernel).max()
    assert sampled.kernel == pytest.approx(exact.kernel, abs=0.05 * scale)
    joint = bk.solve(
        network,
        bk.Task(
            np.concatenate([task.inputs, new], 1),
            np.concatenate([task.targets, np.full((3, 1, 1), np.nan)], 1),
        ),
    )
    std = gaussian.predict_std(new)
    assert std == pytest.approx(joint.output_std()[:, 1:], rel=1e-4)
    # Particles here, whose fourth moments carry an error of a percent or two.
    assert general.predict_std(new) == pytest.approx(std, rel=0.05)


def test_an_exhausted_solver_says_so():
    theory = bk.solve(ERF, ENDPOINT, max_steps=1, tolerance=1e-14)
    assert not theory.converged
    assert "did not reach" in theory.result


@pytest.mark.slow
def test_patterns_that_hardly_differ_are_solved():
    """Innovations too small to keep are dropped; kernels hardly notice."""
    network = bk.Network(64, "erf", noise=0.1)
    given = {
        gap: bk.solve(network, bk.tasks.endpoint([[1.0, 0.3], [1.0, 0.3 + gap]], [1.0, 1.0], 3))
        for gap in (0.0, 3e-4, 1e-3, 3e-3)
    }
    for gap, theory in given.items():
        assert theory.converged
        error = 5 * theory.monte_carlo_error.max() + gap
        np.testing.assert_allclose(theory.kernel, given[0.0].kernel, atol=error)


def test_what_did_not_converge_has_no_fluctuations():
    theory = bk.solve(ERF, ENDPOINT, tolerance=1e-30, max_steps=1)
    assert not theory.converged
    with pytest.raises(FluctuationError, match="fluctuations exist around a solution"):
        theory.kernel_std()
