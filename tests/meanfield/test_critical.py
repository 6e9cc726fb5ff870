"""Where tied and untied networks part: closed forms, and branches met from both sides."""

import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel.meanfield.critical import NoTransitionError, tied_only_curvature
from tests.meanfield.closed_forms import endpoint_gain, first_lag_critical_signal


@pytest.mark.parametrize("steps", [3, 4, 5])
def test_linear_closed_form(steps):
    task = bk.tasks.endpoint([[1.0]], [1.0], steps)
    found = bk.critical_signal(bk.Network(64, "linear", noise=0.3), task)
    assert found.spinodal == pytest.approx(first_lag_critical_signal(steps, 0.3), rel=1e-6)
    assert found.order == "continuous"
    assert found.coexistence == found.spinodal
    blocks = np.abs(found.direction[:, 0, :, 0])
    # The first lag goes unstable.
    assert blocks[0, 1] > 0.01
    assert blocks[0, 2] < 1e-12


def test_where_the_shared_pair_of_steps_lies_does_not_matter():
    """Two of four steps share: neighbours or not, they part at one signal, above that of all four."""
    task = bk.tasks.endpoint([[1.0]], [1.0], 4)
    pairs = [
        bk.critical_signal(
            bk.Network(64, "linear", bk.Sharing(recurrent, "tied", "tied"), noise=0.1), task
        ).spinodal
        for recurrent in ([0, 1, 2, 2], [0, 1, 2, 1])
    ]
    assert pairs[0] == pytest.approx(pairs[1], rel=1e-5)
    assert first_lag_critical_signal(4, 0.1) < 0.5 * pairs[0]


@pytest.mark.long
def test_first_order_transition_of_long_networks():
    task = bk.tasks.endpoint([[1.0]], [1.0], 8)
    network = bk.Network(64, "linear", noise=0.3)
    found = bk.critical_signal(network, task)
    assert found.spinodal == pytest.approx(first_lag_critical_signal(8, 0.3), rel=1e-6)
    assert found.order == "discontinuous"
    assert found.coexistence < 0.95 * found.spinodal

    def lead(factor):
        branches = bk.solve(network, task.scaled(factor * found.coexistence)).branches
        stable = [b for b in branches if b.stable]
        return bk.coherence(stable[0].kernel)[1, 2]

    assert lead(0.995) < 1e-3
    assert lead(1.005) > 0.1


def test_every_lag_against_its_closed_form():
    """Along the untied solution lag k is marginal at r = (T-k)/(T-k-1): so is the lowest of all."""
    steps, noise = 5, 0.3
    r = (steps - 1) / (steps - 2)
    y = first_lag_critical_signal(steps, noise)
    assert endpoint_gain(steps, y, noise)[0] == pytest.approx(r, rel=1e-9)
    network = bk.Network(64, "linear", noise=noise)
    for factor, sign in ((0.99, 1), (1.01, -1)):
        task = bk.tasks.endpoint([[1.0]], [factor * y], steps)
        untied = bk.solve(bk.Network(64, "linear", "untied", noise=noise), task)
        assert np.sign(tied_only_curvature(network, untied)[0]) == sign


@pytest.mark.parametrize(
    "sharing",
    [
        pytest.param("tied", marks=pytest.mark.long),
        pytest.param([0, 1, 1], marks=pytest.mark.slow),
    ],
)
def test_the_solver_meets_the_transition_where_the_hessian_says(sharing):
    task = bk.tasks.endpoint([[1.0]], [1.0], 3)
    network = bk.Network(64, "erf", sharing, noise=0.1)
    found = bk.critical_signal(network, task)
    assert found.order == "continuous"
    below = bk.solve(network, task.scaled(0.99 * found.spinodal))
    above = bk.solve(network, task.scaled(1.01 * found.spinodal))
    assert below.branches[0].stable
    assert bk.coherence(below.kernel)[1, 2] < 1e-6
    assert bk.coherence(above.kernel)[1, 2] > 0.05
    # Mean-field exponent one half, from two points above.
    higher = bk.solve(network, task.scaled(1.02 * found.spinodal))
    ratio = bk.coherence(higher.kernel)[1, 2] / bk.coherence(above.kernel)[1, 2]
    assert ratio == pytest.approx(np.sqrt(2), rel=0.1)


@pytest.mark.long
def test_no_symmetry_no_transition():
    task = bk.tasks.endpoint([[1.0]], [1.0], 2)
    found = bk.critical_signal(bk.Network(64, "relu", noise=0.3), task)
    assert found.order == "crossover"
    assert np.isnan(found.spinodal)
    assert 0.125 <= found.crossover <= 8


def test_unshared_networks_have_none():
    task = bk.tasks.endpoint([[1.0]], [1.0], 3)
    with pytest.raises(NoTransitionError, match="stable"):
        bk.critical_signal(bk.Network(64, "linear", "untied", noise=0.3), task)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [6, 8])
def test_particles_find_the_coexistence_of_linear_networks(steps):
    """phi = x as a user's function goes to the solver for any activation."""
    task = bk.tasks.endpoint([[1.0]], [1.0], steps)
    exact = bk.critical_signal(bk.Network(64, "linear", noise=0.1), task)
    found = bk.critical_signal(bk.Network(64, lambda x: x, noise=0.1), task)
    assert found.order == exact.order == "discontinuous"
    assert found.spinodal == pytest.approx(exact.spinodal, rel=1e-6)
    assert 0 < found.coexistence_error < 0.005 * exact.coexistence
    assert abs(found.coexistence - exact.coexistence) < 5 * found.coexistence_error
    assert found.coexistence < exact.spinodal - 5 * found.coexistence_error


@pytest.mark.slow
def test_noise_of_particles_is_not_coherence():
    """From five steps on erf networks jump; at four, coherence within its noise is called unresolved."""
    network = bk.Network(64, "erf", noise=0.1)
    jump = bk.critical_signal(network, bk.tasks.endpoint([[1.0]], [1.0], 6))
    assert jump.spinodal == pytest.approx(0.4729, abs=5e-4)
    assert jump.order == "discontinuous"
    assert jump.coexistence_error < 1e-3
    # As another iteration towards the saddle point found it, within 4e-4.
    assert abs(jump.coexistence - 0.4566) < 5 * np.hypot(jump.coexistence_error, 4e-4)
    assert jump.coexistence < jump.spinodal - 5 * jump.coexistence_error
    small = bk.critical_signal(network, bk.tasks.endpoint([[1.0]], [1.0], 4))
    assert small.spinodal == pytest.approx(0.8002, abs=5e-4)
    assert small.order == "unresolved"
    assert np.isnan(small.coexistence)
