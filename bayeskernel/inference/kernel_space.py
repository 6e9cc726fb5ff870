r"""The posterior over kernels of a linear network, at a cost that does not depend on the width.

For linear phi the pre-activations enter only through C, and C = A (z z^T / N) A^T with z of shape
(rank, N). Write z = B O with B lower triangular (rank, rank) and O an orthonormal frame, which nothing
depends on. Under the prior the entries of B are independent (Bartlett 1933):

    B_ij ~ N(0, 1) for i > j,     B_ii^2 ~ chi^2 with N - i + 1 degrees of freedom (i = 1..rank),

so N is a plain number, and code for one width serves all. B takes the place of z in the pre-activation
model; together with the evidence this is the density of docs/theory, section 2C, with its determinants and
Jacobians.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from bayeskernel.errors import InputError
from bayeskernel.inference.coordinates import Coordinates, Data
from bayeskernel.inference.preactivations import full_kernel, log_likelihood, unfold


def check(coordinates: Coordinates) -> None:
    """Refuse networks whose kernels do not have a density of this form."""
    width, rank = coordinates.width, coordinates.rank
    if coordinates.phi.name != "linear":
        raise InputError("space", "'weights' or 'preactivations' unless phi is linear", "'kernels'")
    if width < rank:
        expected = f"at least the rank {rank} of the kernel for space='kernels'"
        raise InputError("width", expected, width)


def model(coordinates: Coordinates, data: Data) -> None:
    """Define the NumPyro model of B in coordinates that are nearly standard normal at any N."""
    rank, freedom = coordinates.rank, _degrees_of_freedom(coordinates, data)
    below = numpyro.sample("below", dist.Normal(0, 1).expand((rank, rank)).to_event(2))
    u = numpyro.sample("diagonal", dist.Normal(0, 1).expand((rank,)).to_event(1))
    # The density of u = sqrt(2 nu) ln(B_ii / sqrt(nu)) over that of a standard normal.
    exact = jnp.sqrt(freedom / 2) * u - freedom / 2 * jnp.expm1(u * jnp.sqrt(2 / freedom))
    numpyro.factor("chi", jnp.sum(exact + u**2 / 2))
    B = factor({"below": below, "diagonal": u}, coordinates, data)
    numpyro.deterministic("kernel", full_kernel(unfold(B, coordinates, data)[0], coordinates))
    numpyro.factor("targets", log_likelihood(B, coordinates, data))


def factor(position: dict[str, jax.Array], coordinates: Coordinates, data: Data) -> jax.Array:
    """B of shape (rank, rank) from its coordinates; entries of ``below`` on or above the diagonal idle."""
    freedom = _degrees_of_freedom(coordinates, data)
    diagonal = jnp.sqrt(freedom) * jnp.exp(position["diagonal"] / jnp.sqrt(2 * freedom))
    return jnp.tril(position["below"], -1) + jnp.diag(diagonal)


def frame(rng_key: jax.Array, coordinates: Coordinates, data: Data) -> jax.Array:
    """Draw O, (rank, N): orthonormal rows, all directions alike. Its shape is not known to compiled code."""
    normal = jax.random.normal(rng_key, (int(data.width), coordinates.rank))
    Q, R = jnp.linalg.qr(normal)
    return (Q * jnp.sign(jnp.diag(R))).T


def draw_prior(rng_key: jax.Array, coordinates: Coordinates, data: Data) -> dict[str, jax.Array]:
    """Draw the coordinates of B from the prior."""
    key_below, key_diagonal = jax.random.split(rng_key)
    freedom = _degrees_of_freedom(coordinates, data)
    squared = 2 * jax.random.gamma(key_diagonal, freedom / 2)
    return {
        "below": jax.random.normal(key_below, 2 * (coordinates.rank,)),
        "diagonal": jnp.sqrt(freedom / 2) * jnp.log(squared / freedom),
    }


def _degrees_of_freedom(coordinates: Coordinates, data: Data) -> jax.Array:
    return data.width - jnp.arange(coordinates.rank, dtype=data.width.dtype)
