"""Networks trained by Langevin dynamics against posterior samples and theory, at widths that matter.

``python -m pytest -n 0 -m slow tests/inference/test_langevin.py -rP`` prints tables. Kernels are means over fifty steps of the second half of training, their errors the spread over networks.
"""

from typing import NamedTuple

import arviz as az
import jax
import numpy as np
import pytest
from scipy.stats import t as student

import bayeskernel as bk
from bayeskernel.gauge import aligned, sign_symmetry
from bayeskernel.inference.record import settings

TASK = bk.tasks.endpoint([[1.0]], [1.0], 3)
UPPER = np.triu_indices(3)
# Activation, noise, signals: the tied networks' transitions are at 3.00 (linear) and 1.94 (erf); relu has none.
KINDS = {
    "linear": (0.5, (2.0, 4.5)),
    "erf": (0.3, (1.0, 2.5)),
    "relu": (0.5, (1.0, 2.0)),
}
CASES = [
    (activation, sharing, signal)
    for activation, (_, signals) in KINDS.items()
    for sharing in ("tied", "untied")
    for signal in signals
]
WIDTH, SEEDS, NETWORKS, STEPS = 512, (0, 1), 8, 3_000
# Tied networks above the transition are slow: their steps find each other from a prior in which they are strangers.
SLOW_STEPS = 8_000
FALSE_ALARM = 1e-4
WIDE = (
    (2048, "linear", "tied", 2.0),
    (2048, "linear", "untied", 4.5),
    (2048, "erf", "untied", 1.0),
    (2048, "relu", "untied", 1.0),
    (2048, "linear", "tied", 4.5),
    (2048, "erf", "tied", 2.5),
    (4096, "relu", "tied", 1.0),
)


class Found(NamedTuple):
    """An ensemble's distinct kernel entries: at all times (networks, times, entries), their means over times (networks, entries),
    and the mean and error of these over networks.
    """

    path: np.ndarray
    entries: np.ndarray
    mean: np.ndarray
    error: np.ndarray
    misfit: np.ndarray  # <(f - y)^2> of every network
    stiffness: float
    verdict: str


def langevin(network, task, theory, seed, steps=STEPS, share=None, networks=NETWORKS):
    """``share`` is the learning rate times the curvature that the default rate knows of, 0.8 there."""
    at = np.linspace(steps / 2, steps, 51).round().astype(int)
    options = {"num_networks": networks, "progress": False}
    rate = None
    if share is not None:
        probe = bk.train(jax.random.key(seed), network, task, num_steps=1, **options)
        rate = share / settings(probe)["curvature"]
    tree = bk.train(
        jax.random.key(seed), network, task, num_steps=steps, learning_rate=rate, at=at, **options
    )
    kernel, output = (tree["training"][name].to_numpy() for name in ("kernel", "output"))
    symmetry = sign_symmetry(network, task)
    kernel = aligned(kernel, output.astype(float), theory.kernel, symmetry)[0].astype(float)
    path = kernel[:, :, :, 0, :, 0][:, :, *UPPER]
    entries = path.mean(1)
    made, misfit = settings(tree), tree["training"]["squared_error"].to_numpy().mean(1)
    assert not made["left_out"]
    return Found(
        path,
        entries,
        entries.mean(0),
        entries.std(0, ddof=1) / np.sqrt(networks),
        misfit,
        made["learning_rate"] * made["curvature"],
        bk.diagnose(tree).verdict,
    )


def sampled(network, task, theory, seed):
    draws = bk.sample(
        jax.random.key(100 + seed), network, task, num_samples=4000, num_chains=2, progress=False
    )
    cmp = bk.compare(draws, theory)
    assert cmp.smallest_ess > 200
    return cmp


def trained(width, case, steps, seeds=SEEDS, networks=NETWORKS):
    """Ensembles of every seed, draws compared with theory, and theory."""
    activation, sharing, signal = case
    network = bk.Network(width, activation, sharing, noise=KINDS[activation][0])
    task = TASK.scaled(signal)
    theory = bk.solve(network, task)
    cmp = sampled(network, task, theory, 0)
    if sharing == "tied" and signal == max(KINDS[activation][1]):
        steps = SLOW_STEPS
    return (
        [langevin(network, task, theory, s, steps, networks=networks) for s in seeds],
        cmp,
        theory,
    )


