"""Sampled weights against theory: the two share only the definitions of C and K.

Theory says where the posterior mean lies at width N up to order 1/N^2: kernel + kernel_shift(N). What
is left over is of relative order (shift / kernel), so the error bar is the Monte-Carlo error together
with |shift|^2 / |kernel|. Five sigma, fixed seeds, after a gate on the effective sample size.
"""

import arviz as az
import jax
import numpy as np
import pytest
from scipy.special import erf
from scipy.stats import norm

import bayeskernel as bk
from bayeskernel.inference.convergence import mean_and_error
from bayeskernel.meanfield.fluctuations import Fluctuations
from bayeskernel.meanfield.predict import joint_problem

WIDTH = 64
CASES = {
    "below, tied": (bk.tasks.endpoint([[1.0]], [1.5], 3), "tied", 0.5),
    "below, untied": (bk.tasks.endpoint([[1.0]], [1.5], 3), "untied", 0.5),
    "above, tied": (bk.tasks.endpoint([[1.0]], [4.5], 3), "tied", 0.5),
    "above, untied": (bk.tasks.endpoint([[1.0]], [4.5], 3), "untied", 0.5),
    "digits, blocks": (bk.tasks.digits(patterns_per_class=1).scaled(2), [0, 0, 1, 1], 1.0),
    "sequence, tied": (bk.tasks.sine(2, 3, supervised=[1, 3]).scaled(2), "tied", 1.0),
}


def sampled(seed, network, task, **changed):
    settings = {"num_warmup": 300, "num_samples": 500, "num_chains": 4, "progress": False}
    return bk.sample(jax.random.key(seed), network, task, **{**settings, **changed})


def corrected_z(found, mcse, expected, shift) -> np.ndarray:
    left_over = np.linalg.norm(shift) ** 2 / np.linalg.norm(expected)
    return (found - expected - shift) / np.sqrt(mcse**2 + left_over**2)


def corrected_kernel_z(cmp: bk.Comparison) -> np.ndarray:
    return corrected_z(cmp.kernel, cmp.mcse, cmp.theory.kernel, cmp.theory.kernel_shift())


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "space"),
    [
        ("above, tied", "weights"),
        ("above, tied", "kernels"),
        *(
            pytest.param(case, "weights", marks=pytest.mark.slow)
            for case in CASES
            if case != "above, tied"
        ),
        pytest.param("digits, blocks", "kernels", marks=pytest.mark.slow),
    ],
)
def test_samples_agree_with_theory_at_finite_width(case, space):
    task, sharing, noise = CASES[case]
    network = bk.Network(WIDTH, "linear", sharing, noise=noise)
    draws = sampled(11, network, task, space=space)
    theory = bk.solve(network, task)
    cmp = bk.compare(draws, theory)
    assert not draws["sample_stats"]["diverging"].any()
    assert cmp.table["ess"].min() > 200
    assert cmp.agrees, cmp.verdict
    assert np.abs(corrected_kernel_z(cmp)).max() < 5
    # Fluctuations: the sampled standard deviation of well-sampled diagonal entries.
    kernels = draws["posterior"]["kernel"].to_numpy()
    size = task.shape[0] * task.shape[1]
    diagonal = np.einsum("cdii->cdi", kernels.reshape(*kernels.shape[:2], size, size))
    expected = np.diag(theory.kernel_std().reshape(size, size))
    assert diagonal.std(axis=(0, 1)) == pytest.approx(expected, rel=0.2)


@pytest.mark.long
def test_outputs_agree_with_theory():
    task = bk.tasks.sine(2, 3, supervised=[1, 3])
    network = bk.Network(WIDTH, "linear", "tied", noise=0.3)
    draws = sampled(5, network, task)
    theory = bk.solve(network, task)
    cmp = bk.compare(draws, theory)
    z = corrected_z(cmp.output, cmp.output_mcse, theory.output, theory.output_shift())
    assert np.abs(z).max() < 5


