r"""How is one unit of a wide network distributed? The tilted law of its pre-activations.

    q(h) = N(h; 0, K) exp(phi(h)^T Ct phi(h) / 2) / Z        (docs/theory, section 4)

Two clouds of nodes stand for it:

- a `Grid` in h, in few dimensions, deterministic; K enters through the density of h alone.
- `Particles` in z, h = L(K) z, in more. K moves the nodes and only Ct weighs them, so at Ct = 0 there is no
  sampling error, and none is amplified by K^-1.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.special import logsumexp, ndtri
from scipy.stats.qmc import Sobol

from bayeskernel.activations import Activation

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# A site whose innovation holds less of its variance than this follows from the sites before it. Statistics of
# smaller ones are lost to rounding errors, and kernels change by less than that share.
_PIVOT_TOLERANCE = 1e-6
# In up to so many dimensions a grid. The trapezoidal rule converges faster than any power on smooth
# functions: at this spacing, in standard deviations of q, beyond 1e-8.
GRID_DIMENSIONS = 3
_GRID_NODES = {1: 801, 2: 161, 3: 41}
_PANEL_NODES = {1: 100, 2: 60, 3: 32}
_GRID_REACH = 6.5
# Kicks of one transition, and how long its trajectory may be: three eighths of the prior's period.
_KICKS = 12
_LONGEST = 0.75 * np.pi
# Quasi-random points of one estimate of ln Z, and independent scramblings that tell its error.
_POINTS, _SCRAMBLINGS = 2**15, 16


class Pairs(NamedTuple):
    """Entries (first, second), first <= second, of a symmetric matrix."""

    first: Ints
    second: Ints

    @property
    def multiplicity(self) -> Floats:
        """1/2 on the diagonal and 1 off it: phi^T Ct phi / 2 = sum over pairs of this Ct phi phi."""
        return np.where(self.first == self.second, 0.5, 1.0)


def all_pairs(size: int) -> Pairs:
    """Every entry on and above the diagonal."""
    return Pairs(*(index.astype(np.int64) for index in np.triu_indices(size)))


class Sites(NamedTuple):
    """How the d sites follow from r pivots: h = spread h[pivots] with unit rows at the pivots.

    Attributes
    ----------
    pivots
        Sites with an innovation of their own, shape (r,).
    spread
        Shape (d, r).
    """

    pivots: Ints
    spread: Floats


def find_sites(covariance: Floats) -> Sites:
    """Choose pivots in causal order under a covariance of h, shape (d, d)."""
    variance = np.diag(covariance)
    pivots = list[int]()
    for site in range(len(covariance)):
        gain = np.linalg.solve(covariance[np.ix_(pivots, pivots)], covariance[pivots, site])
        if variance[site] - gain @ covariance[pivots, site] > _PIVOT_TOLERANCE * variance[site]:
            pivots.append(site)
    index = np.array(pivots, np.int64)
    spread = np.linalg.solve(covariance[np.ix_(index, index)], covariance[index]).T
    return Sites(index, np.asarray(spread, np.float64))


class Grid(NamedTuple):
    """Nodes at fixed pre-activations.

    Attributes
    ----------
    h
        Pre-activations at the pivots, shape (M, r).
    phi
        Activities at all sites, shape (M, d).
    log_volume
        ln of the volume each node stands for, shape (M,).
    """

    h: Floats
    phi: Floats
    log_volume: Floats


class Particles(NamedTuple):
    """Random nodes at fixed noise z; h = L(K) z at the pivots.

    Attributes
    ----------
    z
        Shape (M, r).
    log_weight
        ln Z = ln sum_i exp(log_weight_i + phi_i^T Ct phi_i / 2), shape (M,).
    variance
        Of ln Z from the clouds this one descends from.
    """

    z: Floats
    log_weight: Floats
    variance: float = 0.0


Cloud = Grid | Particles


class Unit(NamedTuple):
    """What a group of sites asks of the law of one unit.

    Attributes
    ----------
    phi
        Activation.
    sites
        See `Sites`.
    K
        At the pivots, shape (r, r).
    Ct
        Shape (d, d).
    pairs
        Entries of phi phi that are asked for.
    moving
        Entries of K that can change, in pivots.
    """

    phi: Activation
    sites: Sites
    K: Floats
    Ct: Floats
    pairs: Pairs
    moving: Pairs


class Law(NamedTuple):
    """q on a cloud.

    Attributes
    ----------
    log_normaliser
        ln Z.
    weights
        Probability of every node, shape (M,).
    h, phi
        Pre-activations and activities at all sites, shape (M, d).
    effective
        Effective fraction of the nodes, (sum w)^2 / (M sum w^2); 1 for a grid.
    """

    log_normaliser: float
    weights: Floats
    h: Floats
    phi: Floats
    effective: float


def law(cloud: Cloud, unit: Unit) -> Law:
    """Weigh the nodes."""
    if isinstance(cloud, Grid):
        h, phi = cloud.h @ unit.sites.spread.T, cloud.phi
        factor = np.linalg.cholesky(unit.K)
        z = solve_triangular(factor, cloud.h.T, lower=True)
        base = cloud.log_volume - np.sum(z**2, axis=0) / 2 - np.sum(np.log(np.diag(factor)))
        base -= len(unit.K) / 2 * np.log(2 * np.pi)
    else:
        h = cloud.z @ np.linalg.cholesky(unit.K).T @ unit.sites.spread.T
        phi, base = activity(unit.phi, h), cloud.log_weight
    log_density = base + _weigh(phi, unit.Ct)
    log_normaliser = float(logsumexp(log_density))
    weights = np.exp(log_density - log_normaliser)
    effective = float(1 / (len(weights) * np.sum(weights**2)))
    return Law(log_normaliser, weights, h, phi, 1.0 if isinstance(cloud, Grid) else effective)


def _weigh(phi: Floats, Ct: Floats) -> Floats:
    """phi^T Ct phi / 2 at every node."""
    return np.asarray(np.sum((phi @ Ct) * phi, axis=1) / 2)


def activity(phi: Activation, h: Floats) -> Floats:
    """phi(h) in float64."""
    with jax.enable_x64(True):
        return np.asarray(_apply(phi, jnp.asarray(h)))


@partial(jax.jit, static_argnums=0)
def _apply(phi: Activation, h: jax.Array) -> jax.Array:
    return phi(h)


def grid(phi: Activation, sites: Sites, covariance: Floats) -> Grid:
    """Nodes on a grid matched to a covariance of h at the pivots, shape (r, r).

    For smooth phi a lattice along the principal directions; otherwise Gauss-Legendre panels along h, split at
    zero where piecewise linear activations have their kink, so that the integrand is smooth on each.
    """
    r = len(sites.pivots)
    if not r:
        h, log_volume = np.zeros((1, 0)), np.zeros(1)
    elif phi.smooth:
        line = np.linspace(-_GRID_REACH, _GRID_REACH, _GRID_NODES[r])
        u = _product([line] * r)
        # The corners, beyond the reach, hold nothing: half the cube in three dimensions.
        u = u[np.sum(u**2, axis=1) <= _GRID_REACH**2 + 1e-9]
        root = np.linalg.cholesky(covariance)
        h = u @ root.T
        volume = r * np.log(line[1] - line[0]) + np.sum(np.log(np.diag(root)))
        log_volume = np.full(len(h), volume)
    else:
        nodes, weights = np.polynomial.legendre.leggauss(_PANEL_NODES[r])
        std = np.sqrt(np.diag(covariance))
        half = (nodes + 1) / 2 * _GRID_REACH
        line = np.concatenate([-half[::-1], half])
        share = np.log(np.concatenate([weights[::-1], weights]) * _GRID_REACH / 2)
        h = _product([line] * r) * std
        log_volume = np.sum(_product([share] * r), axis=1) + np.sum(np.log(std))
        z = solve_triangular(np.linalg.cholesky(covariance), h.T, lower=True)
        inside = np.sum(z**2, axis=0) <= _GRID_REACH**2
        h, log_volume = h[inside], log_volume[inside]
    return Grid(h, activity(phi, h @ sites.spread.T), log_volume)


def _product(axes: list[Floats]) -> Floats:
    return np.stack([a.ravel() for a in np.meshgrid(*axes, indexing="ij")], axis=1)


def prior_particles(dimensions: int, count: int, rng: np.random.Generator) -> Particles:
    """Draw nodes from the prior in antithetic pairs, their second moment made exact."""
    half = rng.standard_normal((count // 2, dimensions))
    z = np.concatenate([half, -half])
    z = solve_triangular(np.linalg.cholesky(z.T @ z / len(z)), z.T, lower=True).T
    return Particles(z, np.full(len(z), -np.log(len(z))))


def particles_at(h: Floats, unit: Unit) -> Particles:
    """Make nodes of draws from q, given at the pivots, shape (M, r)."""
    factor = np.linalg.cholesky(unit.K)
    z = solve_triangular(factor, h.T, lower=True).T
    tilt = _weigh(activity(unit.phi, h @ unit.sites.spread.T), unit.Ct)
    return Particles(z, -np.log(len(z)) - tilt)


def resample(weights: Floats, count: int, rng: np.random.Generator) -> Ints:
    """Indices drawn by weight, systematically."""
    positions = (rng.random() + np.arange(count)) / count
    return np.minimum(np.searchsorted(np.cumsum(weights), positions), len(weights) - 1)


def renew(
    cloud: Cloud,
    unit: Unit,
    rng: np.random.Generator,
    *,
    transitions: int,
    snapshots: int = 1,
) -> Cloud:
    """Make a new cloud for q from one that still overlaps with it.

    A grid is matched anew to <h h^T>. Particles are resampled by weight, which keeps the proportions of
    distant modes right, then moved by Hamiltonian transitions, which make them distinct; several
    snapshots on the way make a larger cloud.
    """
    at = law(cloud, unit)
    if isinstance(cloud, Grid):
        return grid(unit.phi, unit.sites, (cloud.h * at.weights[:, None]).T @ cloud.h)
    z = cloud.z
    if at.effective < 1 - 1e-9:
        z = z[resample(at.weights, len(z), rng)]
    root, Ct = unit.sites.spread @ np.linalg.cholesky(unit.K), unit.Ct
    parts = []
    for _ in range(snapshots):
        key = jax.random.key(int(rng.integers(2**31)))
        z = np.asarray(
            _transitions(
                unit.phi, jnp.asarray(z), jnp.asarray(root), jnp.asarray(Ct), key, transitions
            )
        )
        parts.append(z)
    z = np.concatenate(parts)
    phi = activity(unit.phi, z @ root.T)
    tilt = _weigh(phi, Ct)
    log_weight = at.log_normaliser - np.log(len(z)) - tilt
    return Particles(z, log_weight, log_normaliser_variance(cloud, unit))


def log_normaliser_variance(cloud: Cloud, unit: Unit) -> float:
    """Variance of ln Z from sampling: each change of weights between clouds adds its own."""
    if isinstance(cloud, Grid):
        return 0.0
    effective = law(cloud, unit).effective
    return cloud.variance + (1 / effective - 1) / len(cloud.z)


def log_normaliser(cloud: Cloud, unit: Unit, rng: np.random.Generator) -> tuple[float, float]:
    """Ln Z and its variance, by the better of the cloud's own history and an estimate from scratch.

    The latter weighs scrambled Sobol points from the Gaussian of covariance <h h^T>, nowhere narrower than K.
    """
    at, own = law(cloud, unit), log_normaliser_variance(cloud, unit)
    if own == 0:
        return at.log_normaliser, own
    h = at.h[:, unit.sites.pivots]
    factor = np.linalg.cholesky(unit.K)
    half = solve_triangular(factor, (h * at.weights[:, None]).T @ h, lower=True)
    stretch, axes = np.linalg.eigh(solve_triangular(factor, half.T, lower=True))
    stretch = np.maximum(stretch, 1)
    root = unit.sites.spread @ factor @ axes * np.sqrt(stretch)
    estimates = []
    for _ in range(_SCRAMBLINGS):
        points = Sobol(len(factor), rng=rng).random(_POINTS)
        u = ndtri(np.clip(points, 1e-15, 1 - 1e-15))
        tilt = _weigh(activity(unit.phi, u @ root.T), unit.Ct)
        log_weights = tilt + u**2 @ (1 - stretch) / 2 + np.sum(np.log(stretch)) / 2
        estimates.append(float(logsumexp(log_weights)) - np.log(_POINTS))
    spread = np.exp(np.array(estimates) - max(estimates))
    variance = float(np.var(spread, ddof=1) / np.mean(spread) ** 2 / _SCRAMBLINGS)
    if not variance < own:
        return at.log_normaliser, own
    return max(estimates) + float(np.log(np.mean(spread))), variance


@partial(jax.jit, static_argnums=0)
def _transitions(
    phi: Activation, z: jax.Array, root: jax.Array, Ct: jax.Array, key: jax.Array, count: int
) -> jax.Array:
    """Kicks by the tilt, exact rotations of the Gaussian part."""

    def tilt(z: jax.Array) -> jax.Array:
        activity = phi(z @ root.T)
        return jnp.sum((activity @ Ct) * activity, axis=-1) / 2

    gradient = jax.grad(lambda z: jnp.sum(tilt(z)))

    def transition(_: int, carry: Any) -> Any:
        z, key, step = carry
        key, key_p, key_length, key_accept = jax.random.split(key, 4)
        p = jax.random.normal(key_p, z.shape)
        angle = step * jax.random.uniform(key_length, (len(z), 1), minval=0.6, maxval=1.4)
        cos, sin = jnp.cos(angle), jnp.sin(angle)

        def kick(_: int, at: Any) -> Any:
            z, p = at
            p = p + angle / 2 * gradient(z)
            z, p = cos * z + sin * p, cos * p - sin * z
            return z, p + angle / 2 * gradient(z)

        new, q = jax.lax.fori_loop(0, _KICKS, kick, (z, p))
        change = tilt(new) - tilt(z) + (jnp.sum(z**2 + p**2 - new**2 - q**2, axis=-1)) / 2
        probability = jnp.exp(jnp.minimum(jnp.nan_to_num(change, nan=-jnp.inf), 0))
        accept = jax.random.uniform(key_accept, probability.shape) < probability
        # Shared by all particles, so a step answers to their mean, which one particle hardly moves.
        rate = jnp.mean(probability)
        step = jnp.clip(step * jnp.exp(rate - 0.8), 1e-4, _LONGEST / _KICKS)
        return jnp.where(accept[:, None], new, z), key, step

    start = (z, key, jnp.asarray(0.1))
    return jax.lax.fori_loop(0, count, transition, start)[0]
