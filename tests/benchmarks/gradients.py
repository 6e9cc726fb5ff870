"""Milliseconds per gradient of the pre-activation posterior against what the machine could do.

``python -m tests.benchmarks.gradients`` prints one Markdown table, targets at the last step. Arithmetic, at this
machine's measured rate of matrix products: N d^2 multiply-adds of the adjoint of C and four times half as many
(h, C, the adjoints of A and z, block triangles), of which causality leaves 2 (1 + 1 / T) + (1 - 1 / T)^2 + 1 / T^2.
Memory: 20 passes over the N d numbers of z at the measured copy rate. Both rates are measured in the same run.
A gradient is one turn of a loop, as in a trajectory. All of it happens on JAX's default device; ``JAX_PLATFORMS=cpu``
keeps it from an accelerator.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

import bayeskernel as bk
from bayeskernel._precision import jit
from bayeskernel.inference.run import _choose
from bayeskernel.inference.spaces import preactivation_space


def seconds(run: Callable[[], Any], calls: int = 5) -> float:
    """Best of several timings of a compiled call."""
    jax.block_until_ready(run())
    best = np.inf
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(calls):
            out = run()
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - began) / calls)
    return float(best)


def gradient_time(task: bk.Task, width: int) -> float:
    choice = _choose("preactivations", bk.Network(width, "erf", noise=0.3), task, ())
    space = preactivation_space(choice.static)
    z = space.draw_prior(jax.random.key(0), choice.data)

    @jit
    def loop(z: Any, n: int) -> Any:
        def turn(_: int, z: Any) -> Any:
            gradient = space.likelihood(z, choice.data)[1]
            return jax.tree.map(lambda x, g: x + 1e-9 * g, z, gradient)

        return jax.lax.fori_loop(0, n, turn, z)

    turns = max(3, 300_000 // (task.shape[0] * task.shape[1]) ** 2 // 20)
    with threadpool_limits(1, user_api="blas"):
        return seconds(lambda: loop(z, turns), 1) / turns


def random_task(steps: int, patterns: int) -> bk.Task:
    rng = np.random.default_rng(0)
    return bk.tasks.endpoint(
        rng.normal(size=(patterns, patterns)), rng.normal(size=patterns), steps
    )


def main() -> None:
    side = 4096
    matrix = jax.random.normal(jax.random.key(0), (side, side))
    product = jit(jnp.dot)
    rate = side**3 / seconds(lambda: product(matrix, matrix), 2)
    big = jnp.ones(50_000_000)
    copy = jax.jit(lambda x: x + 1.0)
    bandwidth = 2 * big.nbytes / seconds(lambda: copy(big))
    print(jax.devices()[0].device_kind)
    print(f"matrix product {rate / 1e9:.1f} G multiply-adds/s, copy {bandwidth / 1e9:.1f} GB/s\n")
    print("| T | P | d | N | ms per gradient | arithmetic floor ms | memory floor ms |")
    print("|---|---|---|---|---|---|---|")
    for steps, patterns in ((3, 1), (4, 4), (4, 16), (4, 64), (8, 32), (4, 256)):
        share = 2 * (1 + 1 / steps) + (1 - 1 / steps) ** 2 + 1 / steps**2
        for width in (1024, 4096):
            d = steps * patterns
            spent = gradient_time(random_task(steps, patterns), width)
            arithmetic, memory = share * width * d**2 / rate, 20 * 4 * width * d / bandwidth
            print(
                f"| {steps} | {patterns} | {d} | {width} | {1e3 * spent:.3f} | {1e3 * arithmetic:.4f} "
                f"| {1e3 * memory:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
