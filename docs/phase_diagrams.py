"""Phase diagrams of weight sharing: ``python docs/phase_diagrams.py FOLDER [PROCESSES]`` sweeps and draws them.

The folder keeps the sweeps and a second run goes on where the first ended. Figures go to ``docs/images``.
"""

import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes

import bayeskernel as bk

IMAGES = Path(__file__).parent / "images"
WIDTH, NOISE, STEPS = 1024, 0.1, 3
SAMPLE = {"num_warmup": 300, "num_samples": 500, "num_chains": 2}
ACTIVATIONS = ("linear", "erf")
# With two steps no weight acts twice, and sharing means nothing.
AXES = {"steps": [3, 4, 5, 6, 8], "noise": [0.03, 0.1, 0.3, 1.0, 3.0]}
SIGNALS = np.geomspace(0.6, 6.0, 11)
WIDTHS = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def task(steps: int) -> bk.Task:
    """One pattern of length one, target one at the last step."""
    return bk.tasks.endpoint([[1.0]], [1.0], steps)


def transition(activation: str, steps: int, noise: float) -> tuple[float, float]:
    """Spinodal and coexistence."""
    found = bk.critical_signal(bk.Network(1, activation, noise=noise), task(steps))
    return found.spinodal, found.coexistence


def transitions(activation: str, axis: str, folder: Path, processes: int) -> np.ndarray:
    """Spinodal and coexistence for each value of an axis, shape (value, 2); kept in a file."""
    file = folder / f"critical-{axis}-{activation}.json"
    if not file.exists():
        by_steps = axis == "steps"
        steps = AXES["steps"] if by_steps else [STEPS] * len(AXES["noise"])
        noise = [NOISE] * len(AXES["steps"]) if by_steps else AXES["noise"]
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(transition, [activation] * len(steps), steps, noise))
        file.write_text(json.dumps(found))
    return np.array(json.loads(file.read_text()))


def coherence_of_ends(data: xr.Dataset) -> xr.DataArray:
    """|Correlation| of the first step's representation with the last step's."""
    return abs(data["coherence"].sel(step=1, other_step=data["steps"], drop=True))


def norm(kernel: xr.DataArray) -> xr.DataArray:
    """Frobenius norm."""
    return np.sqrt((kernel**2).sum(("step", "pattern", "other_step", "other_pattern")))


def diagram(ax: Axes, activation: str, axis: str, folder: Path, processes: int) -> None:
    """Theory as colour, samples as discs, transitions as lines."""
    data = bk.sweep(
        bk.Network(WIDTH, activation, noise=NOISE),
        task if axis == "steps" else task(STEPS),
        {"signal": SIGNALS.tolist(), axis: AXES[axis]},
        sample=SAMPLE,
        out=folder / f"{axis}-{activation}",
        client=processes,
    )
    rho = coherence_of_ends(data).transpose("source", axis, "signal")
    rows = np.arange(len(AXES[axis]))
    style = {"vmin": 0, "vmax": 1, "cmap": "viridis"}
    drawn = ax.pcolormesh(SIGNALS, rows, rho.sel(source="theory"), shading="nearest", **style)
    x, y = np.meshgrid(SIGNALS, rows)
    ax.scatter(x, y, 60, rho.sel(source="sampled"), edgecolors="white", linewidths=0.6, **style)
    spinodal, coexistence = transitions(activation, axis, folder, processes).T
    ax.plot(spinodal, rows, "w-", lw=2, label="spinodal")
    ax.plot(coexistence, rows, "w--", lw=2, label="coexistence")
    ax.set(xscale="log", xlim=(SIGNALS[0] * 0.9, SIGNALS[-1] * 1.1), xlabel="signal")
    ticks = [0.6, 1, 2, 3, 4, 6]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_yticks(rows, [f"{value:g}" for value in AXES[axis]])
    ax.set_ylabel("steps T" if axis == "steps" else "noise κ")
    ax.set_title(f"{activation}, {'κ = 0.1' if axis == 'steps' else 'T = 3'}")
    ax.figure.colorbar(drawn, ax=ax, label="coherence of first and last step")


def hysteresis(ax: Axes, folder: Path, processes: int) -> None:
    """Eight linear steps: the branch met with the signal rising and the one met falling."""
    signals = np.linspace(0.65, 0.85, 21)
    data = bk.sweep(
        bk.Network(WIDTH, "linear", noise=NOISE), task(8), {"signal": signals.tolist()},
        sample=SAMPLE | {"num_samples": 2000}, out=folder / "hysteresis", client=processes,
    )  # fmt: skip
    here = {"step": 2, "other_step": 3}
    pairs = abs(data["branch_coherence"].sel(here))
    for direction, mark in (("up", "-"), ("down", "--")):
        ax.plot(signals, pairs.sel(direction=direction), mark, label=f"theory, signal {direction}")
    sampled = abs(data["coherence"].sel(here | {"source": "sampled"}))
    ax.plot(signals, sampled, "k.", label=f"N = {WIDTH}")
    critical = bk.critical_signal(bk.Network(1, "linear", noise=NOISE), task(8))
    for at, name in ((critical.coexistence, "coexistence"), (critical.spinodal, "spinodal")):
        ax.axvline(at, color="0.6", lw=0.8)
        where = ax.get_xaxis_transform()
        ax.text(at, 0.99, f" {name}", color="0.4", fontsize="x-small", va="top", transform=where)
    ax.set(xlabel="signal", ylabel="coherence of steps 2 and 3", title="linear, T = 8")
    ax.legend(frameon=False, fontsize="small", loc="center right")


def width_scaling(ax: Axes, folder: Path, processes: int) -> None:
    """Distance between sampled and mean-field kernels against the width."""
    for activation in ACTIVATIONS:
        data = bk.sweep(
            bk.Network(WIDTH, activation, noise=NOISE), task(STEPS), {"signal": [4.5], "width": WIDTHS},
            sample=SAMPLE | {"num_samples": 4000}, out=folder / f"width-{activation}", client=processes,
        ).isel(signal=0)  # fmt: skip
        theory, sampled = (data["kernel"].sel(source=s) for s in ("theory", "sampled"))
        size = norm(theory)
        distance = norm(sampled - theory) / size
        error = norm(data["kernel_error"].sel(source="sampled")) / size
        predicted = norm(data["kernel_shift"]) / size
        points = ax.errorbar(WIDTHS, distance, error, fmt="o", label=f"{activation}, sampled")
        colour = points[0].get_color()
        ax.plot(WIDTHS, predicted, color=colour, label=f"{activation}, theory at order 1/N")
    ax.set(xscale="log", yscale="log", xlabel="width N", title="T = 3, signal 4.5")
    ax.set_ylabel("‖sampled − mean field‖ / ‖mean field‖")
    ax.legend(frameon=False, fontsize="small")


def main(folder: Path, processes: int) -> None:
    """Sweep, draw, and say how long it took."""
    fig, panels = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for row, activation in zip(panels, ACTIVATIONS, strict=True):
        for ax, axis in zip(row, AXES, strict=True):
            began = time.time()
            diagram(ax, activation, axis, folder, processes)
            print(f"{activation}, signal and {axis}: {time.time() - began:.0f} s", flush=True)
    panels[0, 0].legend(labelcolor="white", frameon=False)
    fig.savefig(IMAGES / "phase_diagrams.png", dpi=100)
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, draw, ax in (("hysteresis", hysteresis, left), ("width", width_scaling, right)):
        began = time.time()
        draw(ax, folder, processes)
        print(f"{name}: {time.time() - began:.0f} s", flush=True)
    fig.savefig(IMAGES / "phase_details.png", dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2)
