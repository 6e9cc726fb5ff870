"""JAX keys as arguments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from bayeskernel.errors import InputError


def check_key(rng_key: object) -> jax.Array:
    """Accept one JAX key, typed or raw."""
    if isinstance(rng_key, jax.Array):
        if is_typed(rng_key) and rng_key.shape == ():
            return rng_key
        if rng_key.dtype == np.uint32 and rng_key.shape == (2,):
            return rng_key
    raise InputError("rng_key", "one JAX key, e.g. jax.random.key(0)", repr(rng_key))


def is_typed(rng_key: jax.Array) -> bool:
    """Whether a key is of the new, typed kind."""
    return bool(jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key))
