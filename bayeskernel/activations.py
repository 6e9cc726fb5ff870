"""Which function phi turns pre-activations into activities?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from bayeskernel.errors import InputError

# phi(x) = erf(sqrt(pi)/2 x) has slope one at the origin.
_ERF_SLOPE = float(np.sqrt(np.pi) / 2)

_NAMED: dict[str, tuple[Callable[[jax.Array], jax.Array], bool]] = {
    "linear": (lambda x: x, True),
    "erf": (lambda x: jax.scipy.special.erf(_ERF_SLOPE * x), True),
    "tanh": (jnp.tanh, True),
    "relu": (jax.nn.relu, False),
}


@dataclass(frozen=True)
class Activation:
    """An activation function with the one property the theory asks about.

    Attributes
    ----------
    name
        "linear", "erf", "tanh", "relu", or the qualified name of a user's callable.
    function
        phi, applied elementwise to a JAX array of any shape.
    odd
        Whether phi(-x) = -phi(x); then flipping the sign of a step's units can leave the
        network's outputs unchanged (see ``bayeskernel.gauge``).
    """

    name: str
    function: Callable[[jax.Array], jax.Array]
    odd: bool

    @cached_property
    def smooth(self) -> bool:
        """Whether autodiff's second derivative accounts for all change of slope (no kinks)."""
        slope = jax.grad(lambda x: self.function(x))
        ends = np.linspace(-4.0, 4.0, 41)
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            first = np.asarray(jax.vmap(slope)(jnp.asarray(ends)))
            nodes, weights = np.polynomial.legendre.leggauss(8)
            half = (ends[1] - ends[0]) / 2
            inside = (ends[:-1] + half)[:, None] + half * nodes
            second = np.asarray(jax.vmap(jax.grad(slope))(jnp.asarray(inside.ravel())))
        change = half * second.reshape(inside.shape) @ weights
        return bool(np.allclose(change, np.diff(first), rtol=1e-3, atol=1e-3))

    def __reduce__(self) -> tuple[Callable[..., Activation], tuple[object, ...]]:
        # Functions of JAX cannot be pickled; names can, and mean the same everywhere.
        if _NAMED.get(self.name, (None,))[0] is self.function:
            return resolve, (self.name,)
        return Activation, (self.name, self.function, self.odd)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply phi elementwise."""
        return self.function(x)


def resolve(activation: str | Callable[[jax.Array], jax.Array]) -> Activation:
    """Turn a name or a callable into an `Activation`.

    A callable must map a float array to a float array of the same shape, finite at finite input.
    Whether it is odd is found by evaluating it.
    """
    if isinstance(activation, str):
        if activation not in _NAMED:
            raise InputError(
                "activation", f"one of {sorted(_NAMED)} or a callable", repr(activation)
            )
        function, odd = _NAMED[activation]
        return Activation(activation, function, odd)
    if not callable(activation):
        raise InputError("activation", f"one of {sorted(_NAMED)} or a callable", repr(activation))
    return _from_callable(activation)


def _from_callable(function: Callable[[jax.Array], jax.Array]) -> Activation:
    grid = np.linspace(-4.0, 4.0, 17)
    try:
        values = np.asarray(function(jnp.asarray(grid)))
    except Exception as error:
        raise InputError(
            "activation", "a callable that maps a JAX array elementwise", f"an error: {error}"
        ) from error
    if values.shape != grid.shape or not np.all(np.isfinite(values)):
        raise InputError(
            "activation",
            "a callable returning finite values of its input's shape",
            f"shape {values.shape} for {grid.shape}, finite: {bool(np.all(np.isfinite(values)))}",
        )
    odd = bool(np.allclose(values, -values[::-1], rtol=1e-5, atol=1e-6))
    name = f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}"
    return Activation(name, function, odd)
