"""Make the figures of README and docs from scratch: ``python docs/make_figures.py``."""

import dataclasses
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import bayeskernel as bk

FOLDER = Path(__file__).parent / "images"


def kernels() -> None:
    """Sampled and analytic kernels of the default task of ``bayeskernel compare``."""
    task = bk.tasks.digits(patterns_per_class=2, steps=4).scaled(2.0)
    results = {}
    for name, sharing in (("RNN", "tied"), ("DNN", "untied")):
        network = bk.Network(1024, "erf", sharing, noise=0.3)
        draws = bk.sample(jax.random.key(0), network, task, num_warmup=300, num_samples=1000)
        results[name] = bk.compare(draws, bk.solve(network, task))
    axes = bk.plots.plot_comparison(results)
    axes[0, 0].get_figure().savefig(FOLDER / "kernels.png", dpi=110)


def width_scaling() -> None:
    """Kernel entries of an erf RNN against 1/N, with the theory's intercept and slope."""
    task = bk.tasks.endpoint([[1.0]], [2.5], 3)
    theory = bk.solve(bk.Network(1, "erf", noise=0.1), task)
    widths = np.array([32, 64, 128, 256, 512])
    entries = {(1, 2): "C[1,2]", (1, 3): "C[1,3]", (2, 3): "C[2,3]", (3, 3): "C[3,3]"}
    fig, axes = plt.subplots(1, 4, figsize=(11, 2.8), layout="constrained")
    points = []
    for k, n in enumerate(widths):
        network = bk.Network(int(n), "erf", noise=0.1)
        draws = bk.sample(jax.random.key(k), network, task, num_samples=2000, num_warmup=300)
        cmp = bk.compare(draws, dataclasses.replace(theory, network=network))
        points.append((cmp.kernel, cmp.mcse))
    line = np.linspace(0, 1 / widths[0], 50)
    for ax, ((t, s), label) in zip(axes, entries.items(), strict=True):
        at = (t - 1, 0, s - 1, 0)
        mean, error = (np.array([p[i][at] for p in points]) for i in (0, 1))
        ax.errorbar(1 / widths, mean, 2 * error, fmt="o", ms=4, label="sampled, 2 s.e.")
        ax.plot(line, theory.kernel[at] + theory.kernel_shift(1)[at] * line, label="theory")
        ax.plot(0, theory.kernel[at], "k*", ms=9, clip_on=False)
        ax.set(title=label, xlabel="1/N", xlim=(0, None))
    axes[0].legend(frameon=False)
    fig.savefig(FOLDER / "width_scaling.png", dpi=110)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    kernels()
    width_scaling()
