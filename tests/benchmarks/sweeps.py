"""What a sweep costs beside its points: ``python -m tests.benchmarks.sweeps`` prints one Markdown table.

Empty points go through every engine, results are written and read, and one point is sampled for comparison.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from distributed import Client, LocalCluster

import bayeskernel as bk
from bayeskernel.inference.storage import read_arrays
from bayeskernel.sweeps.engines import Engine, engine_for
from bayeskernel.sweeps.points import write

COUNT = 2000


class Empty(NamedTuple):
    """A job with nothing to do."""

    files: tuple[Path, ...]
    size: int = 1

    def run(self) -> None:
        """Do nothing."""


def through(engine: Engine) -> float:
    """Seconds for each of many empty jobs, once workers have started."""
    jobs = (Empty((Path(str(i)),)) for i in itertools.count())

    def pass_through(count: int) -> None:
        waiting, running = deque(itertools.islice(jobs, count)), 0
        while waiting or running:
            room = engine.room
            while waiting and running < room:
                engine.submit(waiting.popleft())  # type: ignore[arg-type]
                running += 1
            running -= len(engine.finished())

    pass_through(10)
    began = time.perf_counter()
    pass_through(COUNT)
    return (time.perf_counter() - began) / COUNT


def timed(action: Callable[[], object], repeat: int) -> float:
    """Seconds of one repetition."""
    began = time.perf_counter()
    for _ in range(repeat):
        action()
    return (time.perf_counter() - began) / repeat


def main() -> None:
    """Print the table."""
    print("| what | ms a point |\n|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, client in (("this process", None), ("two processes", 2)):
            with engine_for(client, folder) as engine:
                print(f"| an empty point, {title} | {1000 * through(engine):.2f} |", flush=True)
        with (
            LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
            Client(cluster) as client,
            engine_for(client, folder) as engine,
        ):
            print(
                f"| an empty point, Dask, two workers | {1000 * through(engine):.2f} |", flush=True
            )
        result = {f"array{i}": np.zeros((4, 4, 4, 4)) for i in range(3)}
        file = folder / "point.npz"
        print(
            f"| writing a result, d = 16 | {1000 * timed(lambda: write(file, result), 200):.2f} |"
        )
        print(f"| reading it | {1000 * timed(lambda: read_arrays(file), 200):.2f} |")
        task = bk.tasks.endpoint([[1.0]], [2.0], 3)
        for i, n in enumerate((256, 256, 1024, 1024)):
            network = bk.Network(n, "erf", noise=0.1)

            def sample(network: bk.Network = network, i: int = i) -> object:
                return bk.sample(
                    jax.random.key(i), network, task, num_warmup=300, num_samples=500, num_chains=2,
                    progress=False,
                )  # fmt: skip

            title = "compiled" if i % 2 else "first of its shape"
            print(
                f"| sampling, d = 3, N = {n}, {title} | {1000 * timed(sample, 1):.0f} |", flush=True
            )


if __name__ == "__main__":
    main()
