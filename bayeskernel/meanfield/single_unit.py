r"""How is one unit of a wide network distributed? The tilted law of its pre-activations.

    q(h) = N(h; 0, K) exp(phi(h)^T Ct phi(h) / 2) / Z        (docs/theory, section 4)

and the derivatives of ln Z in Ct and K up to second order: all a saddle point needs. Two clouds of nodes give
them, both smooth functions of (K, Ct) while the nodes stay:

- a `Grid` in h, in few dimensions. K enters through the density of h alone, q being an exponential family
  with statistics phi phi and h h, so kinks of phi do no harm. Deterministic.
- `Particles` in z, h = L(K) z, in more. K moves the nodes and only Ct weighs them, so at Ct = 0 there is no
  sampling error, and none is amplified by K^-1.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.special import logsumexp

from bayeskernel.activations import Activation

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# A site whose innovation holds less of its variance than this follows from the sites before it.
_PIVOT_TOLERANCE = 1e-8
# In up to so many dimensions a grid. The trapezoidal rule converges faster than any power on smooth
# functions: at this spacing, in standard deviations of q, beyond 1e-8.
GRID_DIMENSIONS = 3
_GRID_NODES = {1: 801, 2: 161, 3: 41}
_PANEL_NODES = {1: 100, 2: 60, 3: 32}
_GRID_REACH = 6.5
# Kicks of one transition, and how long its trajectory may be: three quarters of a quarter period.
_KICKS = 12
_LONGEST = 0.75 * np.pi
_CHUNK = 1024
# Second derivatives of ln Z only steer Newton's method and propagate errors; so many particles suffice.
_HESSIAN_PARTICLES = 4096
# Half the width over which a kink of phi is spread in second derivatives.
_KINK = 0.2


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
    """What a group of sites asks of the law of one unit: phi, how sites follow from pivots, K and Ct.

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
    """

    phi: Activation
    sites: Sites
    K: Floats
    Ct: Floats


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


class Derivatives(NamedTuple):
    """Ln Z to second order in l, the weights of phi phi pairs (n), and k, the entries of K (q).

    Attributes
    ----------
    log_normaliser
        ln Z.
    mean
        d/dl: <phi phi>, shape (n,).
    slope
        d/dk: half the backward kernel B with multiplicities, shape (q,).
    covariance, cross, curvature
        Second derivatives ll, lk and kk.
    effective
        Effective fraction of the nodes.
    noise
        Covariance of (mean, slope) over independent clouds, shape (n + q, n + q); zero for a grid.
    """

    log_normaliser: float
    mean: Floats
    slope: Floats
    covariance: Floats
    cross: Floats
    curvature: Floats
    effective: float
    noise: Floats


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


def derivatives(
    cloud: Cloud, unit: Unit, *, noise: bool = False, second: bool = True
) -> Derivatives:
    """Ln Z to second order, or first where ``second`` is not set; 64-bit JAX must be enabled."""
    if isinstance(cloud, Grid):
        return _on_grid(cloud, unit, second=second)
    return _on_particles(cloud, unit, noise=noise, second=second)


def _on_grid(cloud: Grid, unit: Unit, *, second: bool) -> Derivatives:
    at, n = law(cloud, unit), len(all_pairs(len(unit.Ct)).first)
    mean, covariance, _ = _moments(at, [_pairs_of(at.phi), _pairs_of(cloud.h)], second=second)
    parts = _precision(jnp.asarray(unit.K), jnp.asarray(mean[n:]))
    jacobian, hessian, log_det = (np.asarray(part) for part in parts)
    return Derivatives(
        at.log_normaliser,
        mean[:n],
        jacobian.T @ mean[n:] - log_det,
        covariance[:n, :n],
        covariance[:n, n:] @ jacobian,
        jacobian.T @ covariance[n:, n:] @ jacobian + hessian,
        1.0,
        np.zeros((len(mean), len(mean))),
    )


def _on_particles(cloud: Particles, unit: Unit, *, noise: bool, second: bool) -> Derivatives:
    at, n = law(cloud, unit), len(all_pairs(len(unit.Ct)).first)
    factor = np.asarray(np.linalg.cholesky(unit.K), np.float64)
    root = unit.sites.spread @ factor
    first, bent = slopes(unit.phi, at.h)
    pull = (first * (at.phi @ unit.Ct)) @ root
    # In X = L^-1 dK L^-T node i moves by L tril(X) z_i, its diagonal halved.
    mean, covariance, error = _moments(
        at, [_pairs_of(at.phi), _lower_of(pull, cloud.z)], second=second, noise=noise
    )
    whiten = _whitening(factor, all_pairs(len(factor)))
    slope = whiten.T @ mean[n:]
    if not second:
        none = np.zeros((0, 0))
        return Derivatives(at.log_normaliser, mean[:n], slope, none, none, none, at.effective, none)
    some = slice(None, None, max(1, len(cloud.z) // _HESSIAN_PARTICLES))
    share = at.weights[some] / at.weights[some].sum()
    nodes = _Nodes(cloud.z[some], at.phi[some], first[some], bent[some], share)
    turn, bend = _motion(nodes, root, unit.Ct)
    both = np.eye(len(mean))
    both[n:, n:] = whiten
    return Derivatives(
        at.log_normaliser,
        mean[:n],
        slope,
        covariance[:n, :n],
        (covariance[:n, n:] + turn) @ whiten,
        whiten.T @ (covariance[n:, n:] + bend) @ whiten,
        at.effective,
        both.T @ error @ both,
    )


_Statistic = tuple[Floats, Floats, Pairs, Floats]


def _pairs_of(values: Floats) -> _Statistic:
    pairs = all_pairs(values.shape[1])
    return values, values, pairs, np.ones(len(pairs.first))


def _lower_of(pull: Floats, z: Floats) -> _Statistic:
    """pull_k z_l for k >= l, halved at k = l."""
    pairs = all_pairs(z.shape[1])
    return z, pull, pairs, pairs.multiplicity


def _moments(
    at: Law, statistics: list[_Statistic], *, second: bool, noise: bool = False
) -> tuple[Floats, Floats, Floats]:
    """Mean and covariance of products over q, and the covariance of the means over clouds."""

    def values(chunk: slice) -> Floats:
        return np.concatenate(
            [a[chunk][:, p.first] * b[chunk][:, p.second] * c for a, b, p, c in statistics], axis=1
        )

    size = sum(len(p.first) for _, _, p, _ in statistics)
    chunks = [slice(i, i + _CHUNK) for i in range(0, len(at.weights), _CHUNK)]
    mean = sum((at.weights[c] @ values(c) for c in chunks), np.zeros(size))
    covariance, error = np.zeros((size, size)), np.zeros((size, size))
    for chunk in chunks if second else ():
        rooted = (values(chunk) - mean) * np.sqrt(at.weights[chunk])[:, None]
        covariance += rooted.T @ rooted
        if noise:
            rooted *= np.sqrt(at.weights[chunk])[:, None]
            error += rooted.T @ rooted
    return mean, covariance, error


@jax.jit
def _precision(K: jax.Array, mean: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Derivatives in the entries k of K of the natural parameters -K^-1 / 2 of h h.

    Returns their Jacobian, the Hessian of mean . natural - ln det K / 2, the gradient of ln det K / 2.
    """
    pairs = all_pairs(len(K))

    def parts(k: jax.Array) -> tuple[jax.Array, jax.Array]:
        full = jnp.zeros_like(K).at[pairs.first, pairs.second].set(k)
        full = full.at[pairs.second, pairs.first].set(k)
        factor = jnp.linalg.cholesky(full)
        inverse = cho_solve((factor, True), jnp.eye(len(K)))
        natural = -pairs.multiplicity * inverse[pairs.first, pairs.second]
        return jnp.asarray(natural), jnp.sum(jnp.log(jnp.diag(factor)))

    k = K[pairs.first, pairs.second]
    natural = jax.jacfwd(lambda k: parts(k)[0])(k)
    hessian = jax.hessian(lambda k: mean @ parts(k)[0] - parts(k)[1])(k)
    return jnp.asarray(natural), jnp.asarray(hessian), jax.grad(lambda k: parts(k)[1])(k)


