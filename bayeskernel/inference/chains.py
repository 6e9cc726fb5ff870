"""How chains are run: compile once per shape, advance in chunks, one thread a chain.

XLA releases Python's global lock while it computes, so chains in threads use all cores without the
global device settings that other layouts need. Every chain owns its random state; results do not
depend on the number of threads or on how draws are cut into chunks.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import NUTS
from threadpoolctl import threadpool_limits

from bayeskernel._precision import double, jit
from bayeskernel.errors import InputError
from bayeskernel.inference import hmc
from bayeskernel.inference.checkpoint import Checkpoint, Draws, joined
from bayeskernel.inference.spaces import Space

T = TypeVar("T")

# Draws per call into compiled code at most, and the time a call should take.
CHUNK = 50
_CHUNK_SECONDS = 0.5
# Time between two writes of a chain to its checkpoint: what a kill may lose.
_WRITE_SECONDS = 1.0
# Folded into a chain's key to draw what its space integrates out. The next transition splits that key, which
# is folding in 0, 1, 2, ...; this number is none of those.
_OBSERVATION = 0x0B5E12ED


# Told after every chunk: chain, transitions done, whether it warms up, step size, divergences.
Report = Callable[[int, int, bool, float, int], None]


@dataclass(frozen=True, eq=False)
class Sampler:
    """Compiled transitions of one posterior, reusable for any data of the same shapes.

    Attributes
    ----------
    start
        (rng_key, data) -> chain state, drawn from the prior.
    advance
        (state, data, n) -> state and a buffer whose first n rows are the draws made.
    units
        (state, data) -> the state as a draw, with pre-activations and readout weights.
    """

    start: Callable[[jax.Array, Any], Any]
    advance: Callable[[Any, Any, int], tuple[Any, dict[str, jax.Array]]]
    units: Callable[[Any, Any], dict[str, jax.Array]]


def build(space: Space, algorithm: str, num_warmup: int, keep: tuple[str, ...]) -> Sampler:
    """Assemble NUTS (NumPyro) or `hmc` on a posterior.

    The sites are standard normal under the prior, and data move few directions of many, so the unit
    metric is kept and only the step size is adapted.
    """
    first, transition, idle = (nuts if algorithm == "nuts" else exact_hmc)(space, num_warmup)

    def observe(state: Any, data: Any) -> dict[str, jax.Array]:
        return space.observe(_key(state), state.z, data, keep) | _statistics(state)

    @jit
    def advance(state: Any, data: Any, n: int) -> tuple[Any, dict[str, jax.Array]]:
        shapes = jax.eval_shape(observe, state, data)
        buffer = jax.tree.map(lambda s: jnp.zeros((CHUNK, *s.shape), s.dtype), shapes)

        def draw(i: int, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            state, buffer = carry
            state = transition(state, data)
            row = observe(state, data)
            return state, jax.tree.map(lambda b, r: b.at[i].set(r), buffer, row)

        return jax.lax.fori_loop(0, n, draw, (state, buffer))

    def start(rng_key: jax.Array, data: Any) -> Any:
        return advance(first(rng_key, data), data, idle)[0]

    def units(state: Any, data: Any) -> dict[str, jax.Array]:
        return space.units(_key(state), state.z, data) | _statistics(state)

    return Sampler(start, advance, units)


def _key(state: Any) -> jax.Array:
    return jax.random.fold_in(state.rng_key, _OBSERVATION)


def _statistics(state: Any) -> dict[str, jax.Array]:
    adapted = getattr(state, "adapt_state", state)  # NumPyro keeps its step size there
    return {
        "lp": -state.potential_energy,
        "energy": state.energy,
        "n_steps": state.num_steps,
        "acceptance_rate": state.accept_prob,
        "diverging": state.diverging,
        "step_size": adapted.step_size,
    }


# First state from (rng_key, data), next state from (state, data), and how many transitions a first state
# needs before those that count.
Parts = tuple[Callable[..., Any], Callable[..., Any], int]


def nuts(space: Space, num_warmup: int) -> Parts:
    """NumPyro's NUTS on the space's model."""
    kernel = NUTS(space.model, adapt_mass_matrix=False, step_size=0.1)

    def first(rng_key: jax.Array, data: Any) -> Any:
        key_position, key_chain = jax.random.split(rng_key)
        position = space.draw_prior(key_position, data)
        return kernel.init(key_chain, num_warmup, position, (data,), {})

    return jit(first), lambda state, data: kernel.sample(state, (data,), {}), 0


def exact_hmc(space: Space, num_warmup: int) -> Parts:
    """`hmc` on the space's likelihood."""
    likelihood = space.likelihood
    if likelihood is None:
        raise InputError("sampler", "'nuts' for space='kernels'", "'hmc'")

    def first(rng_key: jax.Array, data: Any) -> hmc.State:
        key_position, key_chain = jax.random.split(rng_key)
        return hmc.start(key_chain, space.draw_prior(key_position, data), num_warmup)

    def transition(state: hmc.State, data: Any) -> hmc.State:
        return hmc.transition(state, data, likelihood, num_warmup)

    return jit(first), transition, 1


