"""How steep does a loss become on the way down? The largest curvature, by which steps of a training are chosen.

Curvature grows while features are learned, so that of the start does not do.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Position = dict[str, jax.Array]

# Steps of the descent, each of this share of the inverse curvature there.
_STEPS, _SHARE = 200, 0.5
# Power iterations at its start, and in each step, which goes on from the direction of the last.
_FIRST, _EACH = 20, 2


def steepest(loss: Callable[[Position], jax.Array], start: Position, probe: Position) -> jax.Array:
    """Largest absolute eigenvalue of the Hessian that a descent of 200 steps meets; ``probe`` is any direction."""
    slope = jax.grad(loss)

    def probed(z: Position, v: Position, times: int) -> tuple[jax.Array, Position]:
        def once(_: int, carry: tuple[jax.Array, Position]) -> tuple[jax.Array, Position]:
            image = jax.jvp(slope, (z,), (carry[1],))[1]
            size = _norm(image)
            return size, jax.tree.map(lambda x: x / size, image)

        return jax.lax.fori_loop(0, times, once, (_norm(v), v))

    def descend(
        _: int, carry: tuple[Position, Position, jax.Array]
    ) -> tuple[Position, Position, jax.Array]:
        z, v, largest = carry
        size, v = probed(z, v, _EACH)
        z = jax.tree.map(lambda x, g: x - _SHARE / size * g, z, slope(z))
        return z, v, jnp.maximum(largest, size)

    size, v = probed(start, probe, _FIRST)
    return jax.lax.fori_loop(0, _STEPS, descend, (start, v, size))[2]


def _norm(z: Position) -> jax.Array:
    return jnp.sqrt(sum(jnp.vdot(x, x) for x in z.values()))