class _Nodes(NamedTuple):
    z: Floats
    phi: Floats
    first: Floats
    bent: Floats
    weights: Floats


def _motion(at: _Nodes, root: Floats, Ct: Floats) -> tuple[Floats, Floats]:
    """Means over nodes of what changes as nodes move with X, h = root chol(1 + X) z.

    Returns <d(phi phi)/dX> (n, q), and <d^2/dX^2 of phi^T Ct phi / 2> (q, q) at X = 0. To second order
    chol(1 + X) = 1 + H - low(H H^T) with H = low(X), the lower half with its diagonal halved.
    """
    d, r = root.shape
    pairs, sites = all_pairs(r), all_pairs(d)
    halved = pairs.multiplicity
    z = at.weights[:, None] * at.z
    # d phi_i = phi'_i root_ik H_kl z_l.
    moved = np.einsum("mi,mj->mij", at.first, at.phi).reshape(len(z), -1).T @ z
    moved = moved.reshape(d, d, r)[:, :, None, :] * root[:, None, :, None]  # (i, j, k, l)
    moved = (moved + moved.transpose(1, 0, 2, 3))[sites.first, sites.second]
    turn = moved[:, pairs.second, pairs.first] * halved
    # d^2 (phi^T Ct phi / 2) / dh_i dh_j, averaged with z_l z_m.
    curvature = at.first[:, :, None] * Ct * at.first[:, None, :]
    curvature[:, np.arange(d), np.arange(d)] += at.bent * (at.phi @ Ct)
    zz = z[:, pairs.first] * at.z[:, pairs.second]
    mean = np.zeros((d, d, r, r))
    mean[:, :, pairs.first, pairs.second] = (curvature.reshape(len(z), -1).T @ zz).reshape(d, d, -1)
    mean[:, :, pairs.second, pairs.first] = mean[:, :, pairs.first, pairs.second]
    # To (k, l, k', m) with h_i = root_ik H_kl z_l.
    bend = np.tensordot(root, np.tensordot(root, mean, (0, 1)), (0, 1)).transpose(0, 2, 1, 3)
    force = (at.first * (at.phi @ Ct)) @ root
    low = np.tril(force.T @ z, -1)
    low += np.diag(np.sum(force * z, axis=0)) / 2
    diagonal = np.arange(r)
    bend[:, diagonal, :, diagonal] -= low + low.T
    bend = bend[pairs.second, pairs.first][:, pairs.second, pairs.first]
    return turn, bend * halved * halved[:, None]


