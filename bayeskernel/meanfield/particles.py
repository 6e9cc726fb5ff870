r"""The law of one unit on random nodes, in any number of dimensions.

Nodes are fixed in z, h = L(K) z. K moves them and only Ct weighs them, so at Ct = 0 there is no sampling error, and none is
amplified by K^-1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import solve_triangular
from scipy.special import logsumexp, ndtri

from bayeskernel._precision import jit
from bayeskernel.activations import Activation
from bayeskernel.meanfield.grid import tilt
from bayeskernel.meanfield.laws import Law, Nodes
from bayeskernel.meanfield.moments import (
    Drawn,
    Moments,
    Statistics,
    particle_motion,
    resampled,
    steering,
)
from bayeskernel.meanfield.sites import Sites
from bayeskernel.problem import Floats

# Kicks of one transition, and how long its trajectory may be: three eighths of the prior's period.
_KICKS = 12
_LONGEST = 0.75 * np.pi
# Transitions between two clouds; before the last one, and between its snapshots.
_TRANSITIONS, _EQUILIBRATION, _SPACING = 3, 10, 5
# Least snapshots of the last cloud and those of full size, and how many numbers its statistics may hold.
_SNAPSHOTS = (4, 44)
STATISTICS = 49_000_000
# Quasi-random points of one estimate of ln Z, and independent scramblings that tell its error.
_POINTS, _SCRAMBLINGS = 2**15, 16
# Code is compiled for dimensions padded to one of these.
_BUCKETS = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


@dataclass(eq=False)
class Particles(Drawn):
    """Random nodes at fixed noise z; h = L(K) z at the pivots.

    Parameters
    ----------
    sites
        The group of sites.
    z
        Shape (M, r).
    log_weight
        ln Z = ln sum_i exp(log_weight_i + phi_i^T Ct phi_i / 2), shape (M,).
    variance
        Of ln Z from the clouds this one descends from.
    accurate
        Whether second derivatives are averaged over as many particles as memory allows.
    """

    random = True
    sites: Sites
    z: Floats
    log_weight: Floats
    variance: float = 0.0
    accurate: bool = False

    def law(self, K: Floats, Ct: Floats, *, symmetric: bool) -> Law:
        """Q at (K, Ct)."""
        factor = self._factor(K)
        root = self.sites.spread @ factor
        h = self.z @ root.T
        phi, slopes = self.sites.phi.values(h), self.sites.phi.slopes(h)
        log_density = self.log_weight + tilt(phi, Ct)
        log_normaliser = float(logsumexp(log_density))
        weights = np.exp(log_density - log_normaliser)
        some, share = steering(weights, len(self.sites.entries.first), accurate=self.accurate)

        def motion() -> tuple[Floats, Floats]:
            own = slopes[0][some], slopes[1][some]
            return particle_motion(share, self.z[some], phi[some], own, root, Ct)

        statistics = Statistics(
            log_normaliser,
            weights,
            h,
            phi,
            pull=(slopes[0] * (phi @ Ct)) @ root,
            z=self.z,
            constant=np.zeros_like(factor),
            factor=factor,
            motion=motion,
            effective=float(1 / (len(weights) * np.sum(weights**2))),
            random=True,
            steering=(some, share),
        )
        return Moments(self.sites, statistics, symmetric=symmetric)

    def renewed(
        self, law: Law, K: Floats, Ct: Floats, rng: np.random.Generator, times: int = 0
    ) -> Nodes:
        """A new cloud; of full size, or of so many times that where memory allows, well equilibrated."""
        if not times:
            return self._moved(law, K, Ct, rng, _TRANSITIONS, 1)
        mixed = self._moved(law, K, Ct, rng, _EQUILIBRATION, 1)
        n, r = self.sites.spread.shape
        most, (least, enough) = (n * (n + 1) + r * (r + 1)) // 2, _SNAPSHOTS
        snapshots = int(np.clip(STATISTICS // (most * len(self.z)), least, times * enough))
        now = mixed.law(K, Ct, symmetric=False)
        return mixed._moved(now, K, Ct, rng, _SPACING, snapshots)

    def flipped(self, signs: Floats) -> Nodes:
        """The nodes under h -> signs h."""
        return replace(self, z=self.z * signs[self.sites.pivots])

    def completed(self) -> Nodes:
        """The same for all entries of C."""
        return replace(self, sites=self.sites.completed())

    def thinned(self, count: int) -> Nodes:
        """About ``count`` of the particles."""
        stride = max(1, len(self.z) // count)
        log_weight = self.log_weight[::stride] + np.log(stride)
        return Particles(self.sites, self.z[::stride], log_weight)

    def log_normaliser(
        self, law: Law, K: Floats, Ct: Floats, rng: np.random.Generator
    ) -> tuple[float, float]:
        """Ln Z and its variance, by the better of the cloud's own history and an estimate from scratch.

        The latter weighs scrambled Sobol points from the Gaussian of covariance <h h^T>, nowhere narrower than K.
        """
        from scipy.stats.qmc import Sobol  # takes half a second

        own = self._history(law)
        if own == 0:
            return law.log_normaliser, own
        pivots, factor = self.sites.pivots, self._factor(K)
        excess = factor.T @ law.B[np.ix_(pivots, pivots)] @ factor
        stretch, axes = np.linalg.eigh(np.eye(len(factor)) + excess)
        stretch = np.maximum(stretch, 1)
        root = self.sites.spread @ factor @ axes * np.sqrt(stretch)
        estimates = []
        for _ in range(_SCRAMBLINGS):
            points = Sobol(len(factor), rng=rng).random(_POINTS)
            u = ndtri(np.clip(points, 1e-15, 1 - 1e-15))
            log_weights = tilt(self.sites.phi.values(u @ root.T), Ct)
            log_weights += u**2 @ (1 - stretch) / 2 + np.sum(np.log(stretch)) / 2
            estimates.append(float(logsumexp(log_weights)) - np.log(_POINTS))
        spread = np.exp(np.array(estimates) - max(estimates))
        variance = float(np.var(spread, ddof=1) / np.mean(spread) ** 2 / _SCRAMBLINGS)
        if not variance < own:
            return law.log_normaliser, own
        return max(estimates) + float(np.log(np.mean(spread))), variance

    def _moved(
        self,
        law: Law,
        K: Floats,
        Ct: Floats,
        rng: np.random.Generator,
        transitions: int,
        snapshots: int,
    ) -> Particles:
        """Particles resampled by weight, which keeps the proportions of distant modes right, then moved.

        Hamiltonian transitions make them distinct; several snapshots on the way make a larger cloud.
        """
        assert isinstance(law, Moments)
        z, root, parts = self.z, self.sites.spread @ self._factor(K), []
        if law.effective < 1 - 1e-9:
            z = z[resampled(law.weights, len(z), rng)]
        for _ in range(snapshots):
            seed = int(rng.integers(2**31))
            z = moved(self.sites.phi, z, root, Ct, seed, transitions)
            parts.append(z)
        z = np.concatenate(parts)
        log_weight = (
            law.log_normaliser - np.log(len(z)) - tilt(self.sites.phi.values(z @ root.T), Ct)
        )
        return Particles(self.sites, z, log_weight, self._history(law))

    def _history(self, law: Law) -> float:
        """Variance of ln Z from sampling: each change of weights between clouds adds its own."""
        return self.variance + (1 / law.effective - 1) / len(self.z)

    def _factor(self, K: Floats) -> Floats:
        pivots = np.ix_(self.sites.pivots, self.sites.pivots)
        return np.asarray(np.linalg.cholesky(K[pivots]), np.float64)


def from_prior(sites: Sites, count: int, rng: np.random.Generator) -> Particles:
    """Draws from the prior in antithetic pairs, their second moment made exact."""
    half = rng.standard_normal((count // 2, len(sites.pivots)))
    z = np.concatenate([half, -half])
    z = solve_triangular(np.linalg.cholesky(z.T @ z / len(z)), z.T, lower=True).T
    return Particles(sites, z, np.full(len(z), -np.log(len(z))))


def from_draws(sites: Sites, h: Floats, K: Floats, Ct: Floats) -> Particles:
    """Nodes from draws of q, h of shape (M, n), for second derivatives; they do not tell ln Z."""
    pivots = sites.pivots
    factor = np.linalg.cholesky(K[np.ix_(pivots, pivots)])
    z = solve_triangular(factor, h[:, pivots].T, lower=True).T
    phi = sites.phi.values(h[:, pivots] @ sites.spread.T)
    log_weight = -np.log(len(z)) - tilt(phi, Ct)
    return Particles(sites, z, log_weight, variance=np.inf, accurate=True)


def moved(
    phi: Activation, z: Floats, root: Floats, Ct: Floats, seed: int, transitions: int
) -> Floats:
    """Z of shape (M, r) after some transitions that leave q unchanged; h = root z.

    In float32: where nodes come to lie is random, and what is computed on them in float64.
    """
    n, r = root.shape
    rows, columns = _bucket(n) - n, _bucket(r) - r
    with jax.enable_x64(False):
        out = _transitions(
            phi,
            jnp.asarray(np.pad(z, ((0, 0), (0, columns))), jnp.float32),
            jnp.asarray(np.pad(root, ((0, rows), (0, columns))), jnp.float32),
            jnp.asarray(np.pad(Ct, ((0, rows), (0, rows))), jnp.float32),
            jax.random.key(seed),
            transitions,
        )
        return np.asarray(out, np.float64)[:, :r]


def _bucket(size: int) -> int:
    return next((b for b in _BUCKETS if b >= size), size)


@partial(jit, static_argnums=0)
def _transitions(
    phi: Activation, z: jax.Array, root: jax.Array, Ct: jax.Array, key: jax.Array, count: int
) -> jax.Array:
    """Z after transitions whose step is found on the way."""
    return transitions(phi, z, root, Ct, key, jnp.asarray(0.1, z.dtype), count, _KICKS)[0]


def transitions(
    phi: Activation,
    z: jax.Array,
    root: jax.Array,
    Ct: jax.Array,
    key: jax.Array,
    step: jax.Array,
    count: int | jax.Array,
    kicks: int,
) -> tuple[jax.Array, jax.Array]:
    """Z (M, r), h = root z, and the step, after Hamiltonian transitions that leave q unchanged.

    So many kicks by the tilt in each, exact rotations of the Gaussian part.
    """

    def tilted(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = z @ root.T
        activity, slope = jax.jvp(phi.function, (h,), (jnp.ones_like(h),))
        pulled = activity @ Ct
        return jnp.sum(pulled * activity, axis=-1) / 2, (slope * pulled) @ root

    def transition(_: int, carry: Any) -> Any:
        z, value, pull, key, step = carry
        key, key_p, key_length, key_accept = jax.random.split(key, 4)
        p = jax.random.normal(key_p, z.shape, z.dtype)
        angle = step * jax.random.uniform(key_length, (len(z), 1), z.dtype, 0.6, 1.4)
        cos, sin = jnp.cos(angle), jnp.sin(angle)

        def kick(_: int, state: Any) -> Any:
            z, p, _value, pull = state
            p = p + angle / 2 * pull
            z, p = cos * z + sin * p, cos * p - sin * z
            value, pull = tilted(z)
            return z, p + angle / 2 * pull, value, pull

        new, q, new_value, new_pull = jax.lax.fori_loop(0, kicks, kick, (z, p, value, pull))
        change = new_value - value + jnp.sum(z**2 + p**2 - new**2 - q**2, axis=-1) / 2
        probability = jnp.exp(jnp.minimum(jnp.nan_to_num(change, nan=-jnp.inf), 0))
        accept = jax.random.uniform(key_accept, probability.shape, z.dtype) < probability
        # Shared by all particles, so a step answers to their mean, which one particle hardly moves.
        step = jnp.clip(step * jnp.exp(jnp.mean(probability) - 0.8), 1e-4, _LONGEST / kicks)
        z, pull = (jnp.where(accept[:, None], a, b) for a, b in ((new, z), (new_pull, pull)))
        return z, jnp.where(accept, new_value, value), pull, key, step.astype(z.dtype)

    z, _, _, _, step = jax.lax.fori_loop(0, count, transition, (z, *tilted(z), key, step))
    return z, step
