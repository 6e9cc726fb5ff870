"""One step of training, of all networks at once: the loss, its gradient, noise; compiled once per shape."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bayeskernel.inference import weights
from bayeskernel.inference.curvature import steepest
from bayeskernel.kernels import representational_kernel

Position = dict[str, jax.Array]


class Run(NamedTuple):
    """What fixes compiled code."""

    net: weights.Structure
    rule: optax.GradientTransformation
    noisy: bool
    batch_size: int | None


class State(NamedTuple):
    """Where networks are, and what the optimizer remembers of each; leading axis networks."""

    z: Position
    memory: Any


@partial(jax.jit, static_argnames="run")
def advance(
    state: State,
    keys: jax.Array,
    data: weights.Data,
    rate: float,
    decay: float,
    first: int,
    last: int,
    run: Run,
) -> State:
    """Steps ``first`` to ``last`` of every network; a step's key is its network's with its number folded in."""

    def step(i: int, state: State) -> State:
        return jax.vmap(
            lambda one, key: _step(one, jax.random.fold_in(key, i), data, rate, decay, run)
        )(state, keys)

    return jax.lax.fori_loop(first, last, step, state)


def _step(
    state: State, key: jax.Array, data: weights.Data, rate: float, decay: float, run: Run
) -> State:
    patterns = data.inputs.shape[1]
    share = 1.0
    if run.batch_size is not None:
        batch = jax.random.choice(key, patterns, (run.batch_size,), replace=False)
        data, share = patterns_of(data, batch), run.batch_size / patterns
    gradient = jax.grad(loss)(state.z, data, decay, run.net, share)
    move, memory = run.rule.update(gradient, state.memory, state.z)
    z = jax.tree.map(lambda x, m: x + rate * m, state.z, move)
    if run.noisy:  # never with batches, so the key is used once
        noise = weights.draw_prior(key, run.net, data)
        z = jax.tree.map(lambda x, xi: x + jnp.sqrt(2 * rate) * xi, z, noise)
    return State(z, memory)


def loss(
    z: Position, data: weights.Data, decay: float, net: weights.Structure, share: float = 1.0
) -> jax.Array:
    """Of one network; ``data`` may hold a share of the patterns, whose misfit is scaled up."""
    exact = weights.observation(data.targets, net, data).log_prob(data.targets)
    misfit = exact - weights.log_likelihood(net, z, data)
    return misfit / share + decay / 2 * sum(jnp.sum(x**2) for x in z.values())


def patterns_of(data: weights.Data, which: jax.Array) -> weights.Data:
    """Data of some patterns alone."""
    parts = {name: getattr(data, name)[:, which] for name in ("inputs", "targets", "supervised")}
    return data._replace(**parts)


@partial(jax.jit, static_argnames="net")
def starts(keys: jax.Array, data: weights.Data, net: weights.Structure) -> Position:
    """Prior draws, one for every key."""
    return jax.vmap(lambda key: weights.draw_prior(key, net, data))(keys)


@partial(jax.jit, static_argnames="net")
def steepest_curvature(
    keys: jax.Array, z: Position, data: weights.Data, decay: float, net: weights.Structure
) -> jax.Array:
    """Largest curvature of the loss on the way down from every start, (networks,)."""
    own = partial(loss, data=data, decay=decay, net=net)

    def one(key: jax.Array, z: Position) -> jax.Array:
        return steepest(own, z, weights.draw_prior(key, net, data))

    return jax.vmap(one)(keys, z)


@partial(jax.jit, static_argnames="net")
def observed(
    z: Position, data: weights.Data, decay: float, net: weights.Structure
) -> dict[str, jax.Array]:
    """Kernel, output, loss and squared error of every network."""

    def one(z: Position) -> dict[str, jax.Array]:
        h = weights.preactivations(z, net, data)
        output = weights.outputs(z, h, net, data)
        return {
            "kernel": representational_kernel(net.phi(h)),
            "output": output,
            "loss": loss(z, data, decay, net),
            "squared_error": jnp.mean((output - data.targets) ** 2, where=data.supervised),
        }

    return jax.vmap(one)(z)
