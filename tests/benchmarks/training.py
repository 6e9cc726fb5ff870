"""How long training takes: ``python -m tests.benchmarks.training [optimizer ...]`` prints one Markdown table.

Eight networks of N = 1024 on four patterns in four steps (d = 16), 10,000 steps, float32; compilation and the search for
the default rate apart.
"""

import sys
import time

import jax
import numpy as np

import bayeskernel as bk

TASK = bk.tasks.endpoint(2 * np.eye(4), [2.5, 2.5, -2.5, -2.5], 4)
STEPS = 10_000
OPTIMIZERS = {
    "langevin": {},
    "gd": {},
    "sgd": {"batch_size": 2},
    "adam": {},
}


def seconds(name: str, width: int, steps: int) -> float:
    network = bk.Network(width, "erf", noise=0.1)
    began = time.perf_counter()
    bk.train(
        jax.random.key(0),
        network,
        TASK,
        optimizer=name,
        num_steps=steps,
        progress=False,
        **OPTIMIZERS[name],
    )
    return time.perf_counter() - began


def main() -> None:
    print(
        "| N | optimizer | before the first step, s | 10,000 steps, s | ms a step |\n|---|---|---|---|---|"
    )
    for width in (256, 1024):
        for name in sys.argv[1:] or OPTIMIZERS:
            first = seconds(name, width, 1)
            again = seconds(name, width, 1)  # compiled
            total = seconds(name, width, STEPS) - again
            print(
                f"| {width} | {name} | {first:.1f} | {total:.0f} | {1000 * total / STEPS:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