@pytest.mark.parametrize(
    "sharing",
    [
        pytest.param("tied", marks=pytest.mark.long),
        pytest.param("untied", marks=pytest.mark.slow),
    ],
)
def test_spread_of_outputs_at_large_width(sharing):
    """Kernel space at a width where the next order is below the Monte-Carlo error."""
    task = bk.tasks.sine(2, 3, supervised=[1, 3]).scaled(2)
    network = bk.Network(20_000, "linear", sharing, noise=0.5)
    draws = sampled(2, network, task, num_samples=1000)
    theory = bk.solve(network, task)
    outputs = draws["posterior"]["output"]
    squares = ((outputs - outputs.mean(("chain", "draw"))) ** 2).to_dataset()
    ess = az.ess(squares)["output"].to_numpy()
    assert ess.min() > 200
    variance = squares["output"].mean(("chain", "draw")).to_numpy()
    # The variance of a square is twice the squared variance.
    z = (variance / theory.output_std() ** 2 - 1) / np.sqrt(2 / ess)
    assert np.abs(z).max() < 5


def test_one_step_is_exactly_a_bayesian_linear_model():
    """T = 1: Q is a scalar and every moment is an integral; the 1/N expansion must match it."""
    width, y, noise = 200, 2.0, 0.5
    network, task = bk.Network(width, "linear", noise=noise), bk.tasks.endpoint([[1.0]], [y], 1)
    theory = bk.solve(network, task)
    # p(C) for N units: Wishart in one dimension times the Gaussian evidence of y.
    C = np.linspace(1e-3, 12, 400_001)
    S = C + noise
    log_p = -width / 2 * (C - np.log(C) + y**2 / S) - np.log(C) - np.log(S) / 2
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean = (p * C).sum()
    std = np.sqrt((p * (C - mean) ** 2).sum())
    assert float(theory.kernel_std().squeeze()) == pytest.approx(std, rel=0.02)
    shift = float(theory.kernel_shift().squeeze())
    assert mean - float(theory.kernel.squeeze()) == pytest.approx(shift, rel=0.05)
    assert isinstance(theory._fluctuations, Fluctuations)


def posterior_of_one_step(width, y, noise):
    """Mean and std of C, one pattern and erf: phi^2 of the prior, convolved with itself N times."""
    h = np.linspace(-12, 12, 400_001)
    u, prior = erf(np.sqrt(np.pi) / 2 * h) ** 2, norm.pdf(h)
    count = 4096  # bins of u in [0, 1]; mass is split between the two nearest
    below = np.minimum((u * (count - 1)).astype(int), count - 2)
    share = u * (count - 1) - below

    def log_evidence(C):
        return -width / 2 * y**2 / (C + noise) - np.log(C + noise) / 2

    C = np.arange(width * (count - 1) + 1) / (count - 1) / width
    # Tilted to where the posterior is, so that the convolution keeps its digits there.
    tilt = 0.0
    for _ in range(30):
        mass = prior * np.exp(tilt * (u - 1))
        tilt = y**2 / 2 / (np.average(u, weights=mass) + noise) ** 2
    one = np.bincount(below, mass * (1 - share), count)
    one += np.bincount(below + 1, mass * share, count)
    length = 2 ** int(np.ceil(np.log2(len(C))))
    density = np.fft.irfft(np.fft.rfft(one / one.sum(), length) ** width, length)[: len(C)]
    kept = density > 1e-12 * density.max()
    C, log_p = C[kept], np.log(density[kept]) + (log_evidence(C) - tilt * width * C)[kept]
    p = np.exp(log_p - log_p.max())
    mean = np.average(C, weights=p)
    return mean, np.sqrt(np.average((C - mean) ** 2, weights=p))


