r"""The posterior over kernels of a linear network, at a cost that does not depend on the width.

For linear phi the pre-activations enter only through C, and C = A (z z^T / N) A^T with z of shape
(rank, N). Write z = B O with B lower triangular (rank, rank) and O an orthonormal frame, which nothing
depends on. Under the prior the entries of B are independent (Bartlett 1933):

    B_ij ~ N(0, 1) for i > j,     B_ii^2 ~ chi^2 with N - i + 1 degrees of freedom (i = 1..rank),

so N is a plain number. B takes the place of z in the pre-activation model; together with the evidence
this is the density of docs/theory, section 2C, with its determinants and Jacobians.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from bayeskernel.errors import InputError
from bayeskernel.inference import preactivations
from bayeskernel.inference.preactivations import Coordinates, Data


def check(at: Coordinates) -> None:
    """Refuse networks whose kernels do not have a density of this form."""
    if at.phi.name != "linear":
        raise InputError("space", "'weights' or 'preactivations' unless phi is linear", "'kernels'")
    if at.width < at.rank:
        raise InputError(
            "width", f"at least the rank {at.rank} of the kernel for space='kernels'", at.width
        )


def model(at: Coordinates, given: Data) -> None:
    """Define the NumPyro model of B in coordinates that are nearly standard normal at any N."""
    below = numpyro.sample("below", dist.Normal(0, 1).expand((at.rank, at.rank)).to_event(2))
    u = numpyro.sample("diagonal", dist.Normal(0, 1).expand((at.rank,)).to_event(1))
    freedom = _degrees_of_freedom(at)
    # The density of u = sqrt(2 nu) ln(B_ii / sqrt(nu)) over that of a standard normal.
    exact = jnp.sqrt(freedom / 2) * u - freedom / 2 * jnp.expm1(u * jnp.sqrt(2 / freedom))
    numpyro.factor("chi", jnp.sum(exact + u**2 / 2))
    B = factor({"below": below, "diagonal": u}, at)
    _, kernel = preactivations.unfold(B, at, given)
    numpyro.deterministic("kernel", kernel)
    numpyro.factor("targets", preactivations.log_evidence(kernel, at, given))


def factor(position: dict[str, jax.Array], at: Coordinates) -> jax.Array:
    """B of shape (rank, rank) from its coordinates; entries of ``below`` on or above the diagonal idle."""
    freedom = _degrees_of_freedom(at)
    diagonal = jnp.sqrt(freedom) * jnp.exp(position["diagonal"] / jnp.sqrt(2 * freedom))
    return jnp.tril(position["below"], -1) + jnp.diag(diagonal)


def draw_prior(rng_key: jax.Array, at: Coordinates) -> dict[str, jax.Array]:
    """Draw the coordinates of B from the prior."""
    key_below, key_diagonal = jax.random.split(rng_key)
    freedom = _degrees_of_freedom(at)
    squared = 2 * jax.random.gamma(key_diagonal, freedom / 2)
    return {
        "below": jax.random.normal(key_below, (at.rank, at.rank)),
        "diagonal": jnp.sqrt(freedom / 2) * jnp.log(squared / freedom),
    }


def _degrees_of_freedom(at: Coordinates) -> jax.Array:
    return jnp.asarray(at.width - np.arange(at.rank), float)
