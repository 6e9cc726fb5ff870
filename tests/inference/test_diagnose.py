"""Diagnoses of planted failures, on draws made by hand and by chains."""

import re

import jax
import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel.errors import InputError
from bayeskernel.gauge import flip_kernel
from bayeskernel.inference.record import to_datatree

NETWORK = bk.Network(32, "erf", noise=0.1)
TASK = bk.tasks.endpoint([[1.0]], [2.0], 3)
CHAINS, DRAWS = 4, 500
# Steps 2 and 3 correlated: the flip of step 2 changes the kernel.
KERNEL = np.array([[0.5, 0.2, 0.2], [0.2, 0.5, 0.4], [0.2, 0.4, 0.6]]).reshape(3, 1, 3, 1)


def planted(change=None, sampler="hmc"):
    """Independent draws around one kernel, spoilt by ``change``."""
    rng = np.random.default_rng(0)
    noise = 0.01 * rng.normal(size=(CHAINS, DRAWS, 3, 1, 3, 1))
    draws = {
        "kernel": KERNEL + noise + noise.transpose(0, 1, 4, 5, 2, 3),
        "output": rng.normal(size=(CHAINS, DRAWS, 3, 1, 1)),
        "lp": rng.normal(size=(CHAINS, DRAWS)),
        "energy": rng.normal(size=(CHAINS, DRAWS)),
        "n_steps": np.full((CHAINS, DRAWS), 7),
        "diverging": np.zeros((CHAINS, DRAWS), bool),
    }
    if change is not None:
        change(draws)
    return to_datatree(draws, "posterior", NETWORK, TASK, {"sampler": sampler})


def test_independent_draws_pass():
    found = bk.diagnose(planted())
    assert found.ok, found.verdict
    assert found.branches == ((0, 1, 2, 3),)
    assert found.flipped == 0
    row = found.table.loc["kernel[2,0,3,0]"]
    assert row["mean"] == pytest.approx(0.4, abs=0.002)
    assert row["mcse"] == pytest.approx(0.01 * np.sqrt(2 / (CHAINS * DRAWS)), rel=0.1)
    assert row["r_hat"] < 1.01
    assert 1500 < row["ess_bulk"] < 2500
    assert len(found.table) == 1 + 6 + 6 + 3


def test_signs_do_not_count():
    """Half of the chains on the other side of the symmetry, one crossing over."""

    def flip(draws):
        sign = np.array([1, -1, 1])
        draws["kernel"][:2] = flip_kernel(draws["kernel"][:2], sign)
        draws["kernel"][2, 200:] = flip_kernel(draws["kernel"][2, 200:], sign)
        draws["output"][:2] *= sign[:, None, None]
        draws["output"][2, 200:] *= sign[:, None, None]

    found, plain = bk.diagnose(planted(flip)), bk.diagnose(planted())
    assert found.ok, found.verdict
    # Two chains and three fifths of a third are brought to the others, or the others to them.
    assert min(found.flipped, 1 - found.flipped) == pytest.approx(0.35)
    kernels = [name for name in plain.table.index if name.startswith("kernel")]
    assert found.table.loc[kernels, "mean"].abs().to_numpy() == pytest.approx(
        plain.table.loc[kernels, "mean"].abs().to_numpy()
    )
    assert found.table.loc[kernels, "std"].to_numpy() == pytest.approx(
        plain.table.loc[kernels, "std"].to_numpy()
    )


def stuck(draws):
    for values in draws.values():
        values[2] = values[2, :1]


def other_branch(draws):
    draws["kernel"][3] += 0.3


def drift(draws):
    draws["kernel"] += 0.05 * np.linspace(-1, 1, DRAWS)[:, None, None, None, None]


def not_finite(draws):
    draws["kernel"][1, 7, 0, 0, 0, 0] = np.nan


def diverging(draws):
    draws["diverging"][0, :3] = True


def slow_energy(draws):
    draws["energy"] = np.cumsum(draws["energy"], axis=1)


def large_trees(draws):
    draws["n_steps"][1, :5] = 1023


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (stuck, "chain 2 of 4 hardly moved"),
        (other_branch, r"2 different branches: 0, 1, 2 \| 3"),
        (drift, r"effective draws in bulk of .*R-hat 1\.\d+ of"),
        (not_finite, "not finite in chain 1"),
        (diverging, "3 divergent transitions"),
        (slow_energy, "E-BFMI below 0.3 in chains 0, 1, 2, 3"),
        (large_trees, "5 transitions reached the largest tree"),
    ],
)
def test_planted_failures_are_named(change, message):
    found = bk.diagnose(planted(change, sampler="nuts"))
    assert not found.ok
    assert found.verdict.startswith("Failed: ")
    assert re.search(message, found.verdict), found.verdict


def test_a_chain():
    draws = bk.sample(
        jax.random.key(0), NETWORK, TASK, num_warmup=200, num_samples=4000, progress=False
    )
    found = bk.diagnose(draws)
    assert found.ok, found.verdict
    assert not bk.diagnose(draws.isel(draw=slice(20))).ok


def test_what_is_not_a_run_is_refused():
    made = {
        "kernel": np.broadcast_to(KERNEL, (1, 5, 3, 1, 3, 1)),
        "output": np.ones((1, 5, 3, 1, 1)),
    }
    prior = to_datatree(made, "prior", NETWORK, TASK, {"num_samples": 5})
    with pytest.raises(InputError, match="draws: expected a DataTree"):
        bk.diagnose(prior)
