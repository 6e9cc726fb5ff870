r"""Hamiltonian Monte Carlo whose motion under the prior is exact.

Every coordinate is standard normal under the prior, and data add a log likelihood. The Hamiltonian
|z|^2/2 + |p|^2/2 - ln p(y | z) is split into a kick by the likelihood and a rotation of (z, p), the exact
motion under the prior:

    p += (e/2) grad;   (z, p) <- (z cos e + p sin e, p cos e - z sin e);   p += (e/2) grad

The step size is then limited by the likelihood, not by the many directions that data do not touch.
A trajectory is a quarter to three quarters of the prior's period, drawn anew each time: about a quarter
makes z fresh in all of those (also in |z|^2, which U-turn criteria leave correlated), and more is needed
where data soften a collective direction, as they do near a transition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.hmc_util import dual_averaging

Position = dict[str, jax.Array]
Likelihood = Callable[[Position, Any], tuple[jax.Array, Position]]

_LENGTH = np.pi
_JITTER = 0.5
_TARGET_ACCEPTANCE = 0.8
# Warm-up begins with single steps, halved from the first size until one is likelier accepted than not; without
# warm-up the step keeps the other size.
_FIRST_STEP = 1.5
_FIXED_STEP = 0.1
_SEARCHED_ACCEPTANCE = 0.5
# Early in warm-up, far from the bulk, a step may shrink without the trajectory being worth its price.
_MOST_GRADIENTS = 256
# An energy error beyond this is a divergence, as in NumPyro.
_DIVERGENCE = 1000.0


class State(NamedTuple):
    """Where a chain is, and what its last transition was like; ``iteration`` counts from -1."""

    z: Position
    log_likelihood: jax.Array
    gradient: Position
    rng_key: jax.Array
    iteration: jax.Array
    searching: jax.Array
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


def start(rng_key: jax.Array, z: Position, num_warmup: int) -> State:
    """A chain at z before its first transition, which does no more than take the gradient there."""
    zero = jnp.zeros((), jax.tree.leaves(z)[0].dtype)
    return State(
        z=z,
        log_likelihood=zero,
        gradient=jax.tree.map(jnp.zeros_like, z),
        rng_key=rng_key,
        iteration=jnp.full((), -1),
        searching=jnp.array(num_warmup > 0),
        adaptation=dual_averaging()[0](zero),
        step_size=(_FIRST_STEP if num_warmup else _FIXED_STEP) + zero,
        num_steps=jnp.zeros((), int),
        accept_prob=zero,
        diverging=jnp.array(False),
        energy=zero,
    )


def transition(state: State, data: Any, likelihood: Likelihood, num_warmup: int) -> State:
    """The next state of a chain; the step size adapts until ``num_warmup`` of them are done.

    Compiled code holds the likelihood once, in the loop over a trajectory.
    """
    first = state.iteration < 0
    rng_key, key_pair, *keys = jax.random.split(state.rng_key, 2 + len(state.z))
    p = _normal_like(keys, state.z)
    for_length, for_acceptance = jax.random.uniform(key_pair, (2,))
    length = _LENGTH * (1 + _JITTER * (2 * for_length - 1))
    count = jnp.minimum(jnp.ceil(length / state.step_size), _MOST_GRADIENTS).astype(int)
    searches = state.searching & (state.iteration < num_warmup)
    count = jnp.where(first | searches, 1, count)
    step = jnp.minimum(length / count, state.step_size).astype(state.step_size.dtype)
    step = jnp.where(first, 0, step)
    before = state.potential_energy + _half_square(p)

    def move(_: int, point: tuple[Any, ...]) -> tuple[Any, ...]:
        z, p, _value, gradient = point
        z, p = _rotate(z, _kicked(p, step / 2, gradient), step)
        value, gradient = likelihood(z, data)
        return z, _kicked(p, step / 2, gradient), value, gradient

    begin = (state.z, p, state.log_likelihood, state.gradient)
    z, p_end, value, gradient = jax.lax.fori_loop(0, count, move, begin)
    after = _half_square(z) + _half_square(p_end) - value
    error = jnp.where(first, 0, jnp.where(jnp.isnan(after), jnp.inf, after - before))
    accept_prob = jnp.exp(-jnp.maximum(error, 0))
    accept = first | (for_acceptance < accept_prob)
    new, old = (z, value, gradient), (state.z, state.log_likelihood, state.gradient)
    z, value, gradient = _chosen(accept, new, old)
    searching, adaptation, step_size = _adapted(state, accept_prob, num_warmup)
    return State(
        z=z,
        log_likelihood=value,
        gradient=gradient,
        rng_key=rng_key,
        iteration=state.iteration + 1,
        searching=searching,
        adaptation=adaptation,
        step_size=step_size,
        num_steps=count,
        accept_prob=accept_prob,
        diverging=error > _DIVERGENCE,
        energy=jnp.where(accept, after, before),
    )


def _adapted(
    state: State, accept_prob: jax.Array, num_warmup: int
) -> tuple[jax.Array, Any, jax.Array]:
    """In warm-up: search of a first step size, then dual averaging of it, of which the average is kept."""
    begin, update = dual_averaging()
    warming_up = (state.iteration >= 0) & (state.iteration < num_warmup)
    # A first state has not moved: its acceptance says nothing.
    searching = state.searching & ((state.iteration < 0) | (accept_prob < _SEARCHED_ACCEPTANCE))
    searched = jnp.where(searching & warming_up, state.step_size / 2, state.step_size)
    average = update(_TARGET_ACCEPTANCE - accept_prob, state.adaptation)
    log_step = jnp.where(state.iteration + 1 >= num_warmup, average[1], average[0])
    # One rotation may not exceed the whole trajectory. Where rounding errors of the energy alone have steps refused, as can
    # happen far from the bulk, shorter ones would end the motion that leads there.
    least = jnp.finfo(state.step_size.dtype).eps ** 0.5
    averaged = jnp.clip(jnp.exp(log_step), least, _LENGTH).astype(state.step_size.dtype)
    averaging = warming_up & ~state.searching
    adaptation = _chosen(averaging, average, state.adaptation)
    adaptation = _chosen(state.searching, begin(jnp.log(searched)), adaptation)
    return searching, adaptation, jnp.where(averaging, averaged, searched)


def _chosen(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def _half_square(z: Position) -> jax.Array:
    return sum((jnp.sum(v**2) for v in z.values()), jnp.zeros(())) / 2


def _normal_like(keys: Sequence[jax.Array], z: Position) -> Position:
    return {
        k: jax.random.normal(key, v.shape, v.dtype)
        for key, (k, v) in zip(keys, z.items(), strict=True)
    }


def _kicked(p: Position, scale: jax.Array, gradient: Position) -> Position:
    return {name: p[name] + scale * gradient[name] for name in p}


def _rotate(z: Position, p: Position, angle: jax.Array) -> tuple[Position, Position]:
    """Turn (z, p) by an angle, as a change of both.

    Cosine and sine rounded to the type's precision would not be on the unit circle: with 10^5 coordinates
    the energy would drift by 0.01 a step in float32.
    """
    short, s = 2 * jnp.sin(angle / 2) ** 2, jnp.sin(angle)  # short = 1 - cos
    return (
        {name: z[name] + (s * p[name] - short * z[name]) for name in z},
        {name: p[name] - (s * z[name] + short * p[name]) for name in z},
    )
