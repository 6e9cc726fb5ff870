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


# Ways of training of docs/training: options, and how they are drawn.
WAYS = {
    "Langevin": ({"optimizer": "langevin", "num_steps": 8000}, "C0-"),
    "GD": ({"optimizer": "gd", "num_steps": 8000}, "C1-"),
    "SGD, one pattern a step": ({"optimizer": "sgd", "batch_size": 1, "num_steps": 16_000}, "C2-"),
    "Adam": ({"optimizer": "adam", "num_steps": 4000}, "C3-"),
    "GD, stopped early": ({"optimizer": "gd", "num_steps": 100}, "C1*"),
    "GD, no decay": ({"optimizer": "gd", "weight_decay": 0.0, "num_steps": 8000}, "C1--"),
    "Adam, no decay": ({"optimizer": "adam", "weight_decay": 0.0, "num_steps": 4000}, "C3--"),
}


def training() -> None:
    """What each way of training reaches, two patterns, linear and erf; prints the table of docs/training."""
    patterns = [[1.0, 0.0], [0.5, 1.0]]
    fig, axes = plt.subplots(2, 2, figsize=(11, 6.5), layout="constrained", sharex="row")
    for row, (activation, noise, targets) in zip(
        axes, (("linear", 0.5, [6.0, -6.0]), ("erf", 0.3, [3.0, -3.0])), strict=True
    ):
        network = bk.Network(128, activation, noise=noise)
        task = bk.tasks.endpoint(patterns, targets, 3)
        theory = bk.solve(network, task)
        draws = bk.sample(jax.random.key(0), network, task, num_samples=2000)
        f = draws["posterior"]["output"].to_numpy()[..., 2, :, 0]
        row[0].axhline(np.mean((f - targets) ** 2), color="k", ls=":", label="posterior")
        row[1].axhline(_alike(_norms(theory.kernel)), color="k", ls=":", label="theory")
        print(f"{activation}: samples {100 * bk.compare(draws, theory).frobenius_error:.1f} %")
        for name, (options, style) in WAYS.items():
            tree = bk.train(jax.random.key(1), network, task, num_networks=16, **options)
            cmp = bk.compare(tree, theory)
            trace = tree["trace"]
            steps, norms = trace["training_step"].to_numpy(), trace["norm"].to_numpy()
            misfit, alike = trace["squared_error"].to_numpy().mean(0), _alike(norms)
            shown = slice(-1 if "stopped" in name else 0, None)
            row[0].plot(steps[shown], np.maximum(misfit, 1e-4)[shown], style, label=name)
            row[1].plot(steps[shown], alike.mean(0)[shown], style, label=name)
            print(
                f"| {activation} | {name} | {100 * cmp.frobenius_error:.1f} % | {cmp.largest_z:.1f} of {cmp.threshold:.1f} "
                f"| {alike[:, -1].mean():.2f} | {misfit[-1]:.3f} | {bk.diagnose(tree).verdict} |"
            )
        row[0].set(yscale="log", ylabel=f"{activation}: squared error (10⁻⁴ at least)")
        row[1].set(ylim=(0, 1.05), ylabel="coherence of steps 2 and 3")
    for ax in axes.ravel():
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xlim(0, None)
    for ax in axes[1]:
        ax.set_xlabel("step of training")
    axes[0, 1].legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    fig.savefig(FOLDER / "training.png", dpi=110)


def _norms(kernel: np.ndarray) -> np.ndarray:
    return np.sqrt(np.sum(kernel**2, axis=(1, 3)))


def _alike(norms: np.ndarray) -> np.ndarray:
    """Norm of the block of steps 2 and 3 over those of their own blocks."""
    return norms[..., 1, 2] / np.sqrt(norms[..., 1, 1] * norms[..., 2, 2])