def run(
    sampler: Sampler,
    data: Any,
    rng_keys: jax.Array,
    num_warmup: int,
    num_samples: int,
    report: Report | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[Draws, Any]:
    """Run one chain per key; arrays of shape (chain, draw, ...), none where a checkpoint keeps them.

    The first chain's last state comes with them.
    """
    # Compile here: threads that meet an uncompiled function would each compile it.
    jax.block_until_ready(sampler.start(rng_keys[0], data))
    one = partial(_run_chain, sampler, data, rng_keys, num_warmup, num_samples, report, checkpoint)
    draws, states = zip(*side_by_side(one, len(rng_keys), checkpoint), strict=True)
    return {name: np.stack([own[name] for own in draws]) for name in draws[0]}, states[0]


def side_by_side(
    one: Callable[[int, threading.Event], T], count: int, checkpoint: Checkpoint | None
) -> list[T]:
    """Results of ``one`` for 0, 1, ..., in threads; it is to come to an end soon after its event is set."""
    stop, wide = threading.Event(), double()

    def task(k: int) -> T:
        # Configuration contexts are per thread.
        with jax.enable_x64(wide):
            return one(k, stop)

    # The tasks use the cores; threads of their own inside LAPACK would only wait for each other.
    workers = min(count, os.cpu_count() or 1)
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(task, k) for k in range(count)]
        try:
            return [future.result() for future in running]
        except BaseException as error:
            # Those under way stop at the end of a chunk, those that have not begun do not begin.
            stop.set()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, KeyboardInterrupt) and checkpoint is not None:
                raise KeyboardInterrupt(
                    f"stopped; what there is so far is kept in {checkpoint.folder}, and the same call goes on"
                ) from None
            raise


def _run_chain(
    sampler: Sampler,
    data: Any,
    rng_keys: jax.Array,
    num_warmup: int,
    num_samples: int,
    report: Report | None,
    checkpoint: Checkpoint | None,
    chain: int,
    stop: threading.Event,
) -> tuple[Draws, Any]:
    state = sampler.start(rng_keys[chain], data)
    done = files = divergences = 0
    if checkpoint is not None:
        state, done, files = checkpoint.load(chain, state)
    total, chunk, parts = num_warmup + num_samples, 1, list[Draws]()
    written = time.monotonic()
    while done < total and not stop.is_set():
        warming_up = done < num_warmup
        n = min(chunk, (num_warmup if warming_up else total) - done)
        began = time.perf_counter()
        state, buffer = sampler.advance(state, data, n)
        # Copies: a view of few rows would keep the whole buffer.
        rows = {name: np.asarray(values)[:n].copy() for name, values in buffer.items()}
        per_draw = (time.perf_counter() - began) / n
        chunk = int(np.clip(_CHUNK_SECONDS / per_draw, 1, CHUNK))
        done += n
        if not warming_up:
            parts.append(rows)
            divergences += int(rows["diverging"].sum())
        if report is not None:
            report(chain, done, warming_up, float(rows["step_size"][-1]), divergences)
        due = time.monotonic() - written > _WRITE_SECONDS or done == total or stop.is_set()
        if checkpoint is not None and due:
            files = checkpoint.save(chain, state, done, files, joined(parts))
            parts, written = [], time.monotonic()
    return joined(parts), (state if chain == 0 else None)
