"""Phase diagrams of weight sharing: ``python docs/phase_diagrams.py FOLDER [processes]`` sweeps and draws them.

The folder keeps the sweeps; a second run goes on where the first one ended. Figures go to ``docs/images``.
"""

import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import bayeskernel as bk

IMAGES = Path(__file__).parent / "images"
WIDTH, NOISE = 1024, 0.1
SAMPLE = {"num_warmup": 300, "num_samples": 500, "num_chains": 2}
STEPS = [2, 3, 4, 5]
NOISES = [0.03, 0.1, 0.3, 1.0]
WIDTHS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
# Signals in units of the spinodal's order of magnitude, which falls with depth for linear and erf alike.
SIGNALS = {"linear": np.geomspace(0.5, 5.0, 9), "erf": np.geomspace(0.5, 5.0, 9)}


def task(steps: int) -> bk.Task:
    """One pattern of length one, target one at the last step."""
    return bk.tasks.endpoint([[1.0]], [1.0], steps)


def diagram(axis: str, values: list[float], folder: Path, processes: int) -> None:
    """Coherence between first and last step over signal and another axis, sampled and theory."""
    fig, panels = plt.subplots(
        2, 2, figsize=(9, 6), layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    for row, (activation, signals) in zip(panels, SIGNALS.items(), strict=True):
        network = bk.Network(WIDTH, activation, noise=NOISE)
        grid = {"signal": signals.tolist(), axis: values}
        given = task if axis == "steps" else task(3)
        data = bk.sweep(
            network,
            given,
            grid,
            sample=SAMPLE,
            out=folder / f"{axis}-{activation}",
            client=processes,
        )
        lines = []
        for value in values:
            here = (
                (network, task(int(value)))
                if axis == "steps"
                else (bk.Network(WIDTH, activation, noise=value), task(3))
            )
            try:
                lines.append(bk.critical_signal(*here))
            except bk.BayesKernelError:  # no transition up to the largest signal looked at
                lines.append(None)
        for ax, source in zip(row, ("sampled", "theory"), strict=True):
            last = data["steps"] if axis == "steps" else 3
            rho = abs(data["coherence"].sel(source=source, step=1))
            rho = rho.sel(other_step=last).transpose(axis, "signal")
            ordinate = np.arange(len(values)) if axis == "steps" else np.log10(values)
            shown = ax.pcolormesh(signals, ordinate, rho, vmin=0, vmax=1, shading="nearest")
            for name, style in (("spinodal", "w-"), ("coexistence", "w:")):
                at = [np.nan if c is None else getattr(c, name) for c in lines]
                ax.plot(at, ordinate, style, marker=".", label=name)
            ax.set(xscale="log", xlim=(signals[0], signals[-1]), title=f"{activation}, {source}")
            ax.set_yticks(ordinate, [f"{v:g}" for v in values])
            ax.set_ylabel("steps T" if axis == "steps" else "noise κ")
    panels[0, 0].legend(labelcolor="white", frameon=False)
    for ax in panels[-1]:
        ax.set_xlabel("signal")
    fig.colorbar(shown, ax=panels, label="|coherence| of first and last step")
    fig.savefig(IMAGES / f"phase_{axis}.png", dpi=110)


def widths(folder: Path, processes: int) -> None:
    """Distance between sampled and mean-field kernels against the width."""
    fig, ax = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for activation in ("linear", "erf"):
        network = bk.Network(WIDTH, activation, noise=NOISE)
        data = bk.sweep(
            network,
            task(3),
            {"signal": [3.5], "width": WIDTHS},
            sample=SAMPLE | {"num_samples": 2000},
            out=folder / f"width-{activation}",
            client=processes,
        ).squeeze()
        sites = data["z"].dims[-4:]
        theory, sampled = (data["kernel"].sel(source=s) for s in ("theory", "sampled"))
        size = np.sqrt((theory**2).sum(sites))
        distance = np.sqrt(((sampled - theory) ** 2).sum(sites)) / size
        error = np.sqrt((data["kernel_error"].sel(source="sampled") ** 2).sum(sites)) / size
        predicted = np.sqrt((data["kernel_shift"] ** 2).sum(sites)) / size
        drawn = ax.errorbar(WIDTHS, distance, error, fmt="o", label=f"{activation}, sampled")
        ax.plot(
            WIDTHS,
            predicted,
            color=drawn[0].get_color(),
            label=f"{activation}, theory at order 1/N",
        )
    ax.set(
        xscale="log", yscale="log", xlabel="width N", ylabel="‖sampled − mean field‖ / ‖mean field‖"
    )
    ax.legend(frameon=False, fontsize="small")
    fig.savefig(IMAGES / "phase_width.png", dpi=110)


if __name__ == "__main__":
    where, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2
    for name, make in (
        ("steps", lambda: diagram("steps", STEPS, where, count)),
        ("noise", lambda: diagram("noise", NOISES, where, count)),
        ("width", lambda: widths(where, count)),
    ):
        began = time.time()
        make()
        print(f"{name}: {time.time() - began:.0f} s", flush=True)
