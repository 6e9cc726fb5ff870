"""Training that is not at its end is said to be so; made of traces whose relaxation time is known."""

import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel.inference.settled import unsettled
from bayeskernel.inference.train import arranged

TASK = bk.tasks.endpoint([[1.0]], [0.7], 2)
NETWORK = bk.Network(8, "tanh", noise=0.3)
COUNT, SEEN = 16, 101


def relaxing(tau, seed):
    """Norms (networks, steps) that forget where they were after tau of a hundred steps, from a start far off."""
    rng, rho = np.random.default_rng(seed), np.exp(-1 / tau)
    x = np.empty((COUNT, SEEN))
    x[:, 0] = 0.0
    for k in range(1, SEEN):
        x[:, k] = rho * x[:, k - 1] + (1 - rho) * 5 + np.sqrt(1 - rho**2) * rng.normal(size=COUNT)
    return x


def tree(norm, **made):
    """Networks with the trace of norm[1,2]; the other norms stay about one."""
    rng = np.random.default_rng(0)
    norms = 1 + 0.01 * rng.normal(size=(COUNT, SEEN, 2, 2))
    norms[:, :, 0, 1] = norms[:, :, 1, 0] = norm
    rows = {
        "kernel": 1 + 0.01 * rng.normal(size=(COUNT, 1, 2, 1, 2, 1)), "norm": norms,
        "output": rng.normal(size=(COUNT, 1, 2, 1, 1)), "loss": np.ones((COUNT, SEEN)),
        "squared_error": np.ones((COUNT, SEEN)),
    }  # fmt: skip
    made = {
        "space": "trained", "optimizer": "langevin", "weight_decay": 1.0, "learning_rate": 0.01, "curvature": 50.0,
        "num_steps": 1000, "at": [1000],
    } | made  # fmt: skip
    return arranged(rows, list(range(0, 1001, 10)), NETWORK, TASK, made)


def test_langevin_is_asked_for_seven_relaxation_times_twice():
    said = {
        tau: sum(bool(unsettled(tree(relaxing(tau, k)))) for k in range(20)) for tau in (2, 15, 30)
    }
    assert said[2] == 0
    assert said[15] >= 18
    assert said[30] == 20


def test_a_drift_that_networks_share_is_found():
    rising = np.tile(np.linspace(0, 1, SEEN), (COUNT, 1))
    rising += 0.05 * np.random.default_rng(1).normal(size=rising.shape)
    (why,) = unsettled(tree(rising))
    assert why.startswith("norm[1,2] drifts: t = ")


def test_the_verdict_notices():
    theory = bk.solve(NETWORK, TASK)
    slow = bk.compare(tree(relaxing(30, 0)), theory)
    assert not slow.agrees
    assert slow.verdict.startswith("Inconclusive: 16 networks trained by langevin: R-hat ")
    assert "of norm[1,2] over the second half of training, below 1.2 is needed" in slow.verdict
    assert not slow.diagnosis.ok
    quick = bk.compare(tree(relaxing(2, 0)), theory)
    assert "Inconclusive" not in quick.verdict
    assert quick.diagnosis.verdict.endswith("and training is at its end.")


def test_steps_that_are_too_large_are_named():
    (why,) = unsettled(tree(relaxing(2, 0), learning_rate=0.03))
    assert why == "learning rate times curvature 1.5, at most 1 is wanted"


@pytest.mark.parametrize(("rate", "moves"), [(20.0, False), (2.0, True)])
def test_descent_is_to_stand_still(rate, moves):
    norm = 1 - 0.5 * np.exp(-rate * np.linspace(0, 1, SEEN)) + np.zeros((COUNT, 1))
    said = unsettled(tree(norm, optimizer="gd", learning_rate=0.1))
    assert bool(said) == moves
    if moves:
        # From 1 - exp(-2 t) / 2 averaged over (1/2, 3/4] to that over (3/4, 1].
        at = np.arange(0.51, 0.755, 0.01)
        change = np.mean(np.exp(-2 * at) - np.exp(-2 * at - 0.5)) / 2
        assert f"norm[1,2] still moves, by {100 * change:.2g} %" in said[0]
        cmp = bk.compare(tree(norm, optimizer="gd"), bk.solve(NETWORK, TASK))
        assert "deviate from theory in the block" in cmp.verdict
        assert cmp.verdict.endswith("in a quarter of training.")


def test_nothing_is_known_of_networks_trained_elsewhere():
    phi = np.random.default_rng(0).normal(size=(4, 2, 1, 8))
    assert unsettled(bk.measure(NETWORK, TASK, phi)) == ()
    assert "is not judged" in bk.diagnose(bk.measure(NETWORK, TASK, phi)).verdict
