"""Exchanges of patterns: exactly those that likelihood and prior do not notice, and chains brought together by them."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel.exchange import matched, pattern_symmetry
from bayeskernel.gauge import sign_symmetry
from bayeskernel.likelihood import dual_targets, energy, mean_output
from bayeskernel.problem import problem

from .conftest import fake_draws


def _swapped():
    """Two inputs and two outputs that trade places; the second output is supervised at one step only."""
    inputs, targets = np.zeros((3, 3, 2)), np.full((3, 3, 2), np.nan)
    inputs[0] = [[1.0, 0.2], [0.2, 1.0], [0.5, 0.5]]
    targets[2] = [[1.0, -0.5], [-0.5, 1.0], [0.3, 0.3]]
    uneven = targets.copy()
    uneven[2, 2, 1] = np.nan
    rounds = np.full((3, 3, 3), np.nan)
    rounds[2] = [np.roll([1.0, -0.5, 0.2], k) for k in range(3)]
    circle = np.zeros((3, 3, 3))
    circle[0] = [np.roll([1.0, 0.3, 0.0], k) for k in range(3)]
    return {
        "two outputs": bk.Task(inputs, targets),
        "uneven": bk.Task(inputs, uneven),
        "three outputs": bk.Task(circle, rounds),
    }


TASKS = {
    "match": bk.tasks.match_to_sample(3, steps=6),
    "context": bk.tasks.context_decision(steps=6),
    "flip-flop": bk.tasks.flip_flop(steps=6),
    "decision": bk.tasks.decision((0.3, 0.5), steps=6),
    "pairs": bk.tasks.endpoint(np.eye(5), [1.0, 1.0, -1.0, -1.0, 0.5], 3),
    **_swapped(),
}
COUNTS = {
    "match": (3, 6),
    "flip-flop": (8, 8),
    "pairs": (4, 8),
    "two outputs": (2, 2),
    "three outputs": (6, 6),
}


def permuted(matrix, p, blocks):
    P = len(p)
    sites = (np.arange(blocks)[:, None] * P + p).ravel()
    return matrix[np.ix_(sites, sites)]


def unnoticed(posed, p, C):
    """Whether K, and the data's energy, of an exchanged kernel are those exchanged."""
    moved = permuted(C, p, posed.nodes)
    same_K = np.allclose(
        posed.preactivation_kernel(moved), permuted(posed.preactivation_kernel(C), p, posed.nodes)
    )
    return same_K and np.isclose(energy(moved, posed), energy(C, posed), rtol=1e-12)


@pytest.mark.parametrize("sharing", ["tied", "untied"])
@pytest.mark.parametrize("name", TASKS)
def test_exchanges_are_those_that_nothing_notices(name, sharing):
    task = TASKS[name]
    network = bk.Network(64, "erf", sharing)
    posed, symmetry = problem(network, task), pattern_symmetry(network, task)
    root = np.random.default_rng(0).normal(size=(posed.size, 2 * posed.size))
    C = root @ root.T / posed.size
    every = {tuple(p) for p in symmetry.permutations}
    assert tuple(range(posed.patterns)) == tuple(symmetry.permutations[0])
    assert len(every) == len(symmetry.permutations)
    if name in COUNTS:
        assert len(every) in COUNTS[name]
    if posed.patterns <= 5:
        allowed = itertools.permutations(range(posed.patterns))
        assert every == {p for p in allowed if unnoticed(posed, np.array(p), C)}
    output = mean_output(C, dual_targets(C, posed), posed).reshape(-1, *task.targets.shape[1:])
    for p, R in zip(symmetry.permutations, symmetry.rotations, strict=True):
        assert unnoticed(posed, p, C)
        moved = permuted(C, p, posed.nodes)
        there = mean_output(moved, dual_targets(moved, posed), posed).reshape(output.shape)
        np.testing.assert_allclose(there, output[:, p] @ R.T, atol=1e-10)


def test_many_patterns_have_some_exchanges():
    task = bk.tasks.endpoint(np.eye(30), np.ones(30), 3)
    assert len(pattern_symmetry(bk.Network(64, "erf"), task).permutations) == 64
    task = bk.tasks.endpoint(np.eye(300), np.ones(300), 3)
    assert len(pattern_symmetry(bk.Network(1024, "erf"), task).permutations) == 1


NETWORK, TASK = bk.Network(64, "erf"), TASKS["three outputs"]


def broken_kernel():
    """A kernel that is not symmetric, and noise around it in four chains."""
    rng, nodes, P = np.random.default_rng(1), 3, 3
    root = rng.normal(size=(nodes * P, 3 * nodes * P))
    kernel = (root @ root.T / root.shape[1]).reshape(nodes, P, nodes, P)
    return kernel, kernel + 0.01 * rng.normal(size=(4, 50, *kernel.shape))


def test_chains_are_brought_together():
    kernel, draws = broken_kernel()
    signs, patterns = sign_symmetry(NETWORK, TASK), pattern_symmetry(NETWORK, TASK)
    output = np.random.default_rng(2).normal(size=(4, 50, *TASK.targets.shape))
    moved, spoken = draws.copy(), output.copy()
    p, R = patterns.permutations[3], patterns.rotations[3]
    back = np.argsort(p)
    assert np.abs(R - R.T).max() > 0.5
    moved[2], spoken[2] = draws[2][..., back, :, :][..., back], (output[2] @ R)[:, :, back]
    found = matched(moved, spoken, kernel, signs, patterns)
    assert found.exchanged == (2,)
    assert found.flipped == 0
    np.testing.assert_array_equal(found.kernel, draws)
    np.testing.assert_allclose(found.output, output, atol=1e-12)
    # What was handed over stays as it was; a chain without numbers stays where it is.
    np.testing.assert_array_equal(moved[2][..., p, :, :][..., p], draws[2])
    moved[2] = np.nan
    assert matched(moved, spoken, kernel, signs, patterns).exchanged == ()


def test_kernels_that_keep_the_symmetry_are_left_alone():
    """Noise brings no exchange much closer, or errors would come out too small."""
    kernel, draws = broken_kernel()
    signs, patterns = sign_symmetry(NETWORK, TASK), pattern_symmetry(NETWORK, TASK)
    images = [kernel[:, p][:, :, :, p] for p in patterns.permutations]
    symmetric = np.mean(images, axis=0)
    assert (
        matched(
            draws - kernel + symmetric, np.zeros((4, 50, 3, 3, 3)), symmetric, signs, patterns
        ).exchanged
        == ()
    )


def test_images_of_one_minimum_agree_with_theory():
    task = bk.tasks.endpoint(np.eye(4), [1.0, 1.0, -1.0, -1.0], 3)
    theory = bk.solve(bk.Network(64, "linear", "tied", noise=0.5), task)
    rng = np.random.default_rng(0)
    root = rng.normal(size=(12, 40))
    theory = replace(theory, kernel=(root @ root.T / 40).reshape(3, 4, 3, 4))
    draws = fake_draws(theory)
    values = draws["posterior"]["kernel"].to_numpy()
    swap = [1, 0, 2, 3]
    values[1] = values[1][..., swap, :, :][..., swap]
    moved = draws.copy(deep=True)
    moved["posterior"]["kernel"].values[:] = values
    cmp = bk.compare(moved, theory)
    assert cmp.exchanged == (1,)
    assert cmp.agrees
    assert "patterns exchanged, as the task allows, in chain 1." in cmp.verdict
    assert bk.diagnose(moved).exchanged != ()
    assert bk.diagnose(moved).ok == bk.diagnose(draws).ok
