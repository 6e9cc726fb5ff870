r"""Hamiltonian Monte Carlo whose motion under the prior is exact.

Every site of every posterior here is standard normal under the prior, and data add a log likelihood.
The Hamiltonian |z|^2/2 + |p|^2/2 - ln p(y | z) is split into a kick by the likelihood and a rotation
of (z, p), the exact motion under the prior:

    p += (e/2) grad;   (z, p) <- (z cos e + p sin e, p cos e - z sin e);   p += (e/2) grad

The step size is then limited by the likelihood, not by the many directions that data do not touch.
A trajectory is a quarter to three quarters of the prior's period, drawn anew each time: about a quarter
makes z fresh in all of those (also in |z|^2, which U-turn criteria leave correlated), and more is needed
where data soften a collective direction, as they do near a transition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer.hmc_util import dual_averaging

Position = dict[str, jax.Array]

_LENGTH = np.pi
_JITTER = 0.5
_TARGET_ACCEPTANCE = 0.8
_FIRST_STEP = 0.1
# Early in warm-up, far from the bulk, a step may shrink without the trajectory being worth its price.
_MOST_GRADIENTS = 256
# An energy error beyond this is a divergence, as in NumPyro.
_DIVERGENCE = 1000.0


class State(NamedTuple):
    """Where a chain is, and what its last transition was like."""

    z: Position
    log_likelihood: jax.Array
    gradient: Position
    rng_key: jax.Array
    iteration: jax.Array
    adaptation: Any
    step_size: jax.Array
    num_steps: jax.Array
    accept_prob: jax.Array
    diverging: jax.Array
    energy: jax.Array

    @property
    def potential_energy(self) -> jax.Array:
        """-ln of the posterior density in z, up to a constant."""
        return _half_square(self.z) - self.log_likelihood


class Kernel(NamedTuple):
    """The two functions that make a chain."""

    init: Callable[[jax.Array, Position, Any], State]
    sample: Callable[[State, Any], State]


def log_likelihood(model: Callable[..., None]) -> Callable[[Position, Any], jax.Array]:
    """Ln p(y | z) of a NumPyro model with one data argument: its observed sites and factors."""

    def value(z: Position, data: Any) -> jax.Array:
        trace = handlers.trace(handlers.substitute(model, z)).get_trace(data)
        observed = [s for s in trace.values() if s["type"] == "sample" and s["is_observed"]]
        return sum((jnp.sum(s["fn"].log_prob(s["value"])) for s in observed), jnp.zeros(()))

    return value


def build(model: Callable[..., None], num_warmup: int) -> Kernel:
    """Make the kernel for a model whose sites are all standard normal under the prior."""
    start_adapting, adapt = dual_averaging()
    value_and_grad = jax.value_and_grad(log_likelihood(model))

    def init(rng_key: jax.Array, z: Position, data: Any) -> State:
        value, gradient = value_and_grad(z, data)
        zero = jnp.zeros_like(value)
        return State(
            z=z,
            log_likelihood=value,
            gradient=gradient,
            rng_key=rng_key,
            iteration=jnp.zeros((), int),
            adaptation=start_adapting(jnp.log(10 * _FIRST_STEP) + zero),
            step_size=_FIRST_STEP + zero,
            num_steps=jnp.zeros((), int),
            accept_prob=zero,
            diverging=jnp.array(False),
            energy=zero,
        )

    def sample(state: State, data: Any) -> State:
        rng_key, key_momentum, key_length, key_accept = jax.random.split(state.rng_key, 4)
        p = _normal_like(key_momentum, state.z)
        length = _LENGTH * (1 + _JITTER * jax.random.uniform(key_length, minval=-1.0))
        count = jnp.minimum(jnp.ceil(length / state.step_size), _MOST_GRADIENTS).astype(int)
        step = jnp.minimum(length / count, state.step_size).astype(state.step_size.dtype)
        before = state.potential_energy + _half_square(p)

        def move(_: int, at: tuple[Any, ...]) -> tuple[Any, ...]:
            z, p, _value, gradient = at
            p = _add(p, step / 2, gradient)
            z, p = _rotate(z, p, step)
            value, gradient = value_and_grad(z, data)
            return z, _add(p, step / 2, gradient), value, gradient

        start = (state.z, p, state.log_likelihood, state.gradient)
        z, p_end, value, gradient = jax.lax.fori_loop(0, count, move, start)
        after = _half_square(z) + _half_square(p_end) - value
        error = jnp.where(jnp.isnan(after), jnp.inf, after - before)
        accept_prob = jnp.exp(-jnp.maximum(error, 0))
        accept = jax.random.uniform(key_accept) < accept_prob
        z, value, gradient = jax.tree.map(
            lambda new, old: jnp.where(accept, new, old),
            (z, value, gradient),
            (state.z, state.log_likelihood, state.gradient),
        )
        warming_up = state.iteration < num_warmup
        adaptation = jax.tree.map(
            lambda new, old: jnp.where(warming_up, new, old),
            adapt(_TARGET_ACCEPTANCE - accept_prob, state.adaptation),
            state.adaptation,
        )
        last = state.iteration + 1 >= num_warmup
        log_step = jnp.where(last, adaptation[1], adaptation[0])
        # One rotation may not exceed the whole trajectory.
        adapted = jnp.minimum(jnp.exp(log_step), _LENGTH).astype(state.step_size.dtype)
        return State(
            z=z,
            log_likelihood=value,
            gradient=gradient,
            rng_key=rng_key,
            iteration=state.iteration + 1,
            adaptation=adaptation,
            step_size=jnp.where(warming_up, adapted, state.step_size),
            num_steps=count,
            accept_prob=accept_prob,
            diverging=error > _DIVERGENCE,
            energy=jnp.where(accept, after, before),
        )

    return Kernel(init, sample)


def _half_square(z: Position) -> jax.Array:
    return sum((jnp.sum(v**2) for v in z.values()), jnp.zeros(())) / 2


def _normal_like(rng_key: jax.Array, z: Position) -> Position:
    keys = jax.random.split(rng_key, len(z))
    return {
        k: jax.random.normal(key, v.shape, v.dtype)
        for key, (k, v) in zip(keys, z.items(), strict=True)
    }


def _add(p: Position, scale: jax.Array, gradient: Position) -> Position:
    return {name: p[name] + scale * gradient[name] for name in p}


def _rotate(z: Position, p: Position, angle: jax.Array) -> tuple[Position, Position]:
    c, s = jnp.cos(angle), jnp.sin(angle)
    return (
        {name: c * z[name] + s * p[name] for name in z},
        {name: c * p[name] - s * z[name] for name in z},
    )