@pytest.mark.parametrize("signal", [1.0, 2.5, 4.5])
def test_one_nonlinear_step_at_any_width(signal):
    """T = 1, erf: fluctuations and shift against the exact posterior of 256 units."""
    width, task = 256, bk.tasks.endpoint([[1.0]], [signal], 1)
    theory = bk.solve(bk.Network(width, "erf", noise=0.1), task)
    mean, std = posterior_of_one_step(width, signal, 0.1)
    assert theory.kernel_std().item() == pytest.approx(std, rel=2e-3)
    shift = theory.kernel_shift().item()
    # What is left is of order 1/N^2; bins add some 1e-7.
    assert mean - theory.kernel.item() == pytest.approx(shift, rel=5e-3, abs=5e-7)


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "noise"), [("erf", 0.2), ("relu", 1.0)])
def test_predictions_agree_with_theory(activation, noise):
    """New patterns at the supervised step: mean and spread, sampled and from theory."""
    width, new = 512, np.zeros((3, 2, 2))
    new[0] = [[0.8, -0.6], [1.5, 1.0]]
    task = bk.tasks.endpoint([[1.0, 0.3], [-0.2, 1.1]], [2.0, -1.0], 3)
    network = bk.Network(width, activation, noise=noise)
    draws = sampled(
        4,
        network,
        task,
        space="preactivations",
        keep=("preactivations",),
        num_warmup=500,
        num_samples=2000,
        num_chains=2,
    )
    found = bk.predict(jax.random.key(1), draws, network, task, new)["output"]
    outputs = found.isel(step=-1, output_unit=0).to_dataset(name="output")
    ess = az.ess(outputs)["output"].to_numpy()
    assert ess.min() > 200
    theory = bk.solve(network, task)
    predicted, std = theory.predict(new), theory.predict_std(new)[-1, :, 0]
    mean, monte_carlo = (a[-1, :, 0] for a in (predicted.mean, predicted.monte_carlo_error))
    extended = [
        Fluctuations(
            theory._extended(joint_problem(theory.network, theory.task, new[:, a : a + 1]))
        )
        for a in range(2)
    ]
    shifts = [f.shift().output.reshape(3, 3, 1) for f in extended]
    shift = np.array([shift[-1, 2, 0] for shift in shifts]) / width
    values = outputs["output"].to_numpy()
    left_over = shift**2 / np.abs(mean)
    error = np.sqrt(std**2 / ess + left_over**2 + monte_carlo**2)
    z = (values.mean((0, 1)) - mean - shift) / error
    print("mean", np.round(z, 2))
    assert np.abs(z).max() < 5
    ratio = values.std((0, 1)) / std - 1
    error = np.hypot(np.sqrt(1 / (2 * ess.min())), 0.03)
    print("spread", np.round(ratio / error, 2), np.round(ratio, 3))
    assert np.abs(ratio / error).max() < 5


@pytest.mark.slow
def test_predictions_of_many_correlated_sites():
    """Ten images held out from sixteen (d = 64, moving particles): means, and spread by Wick's law, to docs/calibration."""
    task, test = (
        bk.tasks.digits(patterns_per_class=n, start=s).scaled(2.0) for n, s in ((8, 0), (5, 100))
    )
    network = bk.Network(1024, "erf", noise=0.3)
    draws = sampled(
        0, network, task, keep=("preactivations",), num_warmup=300, num_samples=500, num_chains=2
    )
    outputs = bk.predict(jax.random.key(1), draws, network, task, test.inputs)["output"].to_numpy()
    mean, error, ess = mean_and_error(outputs[..., 0])
    assert ess.min() > 100
    theory = bk.solve(network, task)
    predicted, std = theory.predict(test.inputs), theory.predict_std(test.inputs)[..., 0]
    z = (mean - predicted.mean[..., 0]) / np.hypot(error, predicted.monte_carlo_error[..., 0])
    print("means", np.round(z, 1))
    assert np.abs(z).max() < 5
    ratio = np.sqrt((std**2).sum(1) / outputs.var((0, 1))[..., 0].sum(1))
    print("spread", np.round(ratio, 3))
    assert np.abs(ratio - 1).max() < 0.15


@pytest.mark.slow
def test_steps_without_shared_weights_of_a_relu_network():
    """Kernel entries between independent steps, whose activities have a mean."""
    task = bk.tasks.endpoint([[1.0]], [2.0], 3)
    network = bk.Network(256, "relu", "untied", noise=0.2)
    draws = sampled(8, network, task, num_warmup=500, num_samples=4000)
    cmp = bk.compare(draws, bk.solve(network, task))
    assert cmp.table["ess"].min() > 400
    assert cmp.agrees, cmp.verdict
    assert np.abs(corrected_kernel_z(cmp)).max() < 5
    kernels = draws["posterior"]["kernel"].to_numpy()
    expected = cmp.theory.kernel_std()
    assert kernels.std(axis=(0, 1)) == pytest.approx(expected, rel=0.15)
