"""Which function phi turns pre-activations into activities?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy.special import erf

from bayeskernel.errors import InputError

# phi(x) = erf(sqrt(pi)/2 x) has slope one at the origin.
_ERF_SLOPE = float(np.sqrt(np.pi) / 2)

Floats = NDArray[np.float64]
# Half the width over which a kink of phi is spread in second derivatives.
KINK = 0.2

_NAMED: dict[str, tuple[Callable[[jax.Array], jax.Array], bool]] = {
    "linear": (lambda x: x, True),
    "erf": (lambda x: jax.scipy.special.erf(_ERF_SLOPE * x), True),
    "tanh": (jnp.tanh, True),
    "relu": (jax.nn.relu, False),
}


def _erf_slopes(h: Floats) -> tuple[Floats, Floats]:
    first = np.exp(-((_ERF_SLOPE * h) ** 2))
    return first, -2 * _ERF_SLOPE**2 * h * first


def _tanh_slopes(h: Floats) -> tuple[Floats, Floats]:
    value = np.tanh(h)
    first = 1 - value**2
    return first, -2 * value * first


# The same in NumPy: phi, and its first two derivatives. Theory of named activations compiles nothing.
_VALUES: dict[str, Callable[[Floats], Floats]] = {
    "linear": lambda h: h,
    "erf": lambda h: erf(_ERF_SLOPE * h),
    "tanh": np.tanh,
    "relu": lambda h: np.maximum(h, 0.0),
}
_SLOPES: dict[str, Callable[[Floats], tuple[Floats, Floats]]] = {
    "linear": lambda h: (np.ones_like(h), np.zeros_like(h)),
    "erf": _erf_slopes,
    "tanh": _tanh_slopes,
    "relu": lambda h: (
        np.asarray(h > 0, np.float64),
        np.asarray((np.abs(h) < KINK) / (2 * KINK), np.float64),
    ),
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

    @property
    def named(self) -> bool:
        """Whether it is one of the package's own."""
        return _NAMED.get(self.name, (None,))[0] is self.function

    @property
    def linear(self) -> bool:
        """Whether it is the identity, by name."""
        return self.named and self.name == "linear"

    @cached_property
    def smooth(self) -> bool:
        """Whether the second derivative accounts for all change of slope (no kinks)."""
        if self.named:
            return self.name != "relu"
        ends = np.linspace(-4.0, 4.0, 41)
        nodes, weights = np.polynomial.legendre.leggauss(8)
        half = (ends[1] - ends[0]) / 2
        inside = (ends[:-1] + half)[:, None] + half * nodes
        first, _ = _autodiff(self.function, ends)
        _, second = _autodiff(self.function, inside.ravel())
        change = half * second.reshape(inside.shape) @ weights
        return bool(np.allclose(change, np.diff(first), rtol=1e-3, atol=1e-3))

    def values(self, h: Floats) -> Floats:
        """phi(h) in NumPy and float64."""
        if self.named:
            return np.asarray(_VALUES[self.name](h))
        with jax.enable_x64(True):
            return np.asarray(_jitted(self.function)(jnp.asarray(h)), np.float64)

    def slopes(self, h: Floats) -> tuple[Floats, Floats]:
        """phi'(h) and phi''(h) in NumPy and float64; at kinks phi'' is phi' differenced over 0.4.

        A piecewise linear phi has no second derivative at all where it has one.
        """
        if self.named:
            return _SLOPES[self.name](h)
        first, second = _autodiff(self.function, h)
        if not self.smooth:
            ends = (_autodiff(self.function, h + step)[0] for step in (KINK, -KINK))
            second = (next(ends) - next(ends)) / (2 * KINK)
        return first, second

    def __reduce__(self) -> tuple[Callable[..., Activation], tuple[object, ...]]:
        # Functions of JAX cannot be pickled; names can, and mean the same everywhere.
        if self.named:
            return resolve, (self.name,)
        return Activation, (self.name, self.function, self.odd)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply phi elementwise."""
        return self.function(x)


@lru_cache(maxsize=32)
def _jitted(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(function)


@lru_cache(maxsize=32)
def _jitted_slopes(
    function: Callable[[jax.Array], jax.Array],
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    def slope(h: jax.Array) -> jax.Array:
        return jax.jvp(function, (h,), (jnp.ones_like(h),))[1]

    return jax.jit(lambda h: jax.jvp(slope, (h,), (jnp.ones_like(h),)))


def _autodiff(function: Callable[[jax.Array], jax.Array], h: Floats) -> tuple[Floats, Floats]:
    """First and second derivative of an elementwise function."""
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        first, second = _jitted_slopes(function)(jnp.asarray(h))
    return np.asarray(first, np.float64), np.asarray(second, np.float64)


def resolve(activation: str | Callable[[jax.Array], jax.Array]) -> Activation:
    """Turn a name or a callable into an `Activation`.

    A callable must map a float array to a float array of the same shape, finite at finite input.
    Whether it is odd is found by evaluating it.
    """
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str) and activation in _NAMED:
        return Activation(activation, *_NAMED[activation])
    if not callable(activation):
        raise InputError("activation", f"one of {sorted(_NAMED)} or a callable", repr(activation))
    grid = np.linspace(-4.0, 4.0, 17)
    try:
        values = np.asarray(activation(jnp.asarray(grid)))
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
    module = getattr(activation, "__module__", "?")
    name = f"{module}.{getattr(activation, '__qualname__', activation)}"
    return Activation(name, activation, odd)


def recorded(name: str, *, odd: bool) -> str | Activation:
    """The activation of a run by its name; a callable of the user's, known by it alone, cannot be evaluated."""

    def missing(_: jax.Array) -> jax.Array:
        raise InputError("activation", "the network of the run, as records hold no callable", name)

    return name if name in _NAMED else Activation(name, missing, odd)
