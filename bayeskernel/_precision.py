"""How precise compiled code is: whether JAX counts in 64 bits, and matrix products as precise as their numbers.

Left to themselves, accelerators round the factors of float32 products to 10 bits or fewer: enough for training, too
few for the energies of 10^5 coordinates and for kernels of correlated sites.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp

F = TypeVar("F", bound=Callable[..., Any])


def double() -> bool:
    """Whether numbers are float64 unless asked for otherwise, in this thread."""
    return bool(jnp.result_type(float) == jnp.float64)


def jit(function: F, **options: Any) -> F:
    """`jax.jit`, at full precision of products."""

    @wraps(function)
    def precise(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return cast(F, jax.jit(precise, **options))