def judge(label, trained, own, own_error, effective):
    """Mean entries, whose errors are known from so many effective draws, against samples and theory."""
    rows, cmp, theory = trained
    mean, error, width_error = (
        x[:, 0, :, 0][UPPER] for x in (cmp.kernel, cmp.mcse, cmp.finite_width)
    )
    target = theory.kernel[:, 0, :, 0][UPPER]
    limit = student(effective - 1).isf(FALSE_ALARM / 2 / len(mean))
    z = (own - mean) / np.hypot(own_error, error)
    beside = (own - target) / np.hypot(own_error, width_error)
    size = np.linalg.norm(mean)
    print(
        f"| {label} | {np.abs(z).max():.2f} | {np.abs(beside).max():.2f} | {limit:.1f} "
        f"| {np.linalg.norm(own - mean) / size:.4f} | {np.linalg.norm(own_error) / size:.4f} |",
        flush=True,
    )
    assert all("at its end" in row.verdict for row in rows), [row.verdict for row in rows]
    assert np.abs(z).max() < limit
    assert np.abs(beside).max() < limit


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_langevin_samples_and_theory(case):
    found = trained(WIDTH, case, STEPS)
    entries = np.concatenate([row.entries for row in found[0]])
    count = len(entries)
    label = "{}, {}, {:g}".format(*case)
    judge(label, found, entries.mean(0), entries.std(0, ddof=1) / np.sqrt(count), count)


@pytest.mark.slow
@pytest.mark.parametrize("case", WIDE, ids=lambda case: "-".join(map(str, case)))
def test_wide_networks(case):
    """Few networks, whose error is that of correlated draws: chains are networks, draws times."""
    width, *rest = case
    found = trained(width, rest, 2_000, SEEDS if width < 4096 else SEEDS[:1], networks=4)
    path = np.concatenate([row.path for row in found[0]])
    error, ess = np.array(
        [[az.mcse(values), az.ess(values)] for values in np.moveaxis(path, -1, 0)], float
    ).T
    label = f"{width} | {{}}, {{}}, {{:g}} | {len(path)} | {ess.min():.0f}".format(*rest)
    judge(label, found, path.mean((0, 1)), error, ess.min())
    assert ess.min() > 20


@pytest.mark.slow
def test_error_falls_with_the_width():
    """Linear, tied, above the transition: distance to theory, of networks and of samples."""
    task = TASK.scaled(4.5)
    distances = []
    for width in (64, 128, 256, 512, 1024):
        network = bk.Network(width, "linear", noise=0.5)
        theory = bk.solve(network, task)
        target = theory.kernel[:, 0, :, 0][UPPER]
        found = langevin(network, task, theory, 5, SLOW_STEPS, networks=16 if width < 1024 else 8)
        other = sampled(network, task, theory, 5).kernel[:, 0, :, 0][UPPER]
        size = np.linalg.norm(target)
        distances.append(np.linalg.norm(found.mean - target) / size)
        print(
            f"| {width} | {distances[-1]:.4f} | {np.linalg.norm(other - target) / size:.4f} "
            f"| {np.linalg.norm(found.error) / size:.4f} | {found.verdict[:30]} |"
        )
    assert distances[-1] < distances[0] / 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "noise", "signal"), [("linear", 0.5, 4.5), ("erf", 0.3, 2.5)]
)
def test_no_bias_of_the_step(activation, noise, signal):
    """No bias is seen up to the edge of stability, at N = 16, where fluctuations are far from normal: of the kernel, and of the
    outputs' variance, in the steepest direction.
    """
    task = TASK.scaled(signal)
    network = bk.Network(16, activation, noise=noise)
    theory = bk.solve(network, task)
    with jax.enable_x64(True):
        cmp = sampled(network, task, theory, 7)
    mean, error = (x[:, 0, :, 0][UPPER] for x in (cmp.kernel, cmp.mcse))
    truth = misfit(network, signal, cmp.draws["posterior"]["kernel"].to_numpy()[..., 2, 0, 2, 0])
    size = np.linalg.norm(mean)
    for share in (1.8, 1.2, 0.6, 0.3):
        found = langevin(network, task, theory, 7, int(6000 / share), share=share, networks=256)
        off, own = found.misfit.mean() / truth - 1, found.misfit.std() / 16 / truth
        print(
            f"| {activation} | {share:g} | {np.linalg.norm(found.mean - mean) / size:.4f} "
            f"| {np.hypot(np.linalg.norm(found.error), np.linalg.norm(error)) / size:.4f} "
            f"| {100 * off:+.1f} ± {100 * own:.1f} % | {found.verdict[:60]} |"
        )
        z = (found.mean - mean) / np.hypot(found.error, error)
        limit = student(255).isf(FALSE_ALARM / 2 / len(z))
        assert np.abs(z).max() < limit
        assert abs(off) < limit * own


def misfit(network, signal, last):
    """<(f - y)^2> from the law of f given the kernel's last entry, whatever the activation."""
    prior, noise = last.astype(float) / network.width, network.noise / network.width
    mean, variance = prior / (prior + noise) * signal, prior * noise / (prior + noise)
    return np.mean((mean - signal) ** 2 + variance)
