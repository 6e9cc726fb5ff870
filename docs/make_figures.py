"""Make the figures of README and docs from scratch: ``python docs/make_figures.py``."""

from pathlib import Path

import jax

import bayeskernel as bk

FOLDER = Path(__file__).parent / "images"


def kernels() -> None:
    """Sampled and analytic kernels of the default task of ``bayeskernel compare``."""
    task = bk.tasks.digits(patterns_per_class=2, steps=4).scaled(2.0)
    results = {}
    for name, sharing in (("RNN", "tied"), ("DNN", "untied")):
        network = bk.Network(128, "linear", sharing, noise=0.3)
        draws = bk.sample(
            jax.random.key(0), network, task, space="weights", num_warmup=200, num_samples=200
        )
        results[name] = bk.compare(draws, bk.solve(network, task))
    bk.plots.plot_comparison(results).savefig(FOLDER / "kernels.png", dpi=110)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    kernels()
