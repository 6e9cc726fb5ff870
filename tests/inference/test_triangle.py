"""Do the three spaces sample one law? Every kernel entry and output, mean and variance, at equal width.

Each comparison is a z score of two independent runs with errors from effective sample sizes. The limit
is set so that one agreeing comparison in 10,000 is called a disagreement over all entries of a case;
a failure must repeat on a fresh seed with four times the draws before it counts.
"""

import itertools

import arviz as az
import jax
import numpy as np
import pytest
import xarray as xr
from scipy.stats import norm

import bayeskernel as bk
from bayeskernel.gauge import sign_symmetry
from bayeskernel.inference import record

from . import test_conditional

FALSE_ALARM = 1e-4
SHARINGS = {
    "tied": "tied",
    "untied": "untied",
    "half-tied": bk.Sharing([0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1]),
}


def _tasks():
    rng = np.random.default_rng(0)
    endpoint = bk.tasks.endpoint(rng.normal(size=(2, 3)), [1.5, -1.0], 4)
    targets = np.full((4, 2, 2), np.nan)
    targets[1, 0], targets[2, 1, 0], targets[3] = [1.0, -0.5], 0.8, [[0.3, 1.2], [-0.7, 0.4]]
    return {"endpoint": endpoint, "sequence": bk.Task(rng.normal(size=(4, 2, 3)), targets)}


TASKS = _tasks()
CASES = list(itertools.product(["linear", "erf", "relu"], SHARINGS, TASKS))


def moments(space, network, task, seed, draws, num_warmup=400, keep=()):
    """Mean and variance of kernel entries and outputs with their standard errors."""
    run = bk.sample(
        jax.random.key(seed), network, task, space=space, keep=keep,
        num_warmup=num_warmup, num_samples=draws, num_chains=4, progress=False,
    )  # fmt: skip
    # One transition in a thousand cannot bias what has an error of a percent.
    assert run["sample_stats"]["diverging"].mean() < 1e-3
    return moments_of(run, network, task)


def moments_of(run, network, task):
    kernel, output = (record.stored(run, name).astype(np.float64) for name in ("kernel", "output"))
    # Absolute values do not change under the sign symmetry, which chains break as they like.
    if len(sign_symmetry(network, task).generators):
        kernel, output = np.abs(kernel), np.abs(output)
    size = kernel.shape[2] * kernel.shape[3]
    upper = np.triu_indices(size)
    flat = np.concatenate(
        [
            kernel.reshape(*kernel.shape[:2], size, size)[:, :, upper[0], upper[1]],
            output.reshape(*output.shape[:2], -1),
        ],
        axis=-1,
    )
    spread = (flat - flat.mean((0, 1))) ** 2
    both = np.concatenate([flat, spread], axis=-1)
    data = xr.Dataset({"x": (("chain", "draw", "entry"), both)})
    ess, mcse = (f(data, method="mean")["x"].to_numpy() for f in (az.ess, az.mcse))
    return both.mean((0, 1)), mcse, float(ess.min())


def disagreement(first, second):
    (mean, error, ess), (other, other_error, other_ess) = first, second
    assert min(ess, other_ess) > 100, f"only {min(ess, other_ess):.0f} effective draws"
    both = np.hypot(error, other_error)
    # Outputs that nothing is read out at are zero in either.
    assert np.array_equal(mean[both == 0], other[both == 0])
    z = np.abs(mean - other)[both > 0] / both[both > 0]
    return float(z.max()), float(norm.isf(FALSE_ALARM / 2 / len(z)))


def check(network, task, spaces, draws):
    reference = moments("weights", network, task, 1, draws)
    for space in spaces:
        worst, limit = disagreement(reference, moments(space, network, task, 2, draws))
        if worst > limit:
            again = moments("weights", network, task, 3, 4 * draws)
            worst, limit = disagreement(again, moments(space, network, task, 4, 4 * draws))
        print(f"weights against {space}: largest z {worst:.2f}, limit {limit:.2f}")
        assert worst < limit


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "sharing", "task"), CASES)
def test_spaces_agree(activation, sharing, task):
    # At noise 0.4 the relu RNN has metastable branches on the endpoint task that no space mixes.
    noise = 1.5 if (activation, sharing, task) == ("relu", "tied", "endpoint") else 0.4
    network = bk.Network(24, activation, SHARINGS[sharing], noise=noise)
    spaces = ["preactivations", "kernels"] if activation == "linear" else ["preactivations"]
    check(network, TASKS[task], spaces, 1000)


GRAPHS = {
    "erf, leaky": {"activation": "erf", "leak": 0.5},
    "erf, two layers": {"activation": "erf", "layers": 2},
    "relu, residual": {"activation": "relu", "graph": bk.architectures.residual(4), "noise": 1.5},
    "linear, two leaky layers": {"activation": "linear", "layers": 2, "leak": 0.7},
    "erf, bidirectional": {"activation": "erf", "graph": bk.architectures.bidirectional(4)},
    "erf, skip and biases": {"activation": "erf", "skip": 2, "bias_std": 0.5},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_spaces_agree_on_other_graphs(name):
    options = {"noise": 0.4} | GRAPHS[name]
    spaces = ["preactivations", "kernels"] if name.startswith("linear") else ["preactivations"]
    task = TASKS["endpoint" if "residual" in name else "sequence"]
    check(bk.Network(24, **options), task, spaces, 1000)


@pytest.mark.slow
def test_standard_scaling_agrees():
    network = bk.Network(24, "relu", "tied", noise=0.4, scaling="standard")
    check(network, TASKS["sequence"], ["preactivations"], 1000)


@pytest.mark.long
def test_spaces_agree_quickly():
    """The part of the triangle that every test run checks."""
    network, task = bk.Network(12, "erf", noise=0.5), test_conditional.SINE
    one, two = (
        moments(space, network, task, seed, 500, num_warmup=300, keep=(space,))
        for seed, space in enumerate(("weights", "preactivations"), 1)
    )
    worst, limit = disagreement(one, two)
    assert worst < limit
