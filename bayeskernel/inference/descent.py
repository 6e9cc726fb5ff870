r"""One step of training, of a block of networks at once: the loss, its gradient, noise; compiled once per shape.

Langevin steps follow Leimkuhler and Matthews (2013), who average the noise of neighbouring steps,

    z_(i+1) = z_i - r grad(z_i) + sqrt(r / 2) (xi_i + xi_(i+1)),        as  x_i = z_i - k xi_i,  k = sqrt(r / 2),
    z_i = x_i + k xi_i,   x_(i+1) = z_i + k xi_i - r grad(z_i):

the stationary law is off by order r^2, and not at all where the loss is quadratic, at Euler's cost. A state holds x_i and
not z_i, so that every xi is drawn once. It is a sum of eight fair signs over sqrt(8), at a fifth of the cost of a normal
variable: steps of size sqrt(2 r) add up to normal ones, but for fourth cumulants of z of -r / 4 in the prior.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bayeskernel._precision import jit
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
    """Where networks are, and what the optimizer remembers of each; leading axis networks.

    With noise ``x`` lacks that of the coming step, which `position` adds; without it is z.
    """

    x: Position
    memory: Any


@partial(jit, static_argnames="run")
def begin(z: Position, keys: jax.Array, data: weights.Data, rate: float, run: Run) -> State:
    """Networks at z before their first step."""
    x = jax.vmap(lambda z, key: _kicked(z, key, 0, data, -rate, run))(z, keys)
    return State(x, jax.vmap(run.rule.init)(z))


@partial(jit, static_argnames="run")
def position(
    state: State, keys: jax.Array, step: int, data: weights.Data, rate: float, run: Run
) -> Position:
    """The weights z of every network after so many steps."""
    return jax.vmap(lambda x, key: _kicked(x, key, step, data, rate, run))(state.x, keys)


def _kicked(
    x: Position, key: jax.Array, step: int, data: weights.Data, rate: float, run: Run
) -> Position:
    """Half of a step's noise added, or with a negative rate taken away."""
    if not run.noisy:
        return x
    noise = draw_noise(jax.random.fold_in(key, step), run.net, data)
    return _moved(x, jnp.sign(rate) * jnp.sqrt(jnp.abs(rate) / 2), noise)


@partial(jit, static_argnames="run")
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
    z = state.x
    if run.noisy:  # never with batches, so the key is used once
        noise = draw_noise(key, run.net, data)
        z = _moved(z, jnp.sqrt(rate / 2), noise)
    gradient = jax.grad(loss)(z, data, decay, run.net, share)
    move, memory = run.rule.update(gradient, state.memory, z)
    x = _moved(z, rate, move)
    return State(_moved(x, jnp.sqrt(rate / 2), noise) if run.noisy else x, memory)


def draw_noise(rng_key: jax.Array, net: weights.Structure, data: weights.Data) -> Position:
    """Sums of eight fair signs over sqrt(8) for all sites."""
    shapes = weights.site_shapes(net, data.inputs.shape[2], data.targets.shape[2])
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    x = jax.random.bits(rng_key, (-(-sum(sizes) // 4),), jnp.uint32)
    # Ones are counted in the four bytes of a word at once.
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    ones = jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(-1).astype(data.inputs.dtype)
    parts = jnp.split((ones - 4) / np.sqrt(2), np.cumsum(sizes))
    return {
        name: part.reshape(shape)
        for (name, shape), part in zip(shapes.items(), parts[: len(sizes)], strict=True)
    }


def _moved(z: Position, size: Any, direction: Position) -> Position:
    return jax.tree.map(lambda x, m: x + size * m, z, direction)


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


@partial(jit, static_argnames="net")
def starts(keys: jax.Array, data: weights.Data, net: weights.Structure) -> Position:
    """Prior draws, one for every key."""
    return jax.vmap(lambda key: weights.draw_prior(key, net, data))(keys)


@partial(jit, static_argnames="net")
def steepest_curvature(
    keys: jax.Array, z: Position, data: weights.Data, decay: float, net: weights.Structure
) -> jax.Array:
    """Largest curvature of the loss on the way down from every start, (networks,)."""
    own = partial(loss, data=data, decay=decay, net=net)

    def one(given: tuple[jax.Array, Position]) -> jax.Array:
        key, z = given
        return steepest(own, z, weights.draw_prior(key, net, data))

    # One after the other: batched products of wide matrices take longer.
    return jax.lax.map(one, (keys, z))


@partial(jit, static_argnames="net")
def observed(
    z: Position, data: weights.Data, decay: float, net: weights.Structure
) -> dict[str, jax.Array]:
    """Kernel, norms of its blocks, output, loss and squared error of every network."""

    def one(z: Position) -> dict[str, jax.Array]:
        h = weights.preactivations(z, net, data)
        output = weights.outputs(z, h, net, data)
        kernel = representational_kernel(net.phi(h))
        return {
            "kernel": kernel,
            "output": output,
            "norm": jnp.sqrt(jnp.sum(kernel**2, (1, 3))),
            "loss": loss(z, data, decay, net),
            "squared_error": jnp.mean((output - data.targets) ** 2, where=data.supervised),
        }

    return jax.vmap(one)(z)


@partial(jit, static_argnames="net")
def scaled(z: Position, data: weights.Data, net: weights.Structure) -> dict[str, jax.Array]:
    """Weights as they act in the network, by the names they are stored under."""
    own = jax.vmap(lambda z: weights.scale_sites(z, net, data))(z)
    return {f"{kind}_weights": values for kind, values in own.items()}
