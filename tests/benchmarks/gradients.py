"""Milliseconds per gradient of the pre-activation posterior against what the machine could do.

``python -m tests.benchmarks.gradients`` prints one Markdown table. Arithmetic: 6 N d^2 multiply-adds (K, the
conditional mean and C, forward and backward) at this machine's measured matrix-product rate. Memory: 20
passes over the N d numbers of z at its measured copy rate. Both rates are measured in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import bayeskernel as bk
from bayeskernel.inference import preactivations as pre
from bayeskernel.inference import rotation
from bayeskernel.inference.run import _choose


def seconds(run: Callable[[], jax.Array]) -> float:
    """Best of several timings of a compiled call."""
    jax.block_until_ready(run())
    best = np.inf
    for _ in range(7):
        began = time.perf_counter()
        for _ in range(5):
            out = run()
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - began) / 5)
    return float(best)


def gradient_time(steps: int, patterns: int, width: int) -> float:
    rng = np.random.default_rng(0)
    task = bk.tasks.endpoint(
        rng.normal(size=(patterns, patterns)), rng.normal(size=patterns), steps
    )
    network = bk.Network(width, "erf", noise=0.1)
    choice = _choose("preactivations", network, task, ())
    value = rotation.log_likelihood(lambda data: pre.model(choice.static, data))
    gradient = jax.jit(jax.grad(value))
    z = {"z": jnp.asarray(rng.normal(size=(steps * patterns, width)), jnp.float32)}
    return seconds(lambda: gradient(z, choice.data)["z"])


def main() -> None:
    matrix = jnp.ones((1024, 1024))
    product = jax.jit(jnp.dot)
    rate = 1024**3 / seconds(lambda: product(matrix, matrix))
    big = jnp.ones(50_000_000)
    copy = jax.jit(lambda x: x + 1.0)
    bandwidth = 2 * big.nbytes / seconds(lambda: copy(big))
    print(f"matrix product {rate / 1e9:.1f} G multiply-adds/s, copy {bandwidth / 1e9:.1f} GB/s\n")
    print("| T | P | d | N | ms per gradient | arithmetic floor ms | memory floor ms |")
    print("|---|---|---|---|---|---|---|")
    for steps, patterns in ((3, 1), (4, 4), (4, 16)):
        for width in (128, 512, 2048, 8192):
            d = steps * patterns
            spent = gradient_time(steps, patterns, width)
            arithmetic, memory = 6 * width * d**2 / rate, 20 * 4 * width * d / bandwidth
            print(
                f"| {steps} | {patterns} | {d} | {width} | {1e3 * spent:.3f} | {1e3 * arithmetic:.4f} "
                f"| {1e3 * memory:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