# Sharing patterns of docs/real_images, for four steps and eight.
SHARED = {
    4: {"RNN": "tied", "pairs": [0, 0, 1, 1], "DNN": "untied"},
    8: {"RNN": "tied", "pairs": [0, 0, 1, 1, 2, 2, 3, 3], "DNN": "untied"},
}
CHOICES = {"3 against 8": (3, 8), "ten digits": tuple(range(10))}
# Noise of all networks there, and of the Gaussian process the best of these.
KAPPA, KAPPAS = 10.0, (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


def held_out() -> None:
    """Held-out digits of RNN, DNN and NNGP against signal and images per class; prints the table of docs/real_images."""
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    shown = np.array([0.3, 1.0, 2.0, 3.0, 5.0, 10.0])
    for ax, (name, classes), count in zip(axes, CHOICES.items(), (8, 2), strict=False):
        subsets = [_split(classes, count, 4, seed) for seed in range(8 if count == 8 else 6)]
        found = {float(y): _scores(f"{name} | linear", subsets, float(y), "linear") for y in shown}
        for k, kind in enumerate(SHARED[4]):
            mean, error = np.array([_mean(scores[kind]) for scores in found.values()]).T
            ax.errorbar(
                shown * 1.03 ** (k - 1), 100 * mean, 100 * error, fmt="o-", ms=4, label=kind
            )
        for kappa, style in (("NNGP", ":"), ("best NNGP", "--")):
            ax.axhline(100 * found[1.0][kappa].mean(), color="k", ls=style, lw=1, label=kappa)
        ax.set(xscale="log", xlabel="signal", ylabel="held-out accuracy [%]")
        ax.set_title(f"{name}, {count} images each")
    axes[0].legend(frameon=False)
    for (name, classes), counts in zip(
        CHOICES.items(), ((1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8)), strict=True
    ):
        points = []
        for count in counts:
            several = [_split(classes, count, 4, s) for s in range(2 if count > 32 else 6)]
            scores = _scores(f"{name} | linear", several, 10.0, "linear")
            points.append(_mean(scores["RNN"] - scores["DNN"]))
        mean, error = 100 * np.array(points).T
        axes[2].errorbar(counts, mean, error, fmt="o-", ms=4, label=name)
    axes[2].axhline(0, color="k", lw=0.5)
    axes[2].set(xscale="log", xlabel="images per digit", ylabel="RNN minus DNN [%]")
    axes[2].set_title("signal 10")
    axes[2].legend(frameon=False, loc="lower right")
    fig.savefig(FOLDER / "held_out.png", dpi=110)
    for name, count, steps, phi, signals in (
        ("3 against 8", 8, 8, "linear", (3.0, 10.0)),
        ("ten digits", 2, 8, "linear", (3.0, 10.0)),
        # Beyond, erf networks saturate, and their solutions take long to converge.
        ("3 against 8", 8, 4, "erf", (3.0,)),
        ("ten digits", 1, 4, "erf", (3.0,)),
    ):
        sets = 8 if (phi, count) == ("erf", 8) else 4
        several = [_split(CHOICES[name], count, steps, seed) for seed in range(sets)]
        for signal in signals:
            _scores(f"{name} | {phi}", several, signal, phi)


def _split(classes: tuple[int, ...], count: int, steps: int, seed: int) -> tuple[bk.Task, bk.Task]:
    """Images drawn for training, ``count`` of each digit, and others for the test, 200 for two digits and 400 for ten."""
    every, held = 174, 100 if len(classes) == 2 else 40
    task = bk.tasks.digits(classes, every, steps)
    rng = np.random.default_rng(seed)
    orders = [k * every + rng.permutation(every) for k in range(len(classes))]
    chosen = (
        np.concatenate([o[part] for o in orders]) for part in (slice(count), slice(-held, None))
    )
    train, test = (bk.Task(task.inputs[:, own], task.targets[:, own]) for own in chosen)
    return train, test


def _scores(
    label: str, subsets: list[tuple[bk.Task, bk.Task]], signal: float, phi: str
) -> dict[str, np.ndarray]:
    """Held-out accuracy of every network for every training set; prints a row of the table."""
    found, (steps, patterns, _, _) = {}, subsets[0][0].shape
    for kind, sharing in SHARED[steps].items():
        solved = [
            bk.solve(bk.Network(1, phi, sharing, noise=KAPPA), train.scaled(signal))
            for train, _ in subsets
        ]
        unfinished = sum(not theory.converged for theory in solved)
        if unfinished:
            print(f"{kind}: {unfinished} of {len(solved)} not converged")
        found[kind] = np.array(
            [
                bk.held_out(theory.predict(test.inputs), test).accuracy
                for theory, (_, test) in zip(solved, subsets, strict=True)
            ]
        )
    lazy = {
        kappa: np.array(
            [
                bk.held_out(
                    bk.nngp(bk.Network(1, phi, noise=kappa), train, test.inputs), test
                ).accuracy
                for train, test in subsets
            ]
        )
        for kappa in KAPPAS
    }
    best = max(KAPPAS, key=lambda kappa: lazy[kappa].mean())
    found |= {"NNGP": lazy[KAPPA], "best NNGP": lazy[best]}
    cells = [f"{100 * mean:.1f} ± {100 * error:.1f}" for mean, error in map(_mean, found.values())]
    gain = "{:+.1f} ± {:.1f}".format(*(100 * v for v in _mean(found["RNN"] - found["DNN"])))
    print(
        f"| {label} | {steps} | {patterns} | {signal:g} | {' | '.join(cells)} ({best:g}) | {gain} |",
        flush=True,
    )
    return found


def _mean(values: np.ndarray) -> tuple[float, float]:
    """Mean over training sets and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    kernels()
    width_scaling()
    training()
    held_out()