def slopes(phi: Activation, h: Floats) -> tuple[Floats, Floats]:
    """Phi' and phi'' at the nodes; at kinks phi'' is phi' differenced over a fifth of a unit.

    Autodiff gives a piecewise linear phi no second derivative at all.
    """
    with jax.enable_x64(True):
        first, bent = _slopes(phi, phi.smooth, jnp.asarray(h.ravel()))
    return np.asarray(first).reshape(h.shape), np.asarray(bent).reshape(h.shape)


@partial(jax.jit, static_argnums=(0, 1))
def _slopes(phi: Activation, smooth: bool, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    slope = jax.grad(lambda x: phi(x))
    first = jax.vmap(slope)
    if smooth:
        return first(h), jax.vmap(jax.grad(slope))(h)
    return first(h), (first(h + _KINK) - first(h - _KINK)) / (2 * _KINK)


def _whitening(factor: Floats, pairs: Pairs) -> Floats:
    """The matrix of dK -> L^-1 dK L^-T between entries, shape (q, q)."""
    inverse = solve_triangular(factor, np.eye(len(factor)), lower=True)
    a, b = inverse[pairs.first], inverse[pairs.second]
    both = a[:, pairs.first] * b[:, pairs.second] + a[:, pairs.second] * b[:, pairs.first]
    return both * np.where(pairs.first == pairs.second, 0.5, 1.0)


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
    count = len(at.weights)
    if at.effective < 1 - 1e-9:
        positions = (rng.random() + np.arange(count)) / count
        chosen = np.minimum(np.searchsorted(np.cumsum(at.weights), positions), count - 1)
        z = cloud.z[chosen]
    else:
        z = cloud.z
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
