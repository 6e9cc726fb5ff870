"""Predictions for new patterns against solutions that hold these patterns from the start."""

from functools import cache

import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel.meanfield.branches import Search
from bayeskernel.meanfield.newton import Newton, Status
from bayeskernel.meanfield.saddle import Saddle
from bayeskernel.meanfield.starts import extended_point, prior_point
from bayeskernel.problem import problem

TASK = bk.tasks.endpoint([[1.0, 0.3], [-0.2, 1.1]], [2.0, -1.0], 3)
NETWORK = bk.Network(512, "erf", noise=0.2)
# The second nearly follows from the training patterns: under one percent of its variance is its own.
NEW = np.array([[0.8, -0.6], [1.5, 1.0]])


@cache
def solved():
    return bk.solve(NETWORK, TASK)


def inputs(pattern):
    return np.concatenate([NEW[None, pattern : pattern + 1], np.zeros((2, 1, 2))])


def test_a_new_pattern_of_one_step_is_a_pattern_without_target():
    """Three sites, on grids: spread of the new pattern's output, by extension and from the start."""
    task = bk.tasks.endpoint([[1.0, 0.3], [-0.2, 1.1]], [2.0, -1.0], 1)
    network = bk.Network(512, "erf", noise=0.2)
    new = np.array([[[0.8, -0.6]]])
    whole = bk.Task(np.concatenate([task.inputs, new], 1), [[2.0, -1.0, np.nan]])
    together, theory = bk.solve(network, whole), bk.solve(network, task)
    assert theory.predict_std(new)[0, 0] == pytest.approx(together.output_std()[0, 2], rel=1e-5)
    after = theory.predict(new)
    assert abs(after.mean[0, 0] - together.output[0, 2]) < 5 * after.monte_carlo_error[0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [0, 1])
def test_patterns_without_targets_may_come_before_or_after_solving(pattern):
    new, unknown = inputs(pattern), np.full((3, 1, 1), np.nan)
    task = bk.Task(
        np.concatenate([TASK.inputs, new], 1), np.concatenate([TASK.targets, unknown], 1)
    )
    together, after = bk.solve(NETWORK, task), solved().predict(new)
    # Beside exact entries of C the noise of draws leaves three times this error.
    assert after.monte_carlo_error.max() < 0.02
    assert np.abs(after.mean - together.output[:, 2:]).max() < 0.06
    # Fluctuations carry the noise of particles' fourth moments, which 4096 of them make 14 percent.
    assert solved().predict_std(new) == pytest.approx(together.output_std()[:, 2:], rel=0.03)


@pytest.mark.slow
def test_draws_of_a_law_do_not_tell_its_free_energy():
    """Kernels converge from them at once, F is what it was."""
    task = bk.tasks.endpoint([[1.0]], [2.0], 4)
    theory = bk.solve(NETWORK, task)
    saddle = theory._solution.saddle
    (nodes,), (law,) = saddle.point.nodes, saddle.laws
    draws = nodes.drawn(law, saddle.K, 16384, np.random.default_rng(1))
    point = extended_point(
        saddle.problem, saddle.point.C, saddle.point.Ct, draws, symmetric=saddle.point.symmetric
    )
    again = Search(saddle.problem, Newton(1e-6, 200), np.random.default_rng(0)).solution(point)
    assert again.status is Status.CONVERGED
    error = np.hypot(again.free_energy_error, theory.free_energy_error)
    assert abs(again.free_energy - theory.free_energy) < 5 * error < 2e-3


def test_a_law_on_a_handful_of_nodes_is_no_solution():
    """It has no directions in which a residual could be seen."""
    posed, rng = problem(NETWORK, bk.tasks.endpoint([[1.0]], [2.0], 4)), np.random.default_rng(0)
    point = prior_point(posed, rng)
    collapsed = point._replace(Ct=1e6 * np.diag([0.0, 0.0, 0.0, 1.0]))
    assert Saddle(posed, collapsed).size < 10
    descent = Newton(tolerance=1e-6, max_steps=20, renew=False).descend(posed, collapsed, rng)
    assert descent.status is Status.UNCOVERED
