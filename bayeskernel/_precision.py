"""Compiled code whose matrix products are as precise as its numbers.

Left to themselves, accelerators round the factors of float32 products to 10 bits or fewer: enough for training, too
few for the energies of 10^5 coordinates and for kernels of correlated sites.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import jax

F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F, **options: Any) -> F:
    """`jax.jit`, at full precision of products."""

    @wraps(function)
    def precise(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return cast(F, jax.jit(precise, **options))
