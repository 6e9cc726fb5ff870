r"""How does ln Z of one unit answer to K and Ct? Its derivatives up to second order.

On a `Grid` q is an exponential family with statistics phi phi and h h, so kinks of phi do no harm. On
`Particles` K moves the nodes, and derivatives in K are those of a change of variables. Both are smooth
functions of (K, Ct) while the nodes stay (docs/theory, section 4).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve
from numpy.typing import NDArray
from scipy.linalg import block_diag, solve_triangular

from bayeskernel.activations import Activation
from bayeskernel.meanfield.single_unit import (
    Cloud,
    Grid,
    Law,
    Pairs,
    Particles,
    Unit,
    all_pairs,
    law,
)

Floats = NDArray[np.float64]

# Nodes whose statistics are held at a time.
_CHUNK = 1024
# Second derivatives of ln Z only steer Newton's method and propagate errors; so many particles suffice.
_HESSIAN_PARTICLES = 4096
# Half the width over which a kink of phi is spread in second derivatives.
_KINK = 0.2


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


def derivatives(
    cloud: Cloud, unit: Unit, *, noise: bool = False, second: bool = True
) -> Derivatives:
    """Ln Z to second order, or first where ``second`` is not set; 64-bit JAX must be enabled."""
    if isinstance(cloud, Grid):
        return _on_grid(cloud, unit, second=second)
    return _on_particles(cloud, unit, noise=noise, second=second)


def _on_grid(cloud: Grid, unit: Unit, *, second: bool) -> Derivatives:
    at, n = law(cloud, unit), len(unit.pairs.first)
    everything = all_pairs(len(unit.K))
    statistics = [_products(at.phi, unit.pairs), _products(cloud.h, everything)]
    mean, covariance, _ = _moments(at, statistics, second=second)
    parts = _precision(jnp.asarray(unit.K), jnp.asarray(mean[n:]), unit.moving)
    jacobian, hessian, log_det = (np.asarray(part) for part in parts)
    return Derivatives(
        at.log_normaliser,
        mean[:n],
        jacobian.T @ mean[n:] - log_det,
        covariance[:n, :n],
        covariance[:n, n:] @ jacobian,
        jacobian.T @ covariance[n:, n:] @ jacobian + hessian,
        1.0,
        np.zeros((n + len(log_det),) * 2),
    )


def _on_particles(cloud: Particles, unit: Unit, *, noise: bool, second: bool) -> Derivatives:
    at, n = law(cloud, unit), len(unit.pairs.first)
    factor = np.asarray(np.linalg.cholesky(unit.K), np.float64)
    # K of the first pivots is fixed, and so are their nodes.
    fixed = int(np.min(unit.moving.first, initial=len(factor)))
    root, z = (unit.sites.spread @ factor)[:, fixed:], cloud.z[:, fixed:]
    first, bent = slopes(unit.phi, at.h)
    pull = (first * (at.phi @ unit.Ct)) @ root
    # In X = L^-1 dK L^-T node i moves by L tril(X) z_i, its diagonal halved.
    statistics = [_products(at.phi, unit.pairs), _lower_of(pull, z)]
    mean, covariance, error = _moments(at, statistics, second=second, noise=noise, rough=True)
    whiten = _whitening(factor, fixed, unit.moving)
    slope = whiten.T @ mean[n:]
    if not second:
        none = np.zeros((0, 0))
        return Derivatives(at.log_normaliser, mean[:n], slope, none, none, none, at.effective, none)
    some = slice(None, None, max(1, len(cloud.z) // _HESSIAN_PARTICLES))
    share = at.weights[some] / at.weights[some].sum()
    nodes = _Nodes(z[some], at.phi[some], first[some], bent[some], share)
    turn, bend = _motion(nodes, root, unit)
    both = block_diag(np.eye(n), whiten)
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


def _products(values: Floats, pairs: Pairs) -> _Statistic:
    return values, values, pairs, np.ones(len(pairs.first))


def _lower_of(pull: Floats, z: Floats) -> _Statistic:
    """pull_k z_l for k >= l, halved at k = l."""
    pairs = all_pairs(z.shape[1])
    return z, pull, pairs, pairs.multiplicity


def _moments(
    at: Law,
    statistics: list[_Statistic],
    *,
    second: bool,
    noise: bool = False,
    rough: bool = False,
) -> tuple[Floats, Floats, Floats]:
    """Mean and covariance of products over q, and the covariance of the means over clouds.

    Where covariances are samples anyway, they may be ``rough``: single precision is twice as fast.
    """

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
        if rough:
            rooted = rooted.astype(np.float32)
        covariance += rooted.T @ rooted
        if noise:
            rooted = rooted * np.sqrt(at.weights[chunk])[:, None]
            error += rooted.T @ rooted
    return mean, covariance, error


@jax.jit
def _precision(
    K: jax.Array, mean: jax.Array, moving: Pairs
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Derivatives in entries k of K of the natural parameters -K^-1 / 2 of h h.

    Returns their Jacobian, the Hessian of mean . natural - ln det K / 2, the gradient of ln det K / 2.
    """
    pairs = all_pairs(len(K))

    def parts(k: jax.Array) -> tuple[jax.Array, jax.Array]:
        full = K.at[moving.first, moving.second].set(k)
        full = full.at[moving.second, moving.first].set(k)
        factor = jnp.linalg.cholesky(full)
        inverse = cho_solve((factor, True), jnp.eye(len(K)))
        natural = -pairs.multiplicity * inverse[pairs.first, pairs.second]
        return jnp.asarray(natural), jnp.sum(jnp.log(jnp.diag(factor)))

    k = K[moving.first, moving.second]
    natural = jax.jacfwd(lambda k: parts(k)[0])(k)
    hessian = jax.hessian(lambda k: mean @ parts(k)[0] - parts(k)[1])(k)
    return jnp.asarray(natural), jnp.asarray(hessian), jax.grad(lambda k: parts(k)[1])(k)


class _Nodes(NamedTuple):
    z: Floats
    phi: Floats
    first: Floats
    bent: Floats
    weights: Floats


def _motion(at: _Nodes, root: Floats, unit: Unit) -> tuple[Floats, Floats]:
    """Means over nodes of what changes as nodes move with X, h = root chol(1 + X) z.

    Returns <d(phi phi)/dX> (n, q), and <d^2/dX^2 of phi^T Ct phi / 2> (q, q) at X = 0. To second order
    chol(1 + X) = 1 + H - low(H H^T) with H = low(X), the lower half with its diagonal halved.
    """
    d, r = root.shape
    pairs, sites, Ct = all_pairs(r), unit.pairs, unit.Ct
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


def _whitening(factor: Floats, fixed: int, moving: Pairs) -> Floats:
    """The matrix of dK -> L^-1 dK L^-T: from moving entries to all beyond the fixed ones."""
    inverse = solve_triangular(factor, np.eye(len(factor)), lower=True)[fixed:]
    pairs = all_pairs(len(inverse))
    a, b = inverse[pairs.first], inverse[pairs.second]
    i, j = moving
    return (a[:, i] * b[:, j] + a[:, j] * b[:, i]) * np.where(i == j, 0.5, 1.0)
