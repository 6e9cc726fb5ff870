"""Effective samples per second of every way to the same posterior, side by side in one run.

``python -m tests.benchmarks.samplers [seconds per entry] [case ...]`` prints one Markdown table; cases are widths
of the task of one pattern, and "four" patterns at N = 256. Smallest ESS over
sign-aligned kernel entries, per second of sampling after compilation and warm-up; "bias" is the largest
difference of a mean from the reference run, in units of the error of both. Needs ``pip install blackjax``.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import arviz as az
import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

import bayeskernel as bk
from bayeskernel.gauge import align, flip_kernel, sign_symmetry
from bayeskernel.inference import chains, weights
from bayeskernel.inference.run import _choose, _sampler
from bayeskernel.kernels import representational_kernel

WIDTHS = (256, 2048, 128, 512)
WARMUP = 300


class Method(NamedTuple):
    """A sampler ready to run: state, (state, n) -> (state, kernels of n draws), gradients a draw."""

    start: Callable[[jax.Array], Any]
    advance: Callable[[Any, int], tuple[Any, Any]]


def ours(network: bk.Network, task: bk.Task, space: str, algorithm: str) -> Method:
    choice = _choose(space, network, task, ())
    sampler = _sampler(choice.name, choice.static, algorithm, WARMUP, ())

    def advance(state: Any, n: int) -> tuple[Any, Any]:
        parts = []
        while n > 0:
            now = min(n, chains.CHUNK)
            state, buffer = sampler.advance(state, choice.data, now)
            parts.append(np.asarray(buffer["kernel"])[:now])
            n -= now
        return state, np.concatenate(parts)

    def start(key: jax.Array) -> Any:
        return advance(sampler.start(key, choice.data), WARMUP)[0]

    return Method(start, advance)


class Target(NamedTuple):
    """The weight posterior as plain functions of a dictionary of standard normal variables."""

    log_density: Callable[[Any], jax.Array]
    kernel: Callable[[Any], jax.Array]
    prior: Callable[[jax.Array], Any]


def target(network: bk.Network, task: bk.Task) -> Target:
    net, data = weights.structure(network, task.shape[0]), weights.arrays(network, task)

    @jax.jit
    def log_density(z: Any) -> jax.Array:
        return weights.log_likelihood(net, z, data) - sum(jnp.sum(v**2) for v in z.values()) / 2

    def prior(key: jax.Array) -> Any:
        return weights.draw_prior(key, net, data)

    return Target(
        log_density,
        lambda z: representational_kernel(net.phi(weights.preactivations(z, net, data))),
        prior,
    )


def blackjax_nuts(network: bk.Network, task: bk.Task) -> Method:
    to = target(network, task)

    @jax.jit
    def warm(key: jax.Array) -> Any:
        adapt = blackjax.window_adaptation(blackjax.nuts, to.log_density, initial_step_size=0.1)
        (state, parameters), _ = adapt.run(
            jax.random.fold_in(key, 1), to.prior(key), num_steps=WARMUP
        )
        return state, parameters, jax.random.fold_in(key, 2)

    def one(carry: Any, _: None) -> tuple[Any, jax.Array]:
        state, parameters, key = carry
        key, now = jax.random.split(key)
        state, _ = blackjax.nuts(to.log_density, **parameters).step(now, state)
        return (state, parameters, key), to.kernel(state.position)

    return Method(warm, _scanned(one))


def blackjax_mclmc(network: bk.Network, task: bk.Task) -> Method:
    to = target(network, task)

    def warm(key: jax.Array) -> Any:
        first = jax.jit(lambda key: blackjax.mcmc.mclmc.init(to.prior(key), to.log_density, key))(
            key
        )

        # The third stage of tuning keeps all its positions: 17 GB at N = 2048. There L follows from
        # the spread of the second stage.
        large = network.width > 1000
        tuned = blackjax.mclmc_find_L_and_step_size(
            mclmc_kernel=blackjax.mcmc.mclmc.build_kernel(),
            logdensity_fn=to.log_density,
            num_steps=2_000 if large else 10_000,
            frac_tune3=0.0 if large else 0.1,
            state=first,
            rng_key=jax.random.fold_in(key, 1),
            diagonal_preconditioning=False,
        )
        return tuned[0], (tuned[1].L, tuned[1].step_size), jax.random.fold_in(key, 2)

    def one(carry: Any, _: None) -> tuple[Any, jax.Array]:
        state, (length, step), key = carry
        algorithm = blackjax.mclmc(to.log_density, L=length, step_size=step)

        def inner(_: int, at: Any) -> Any:
            state, key = at
            key, now = jax.random.split(key)
            return algorithm.step(now, state)[0], key

        state, key = jax.lax.fori_loop(0, 10, inner, (state, key))
        return (state, (length, step), key), to.kernel(state.position)

    return Method(warm, _scanned(one))


def langevin(network: bk.Network, task: bk.Task) -> Method:
    """Full-batch Langevin training in float32, unadjusted; 50 steps a draw.

    In units where the prior of every weight has variance one, as a tuned learning rate per layer
    would; the step is a tenth of the squared step of the adapted leapfrog, small enough for its bias
    to stay below the Monte-Carlo error here.
    """
    to = target(network, task)
    gradient = jax.grad(to.log_density)
    step = 0.1 * (0.1 * (128 / network.width) ** 0.25) ** 2

    def inner(_: int, at: Any) -> Any:
        z, key = at
        key, now = jax.random.split(key)
        keys = jax.random.split(now, len(z))
        g = gradient(z)
        noise = {n: jax.random.normal(k, z[n].shape) for k, n in zip(keys, z, strict=True)}
        return {n: z[n] + step / 2 * g[n] + jnp.sqrt(step) * noise[n] for n in z}, key

    def one(carry: Any, _: None) -> tuple[Any, jax.Array]:
        z, key = jax.lax.fori_loop(0, 50, inner, carry)
        return (z, key), to.kernel(z)

    advance = _scanned(one)

    def warm(key: jax.Array) -> Any:
        began, carry = time.perf_counter(), (to.prior(key), key)
        while time.perf_counter() - began < 10:
            carry, _ = advance(carry, 1)
        return carry

    return Method(warm, advance)


def _scanned(
    one: Callable[[Any, None], tuple[Any, jax.Array]],
) -> Callable[[Any, int], tuple[Any, Any]]:
    run = jax.jit(lambda carry: jax.lax.scan(one, carry, length=1))

    def advance(carry: Any, n: int) -> tuple[Any, Any]:
        kernels = []
        for _ in range(n):
            carry, kernel = run(carry)
            kernels.append(np.asarray(kernel))
        return carry, np.concatenate(kernels)

    return advance


METHODS: dict[str, Callable[[bk.Network, bk.Task], Method]] = {
    "pre-activations, HMC": lambda n, t: ours(n, t, "preactivations", "hmc"),
    "pre-activations, NUTS": lambda n, t: ours(n, t, "preactivations", "nuts"),
    "weights, HMC": lambda n, t: ours(n, t, "weights", "hmc"),
    "weights, NumPyro NUTS": lambda n, t: ours(n, t, "weights", "nuts"),
    "weights, BlackJAX NUTS": blackjax_nuts,
    "weights, BlackJAX MCLMC": blackjax_mclmc,
    "weights, Langevin": langevin,
}


# What a sampler may take for compilation and warm-up of two chains, beside each other, and all measurements.
PATIENCE = 240.0


def measure(method: Method, seconds: float) -> tuple[float, list[tuple[np.ndarray, float]]]:
    """Seconds of compiling and warming up two chains, then kernels (chain, draw, ...) and seconds of one and two chains."""

    def sample(state: Any) -> tuple[Any, np.ndarray]:
        began, parts, n = time.perf_counter(), [], 1
        while time.perf_counter() - began < seconds:
            at = time.perf_counter()
            state, kernels = method.advance(state, n)
            n = int(np.clip(seconds / 20 / max((time.perf_counter() - at) / n, 1e-6), 1, 500))
            parts.append(kernels)
        return state, np.concatenate(parts)

    began = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        keys = jax.random.split(jax.random.key(1))
        states = list(pool.map(lambda key: method.advance(method.start(key), 1)[0], keys))
    warm, results = time.perf_counter() - began, []
    for count in (1, 2):
        began = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            ended = list(pool.map(sample, states[:count]))
        spent = time.perf_counter() - began
        states[:count] = [state for state, _ in ended]
        shortest = min(len(kernels) for _, kernels in ended)
        results.append((np.stack([kernels[:shortest] for _, kernels in ended]), spent))
    return warm, results


def summary(
    kernels: np.ndarray, reference: np.ndarray, symmetry: Any
) -> tuple[float, np.ndarray, np.ndarray]:
    """Smallest ESS, mean, error."""
    aligned = flip_kernel(kernels, align(kernels, reference, symmetry)[0])
    flat = aligned.reshape(*aligned.shape[:2], -1)
    data = xr.Dataset({"x": (("chain", "draw", "entry"), flat)})
    ess, mcse = (f(data, method="mean")["x"].to_numpy() for f in (az.ess, az.mcse))
    return float(np.nanmin(ess)), flat.mean((0, 1)), mcse


ENDPOINT = bk.tasks.endpoint([[1.0]], [2.0], 3)
FOUR = bk.tasks.endpoint(2 * np.eye(4), [2.5, 2.5, -2.5, -2.5], 4)
CASES = {str(n): ("T=3, P=1", ENDPOINT, n) for n in WIDTHS} | {"four": ("T=4, P=4", FOUR, 256)}


def row(
    label: str, name: str, seconds: float, reference: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> str:
    """One line of the table."""
    _, task, width = CASES[label]
    network = bk.Network(width, "erf", noise=0.1)
    symmetry = sign_symmetry(network, task)
    at, truth, truth_error = reference
    warm, ((single, spent), (double, spent2)) = measure(METHODS[name](network, task), seconds)
    ess, mean, error = summary(single, at, symmetry)
    ess2, _, _ = summary(double, at, symmetry)
    bias = np.nanmax(np.abs(mean - truth) / np.hypot(error, truth_error))
    rate = f"{ess / spent:.3g} | {ess2 / spent2:.3g}" if ess >= 20 else "not converged | -"
    return f"{single.shape[1]} | {ess:.0f} | {rate} | {warm:.0f} | {bias:.1f}"


def main(seconds: float, chosen: list[str], asked: Iterable[str] = METHODS) -> None:
    print(
        "| task | N | sampler | draws | min ESS | ESS/s, 1 chain | ESS/s, 2 chains | compile + warm-up s | bias |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    # A process each: nothing is left over from the one before, and one that takes too long can be ended.
    context = multiprocessing.get_context("spawn")
    for label in chosen or CASES:
        title, task, width = CASES[label]
        network = bk.Network(width, "erf", noise=0.1)
        symmetry = sign_symmetry(network, task)
        _, ((first, _), (kernels, _)) = measure(
            METHODS["pre-activations, HMC"](network, task), 2 * seconds
        )
        at = flip_kernel(kernels, align(kernels, first[0, -1], symmetry)[0]).mean((0, 1))
        reference = (at, *summary(kernels, at, symmetry)[1:])
        for name in asked:
            with context.Pool(1) as pool:
                result = pool.apply_async(row, (label, name, seconds, reference))
                try:
                    found = result.get(timeout=PATIENCE + 3 * seconds)
                except multiprocessing.TimeoutError:
                    found = f" | | not warm after {PATIENCE:.0f} s | - | |"
            print(f"| {title} | {width} | {name} | {found} |", flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 20.0, sys.argv[2:])
