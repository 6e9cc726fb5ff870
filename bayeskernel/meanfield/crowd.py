r"""The law of one unit at hundreds of correlated sites, by particles that move with it.

Reweighting M particles cannot answer to d (d + 1) / 2 > M unknowns. These follow the law q by Hamiltonian transitions, and each
sweep gives noisy but unbiased C, B and Y (docs/theory, section 4, second form of B: no inverse of K):

    B = <grad^2 g + grad g grad g^T>,   Y = <diag phi'> + <phi grad g^T>,   g = phi^T Ct phi / 2.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bayeskernel._precision import jit
from bayeskernel.activations import KINK, Activation
from bayeskernel.meanfield.laws import Averages, Law, Wick
from bayeskernel.meanfield.particles import transitions
from bayeskernel.meanfield.sites import Sites, groups
from bayeskernel.problem import Floats, Problem

# Entries of C of a group up to which weighted particles answer for themselves (see `particles`); particles beyond.
_MOST_STATISTICS, PARTICLES = 300, 8192
# Transitions of a sweep, and kicks of one.
_TRANSITIONS, _KICKS = 1, 6
# Particles that tell how far modes saturate, and the least share of Wick's variance that is believed.
_WATCHED, _LEAST = 2048, 0.1
# Negative eigenvalues of K that rounding errors make, relative to the largest.
_ROUNDING = 1e-6


class Crowd:
    """Particles of a group of sites, moved by their own law.

    Attributes
    ----------
    sites
        The group.
    z
        h = K^(1/2) z, shape (M, n), float32. The symmetric root follows K through ranks that come and go.
    step
        Of the Hamiltonian transitions, adapted as they go.
    """

    random = True

    def __init__(self, sites: Sites, z: jax.Array, step: jax.Array) -> None:
        self.sites, self.z, self.step = sites, z, step

    def swept(
        self, K: Floats, Ct: Floats, key: jax.Array, sweeps: int, *, symmetric: bool
    ) -> tuple[Crowd, Averages]:
        """The particles after sweeps at (K, Ct), and averages over them."""
        root = jnp.asarray(_symmetric_root(K), jnp.float32)
        z, step, tilt = self.z, self.step, jnp.asarray(Ct, jnp.float32)
        parts = list[list[Floats]]()
        for own_key in jax.random.split(key, sweeps):
            z, step, moments = _sweep(self.sites.phi, z, root, tilt, own_key, step)
            parts.append([np.asarray(value, np.float64) for value in moments])
        averages = Averages(*(np.mean(part, axis=0) for part in zip(*parts, strict=True)))
        return Crowd(self.sites, z, step), _even(self.sites, averages, symmetric)

    def saturation(self, law: Wick, K: Floats) -> Floats:
        """Variances of products of two whitened activities, (k, k), as shares of Wick's, at most 1.

        A mode in which units are coherent saturates: they agree on its square, and it hardly answers to a tilt. That of
        the classes of sixteen digits (d = 64) has a quarter of Wick's variance.
        """
        y = self.sites.phi.values(self._reached(np.arange(_WATCHED), K)) @ law.whitener.T
        second, fourth = y.T @ y / len(y), (y**2).T @ y**2 / len(y)
        wick = second.diagonal()[:, None] * second.diagonal() + second**2
        return np.clip((fourth - second**2) / wick, _LEAST, 1.0)

    def drawn(self, law: Law, K: Floats, count: int, rng: np.random.Generator) -> Floats:
        """Some of the particles, all as often where there are not so many, (count, n)."""
        return self._reached(np.resize(rng.permutation(len(self.z)), count), K)

    def flipped(self, signs: Floats) -> Crowd:
        """The particles under h -> signs h."""
        return Crowd(self.sites, self.z * jnp.asarray(signs, jnp.float32), self.step)

    def _reached(self, chosen: NDArray[np.int64], K: Floats) -> Floats:
        """The h of some particles, (m, n)."""
        return np.asarray(self.z, np.float64)[chosen] @ _symmetric_root(K)


def many_correlated_sites(problem: Problem) -> bool:
    """Whether a group has more entries of C than statistics of particles can tell apart."""
    return not problem.phi.linear and any(
        len(sites.entries.first) > _MOST_STATISTICS for sites in groups(problem)
    )


def from_prior(sites: Sites, rng: np.random.Generator) -> Crowd:
    """Particles of the law without a tilt."""
    half = rng.standard_normal((PARTICLES // 2, len(sites.members)), np.float32)
    return Crowd(sites, jnp.asarray(np.concatenate([half, -half])), jnp.float32(0.1))


def averages_of_draws(sites: Sites, h: Floats, Ct: Floats, *, symmetric: bool) -> Averages:
    """Averages over draws of h from the law of a group, (M, n)."""
    moments = _moments(sites.phi, jnp.asarray(h, jnp.float32), jnp.asarray(Ct, jnp.float32))
    return _even(sites, Averages(*(np.asarray(m, np.float64) for m in moments)), symmetric)


def _even(sites: Sites, averages: Averages, symmetric: bool) -> Averages:
    """The same, zero where sign symmetry has it."""
    C, Y, B, mean = averages
    even = sites.parity * symmetric == 0
    C, Y, B = (np.where(even, moment, 0.0) for moment in (C, Y, (B + B.T) / 2))
    return Averages(C, Y, B, mean)


def _symmetric_root(K: Floats) -> Floats:
    """K^(1/2); LinAlgError where K is not positive semi-definite."""
    values, vectors = np.linalg.eigh(K)
    if not values[0] > -_ROUNDING * max(values[-1], 1.0):
        raise np.linalg.LinAlgError("K is not positive")
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T)


@partial(jit, static_argnums=0)
def _sweep(
    phi: Activation, z: jax.Array, root: jax.Array, Ct: jax.Array, key: jax.Array, step: jax.Array
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """Transitions of the particles, then averages over them."""
    z, step = transitions(phi, z, root, Ct, key, step, _TRANSITIONS, _KICKS)
    return z, step, _moments(phi, z @ root.T, Ct)


def _moments(phi: Activation, h: jax.Array, Ct: jax.Array) -> tuple[jax.Array, ...]:
    """C, Y, B and <phi>."""

    def slope(h: jax.Array) -> jax.Array:
        return jax.jvp(phi.function, (h,), (jnp.ones_like(h),))[1]

    activity, first = phi.function(h), slope(h)
    second = jax.jvp(slope, (h,), (jnp.ones_like(h),))[1]
    if not phi.smooth:  # slopes differenced over their kinks
        second = (slope(h + KINK) - slope(h - KINK)) / (2 * KINK)
    pulled = activity @ Ct
    pull, count = first * pulled, len(h)
    return (
        activity.T @ activity / count,
        jnp.diag(first.mean(0)) + activity.T @ pull / count,
        (first.T @ first * Ct + pull.T @ pull) / count + jnp.diag((second * pulled).mean(0)),
        activity.mean(0),
    )
