"""Numbers at the edge: every case ends in a right answer, a refusal, or a failed verdict, never in a wrong one.

``python -m pytest -m slow tests/test_stress.py -rP`` prints the table kept in docs/limits.
"""

import jax
import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel.inference.run import _choose

from .inference.test_triangle import disagreement, moments_of

RIGHT, REFUSED, FAILED = "right", "refused", "failed verdict"
PAIR = bk.tasks.endpoint([[1.0, 0.3], [-0.2, 1.0]], [1.0, -1.0], 3)


def network(**changed):
    return bk.Network(**{"width": 64, "activation": "linear", "noise": 0.1, **changed})


def same(x, y=0.3, labels=(1.0, 1.0)):
    """Two patterns that differ by x - 1 and y - 0.3."""
    return bk.tasks.endpoint([[1.0, 0.3], [x, y]], labels, 3)


# What is asked, in which space, and how it may end. Duplicates with different targets are no contradiction:
# noise explains the difference.
CASES = {
    "noise 1e-8, pre-activations": (network(noise=1e-8), PAIR, "preactivations", {RIGHT, FAILED}),
    "noise 1e-8, kernels": (network(noise=1e-8), PAIR, "kernels", {RIGHT}),
    "noise 1e-8, weights": (network(noise=1e-8), PAIR, "weights", {FAILED}),
    "targets times 1e6, pre-activations": (network(), PAIR.scaled(1e6), "preactivations", {FAILED}),
    "targets times 1e6, kernels": (network(), PAIR.scaled(1e6), "kernels", {FAILED}),
    "targets times 1e6, weights": (network(), PAIR.scaled(1e6), "weights", {FAILED}),
    "duplicate patterns": (network(), same(1.0), "preactivations", {RIGHT}),
    "duplicate patterns, kernels": (network(), same(1.0), "kernels", {RIGHT}),
    "duplicate patterns, erf": (network(activation="erf"), same(1.0), "preactivations", {RIGHT}),
    "duplicates, noise 1e-8, other targets": (
        network(noise=1e-8), same(1.0, labels=(1.0, -1.0)), "preactivations", {FAILED},
    ),
    "patterns 1e-6 apart": (network(), same(1.0, 0.300001), "preactivations", {RIGHT}),
    "patterns 1e-3 apart": (network(), same(1.0, 0.301), "preactivations", {RIGHT}),
    "patterns 1e-3 apart, erf": (network(activation="erf"), same(1.0, 0.301), "preactivations", {RIGHT}),
    "constant inputs at every step": (
        network(), bk.Task(np.ones((3, 2, 2)), [[np.nan] * 2, [0.5] * 2, [1.0] * 2]), "preactivations", {RIGHT},
    ),
    "no input at all": (network(), bk.Task(np.zeros((3, 2, 2)), np.ones((3, 2))), "preactivations", {REFUSED}),
    "T = 1, P = 1": (network(), bk.tasks.endpoint([[1.0]], [2.0], 1), "preactivations", {RIGHT}),
    "T = 1, P = 1, erf": (network(activation="erf"), bk.tasks.endpoint([[1.0]], [2.0], 1), "weights", {RIGHT}),
    "P > D": (network(), bk.tasks.endpoint([[1.0], [2.0], [-1.0]], [1.0, 2.0, -1.0], 3), "preactivations", {RIGHT}),
    "N < d in kernels": (network(width=3), PAIR, "kernels", {REFUSED}),
}  # fmt: skip


def outcome(net, task, space):
    try:
        draws = bk.sample(
            jax.random.key(0), net, task, space=space,
            num_warmup=500, num_samples=1500, num_chains=2, progress=False,
        )  # fmt: skip
        theory = bk.solve(net, task)
    except bk.InputError as error:
        return REFUSED, str(error)
    chains, result = bk.diagnose(draws), bk.compare(draws, theory)
    if not chains.ok:
        return FAILED, chains.verdict
    if result.verdict.startswith("Inconclusive"):
        return FAILED, result.verdict
    return (RIGHT if result.agrees else "WRONG"), result.verdict


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_edge_cases_end_as_stated(case):
    *given, expected = CASES[case]
    found, words = outcome(*given)
    print(f"| {case} | {found} | {words} |")
    assert found in expected, words


@pytest.mark.long
@pytest.mark.parametrize("case", ["no input at all", "N < d in kernels"])
def test_edge_cases_end_as_stated_quickly(case):
    *given, expected = CASES[case]
    found, words = outcome(*given)
    assert found in expected, words


# With fewer units than sites kernels are nearly singular: then "auto" takes weights, and pre-activations may fail.
NARROW = {
    "width 1": (network(width=1, activation="erf", noise=0.5), {RIGHT}),
    "d = N": (network(width=6, activation="erf", noise=0.5), {RIGHT}),
    "d > N": (network(width=4, activation="tanh", noise=0.5), {RIGHT, FAILED}),
    "d > N, linear": (network(width=4, noise=0.5), {RIGHT, FAILED}),
}


def same_law(*runs):
    """Whether two runs, of (key, network, task, space, double), agree; the verdict of the first that failed."""
    found = []
    for seed, net, task, space, double in runs:
        with jax.enable_x64(double):
            draws = bk.sample(
                jax.random.key(seed), net, task, space=space,
                num_warmup=400, num_samples=3000, num_chains=4, progress=False,
            )  # fmt: skip
        chains = bk.diagnose(draws)
        if not chains.ok:
            return FAILED, f"{space}, {'float64' if double else 'float32'}. {chains.verdict}"
        found.append(moments_of(draws, net, task))
    worst, limit = disagreement(*found)
    return (RIGHT if worst < limit else "WRONG"), f"largest z {worst:.2f}, limit {limit:.2f}"


@pytest.mark.slow
@pytest.mark.parametrize("case", NARROW)
def test_narrow_networks_end_as_stated(case):
    """Theory does not apply; the two spaces that do must agree, or a verdict say why not."""
    net, expected = NARROW[case]
    found, words = same_law(
        (1, net, PAIR, "weights", False), (2, net, PAIR, "preactivations", False)
    )
    print(f"| {case}, weights against pre-activations | {found} | {words} |")
    assert found in expected, words


def test_narrow_networks_are_sampled_in_weights():
    chosen = _choose("auto", network(width=4, activation="tanh"), PAIR, ())
    assert chosen.name == "weights"
    assert "fewer units than independent sites (4 < 6)" in chosen.reason


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.1, 0.01])
@pytest.mark.parametrize("activation", ["linear", "erf"])
def test_float32_and_float64_sample_one_law(activation, noise):
    net = network(activation=activation, width=24, noise=noise)
    found, words = same_law(*((k, net, PAIR, "preactivations", k == 2) for k in (1, 2)))
    print(f"| float32 and float64, {activation}, noise {noise} | {found} | {words} |")
    # At small noise a few transitions in ten thousand diverge in linear networks.
    assert found == RIGHT or (noise < 0.1 and "divergent" in words), words


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, np.nan])
@pytest.mark.parametrize("name", ["noise", "input_std", "recurrent_std", "readout_std"])
def test_scales_that_are_no_scales_are_refused(name, bad):
    with pytest.raises(bk.InputError, match=f"{name}: expected a finite number > 0"):
        network(**{name: bad})
