r"""Which kernels are stationary when the law of one unit is not Gaussian?

    F(C, Ct) = 1/2 sum_o y_o^T S_o(C)^-1 y_o + 1/2 tr(Ct C) - ln Z(K(C), Ct)

is maximal in Ct (ln Z is convex) and stationary in C (docs/theory, section 4). With m the entries of C and l
those of Ct, Newton's method needs ln Z to second order (see `log_normaliser`). Eliminating l leaves the reduced
Hessian

    R = F_mm + F_ml cov(phi phi)^-1 F_lm

whose lowest eigenvalue says whether a solution is a minimum. m is measured in units of the spread of phi phi
over units, which makes R dimensionless.

Where no sign symmetry is broken, entries of C that a flip changes vanish. Averages over q then stand for
averages over q and its flips, which leaves no sampling noise there: entries of different *parity* do not mix.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import block_diag

from bayeskernel.meanfield.free_energy import Data, data_energy, output_log_determinant
from bayeskernel.meanfield.log_normaliser import Derivatives, derivatives
from bayeskernel.meanfield.problem import Problem, entries, matrix, pivot_kernels
from bayeskernel.meanfield.single_unit import (
    Cloud,
    Grid,
    Ints,
    Law,
    Pairs,
    Particles,
    Unit,
    law,
)

Floats = NDArray[np.float64]

# Particles that a thinned cloud keeps.
_THINNED = 4096
# Directions in which the statistics vary less than this, relative to their scale, are null.
_NULL = 1e-11


class Point(NamedTuple):
    """Kernels with the clouds they were computed on.

    Attributes
    ----------
    m
        Entries of C, group by group, shape (n,).
    conjugate
        Entries of Ct, shape (n,).
    clouds
        One for every group.
    symmetric
        Whether no sign symmetry is broken.
    """

    m: Floats
    conjugate: Floats
    clouds: tuple[Cloud, ...]
    symmetric: bool


class Expansion(NamedTuple):
    """F around a point to second order, in whitened coordinates m = unit x, Ct = unit^-T l.

    Attributes
    ----------
    value
        F.
    slope_m, slope_l
        Gradient; its largest entry is the residual.
    mixed
        F_ml, shape (k, k).
    reduced
        R, shape (k, k).
    unit, inverse
        Root of cov(phi phi) and its pseudo-inverse, shapes (n, k) and (k, n).
    outside
        What m misses of the moments in directions that do not vary, shape (n,).
    effective
        Smallest effective fraction of the clouds.
    noise
        Covariance of the two slopes over clouds, shape (2k, 2k), where asked for; zero on grids.
    """

    value: float
    slope_m: Floats
    slope_l: Floats
    mixed: Floats
    reduced: Floats
    unit: Floats
    inverse: Floats
    outside: Floats
    effective: float
    noise: Floats

    @property
    def hessian(self) -> Floats:
        """Second derivatives in (m, l), whitened, shape (2k, 2k); l alone has curvature -1."""
        curved = self.reduced - self.mixed @ self.mixed.T
        return np.block([[curved, self.mixed], [self.mixed.T, -np.eye(len(curved))]])

    @property
    def residual(self) -> float:
        """Largest violation of the two saddle-point equations."""
        parts = (self.slope_m, self.slope_l, self.outside)
        return float(max(np.max(np.abs(p), initial=0.0) for p in parts))


def units(point: Point, problem: Problem) -> list[Unit]:
    """The law of one unit, group by group."""
    Ct = matrix(point.conjugate, problem)
    return [
        Unit(problem.phi, g.reduction, K, Ct[np.ix_(g.sites, g.sites)], g.pairs, g.moving)
        for K, g in zip(pivot_kernels(point.m, problem), problem.groups, strict=True)
    ]


def laws(point: Point, problem: Problem) -> list[Law]:
    """The tilted law of every group on its cloud."""
    return [law(c, u) for c, u in zip(point.clouds, units(point, problem), strict=True)]


def expand(point: Point, problem: Problem, *, noise: bool = False) -> Expansion:
    """F to second order around a point."""
    found = [
        derivatives(cloud, unit, noise=noise)
        for cloud, unit in zip(point.clouds, units(point, problem), strict=True)
    ]
    of_l, of_k = (p if point.symmetric else 0 * p for p in (problem.parity, problem.pivot_parity))
    covariance = _diagonal([f.covariance for f in found], of_l, of_l)
    cross = _diagonal([f.cross for f in found], of_l, of_k)
    bend = _diagonal([f.curvature for f in found], of_k, of_k)
    mean = np.where(of_l == 0, np.concatenate([f.mean for f in found]), 0)
    force = np.where(of_k == 0, np.concatenate([f.slope for f in found]), 0)
    unit, inverse = _root(covariance)
    at = jnp.asarray(point.m), problem.data, problem.pairs
    (energy, slope), hessian = _data_slope(*at), np.asarray(_data_hessian(*at))
    natural = problem.pairs.multiplicity * point.conjugate
    # ln Z depends on C through K: its derivatives in K, pulled back.
    pull = problem.reads @ unit
    slope_m = unit.T @ (np.asarray(slope) + natural) - pull.T @ force
    curved = unit.T @ hessian @ unit - pull.T @ bend @ pull
    mixed = unit.T @ inverse.T - pull.T @ cross.T @ inverse.T
    reduced = curved + mixed @ mixed.T
    missed = point.m - mean
    return Expansion(
        value=float(energy + natural @ point.m - sum(f.log_normaliser for f in found)),
        slope_m=slope_m,
        slope_l=inverse @ missed,
        mixed=mixed,
        reduced=(reduced + reduced.T) / 2,
        unit=unit,
        inverse=inverse,
        outside=missed - unit @ (inverse @ missed),
        effective=min(f.effective for f in found),
        noise=_noise(found, of_l, of_k, -pull.T, -inverse) if noise else np.zeros((0, 0)),
    )


def _noise(found: list[Derivatives], of_l: Ints, of_k: Ints, to_m: Floats, to_l: Floats) -> Floats:
    """Covariance of the two slopes over clouds from those of (mean, slope of ln Z) of every group."""
    split = [(f.noise, len(f.mean)) for f in found]
    means = _diagonal([b[:n, :n] for b, n in split], of_l, of_l)
    slopes = _diagonal([b[n:, n:] for b, n in split], of_k, of_k)
    both = _diagonal([b[n:, :n] for b, n in split], of_k, of_l)
    even = np.concatenate([of_k, of_l]) == 0
    to = block_diag(to_m, to_l)
    joint = np.block([[slopes, both], [both.T, means]]) * np.outer(even, even)
    return np.asarray(to @ joint @ to.T)


def _diagonal(blocks: list[Floats], rows: Ints, columns: Ints) -> Floats:
    """Block diagonal over groups, zero between entries of different parity."""
    return np.where(rows[:, None] == columns, block_diag(*blocks), 0)


def _root(covariance: Floats) -> tuple[Floats, Floats]:
    """(unit, inverse) with unit unit^T = covariance on its range."""
    scale = np.sqrt(np.diag(covariance))
    inverse_scale = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    values, vectors = np.linalg.eigh(inverse_scale[:, None] * covariance * inverse_scale)
    keep = values > _NULL * len(values)
    root = vectors[:, keep] * np.sqrt(values[keep])
    inverse = (vectors[:, keep] / np.sqrt(values[keep])).T
    return scale[:, None] * root, inverse * inverse_scale


def moved_by(
    point: Point, problem: Problem, change: Floats | float, conjugate: Floats | float
) -> Point:
    """A displaced point on the same nodes; ``conjugate`` counts entries with their multiplicity."""
    conjugate = conjugate / problem.pairs.multiplicity
    return point._replace(m=point.m + change, conjugate=point.conjugate + conjugate)


def gradient(
    point: Point, problem: Problem, change: Floats | float = 0.0, conjugate: Floats | float = 0.0
) -> Floats:
    """(dF/dm, dF/dl) at a displaced point, on the same nodes; l are entries with multiplicity."""
    moved = moved_by(point, problem, change, conjugate)
    found = [
        derivatives(cloud, unit, second=False)
        for cloud, unit in zip(moved.clouds, units(moved, problem), strict=True)
    ]
    _, slope = _data_slope(jnp.asarray(moved.m), problem.data, problem.pairs)
    pulled = problem.reads.T @ np.concatenate([f.slope for f in found])
    slope_m = np.asarray(slope) + problem.pairs.multiplicity * moved.conjugate - pulled
    return np.concatenate([slope_m, moved.m - np.concatenate([f.mean for f in found])])


def thinned(point: Point) -> Point:
    """A point on fewer particles, for what needs many evaluations and little accuracy."""
    clouds: list[Cloud] = []
    for cloud in point.clouds:
        if isinstance(cloud, Particles) and len(cloud.z) > _THINNED:
            stride = len(cloud.z) // _THINNED
            cloud = Particles(cloud.z[::stride], cloud.log_weight[::stride] + np.log(stride), 0.0)
        clouds.append(cloud)
    return point._replace(clouds=tuple(clouds))


def completed(point: Point, core: Problem, problem: Problem) -> Point:
    """A solution for the entries that are read, with those that follow from it."""
    m = np.zeros((problem.size, problem.size))
    for at, group in zip(laws(point, core), core.groups, strict=True):
        m[np.ix_(group.sites, group.sites)] = (at.phi * at.weights[:, None]).T @ at.phi
    follow = entries(m, problem)
    if point.symmetric:
        follow = np.where(problem.parity, 0, follow)
    solved = entries(matrix(1.0 + 0 * point.m, core), problem) > 0
    return point._replace(
        m=np.where(solved, entries(matrix(point.m, core), problem), follow),
        conjugate=entries(matrix(point.conjugate, core), problem),
    )


def correction_slope(m: Floats, problem: Problem, *, lazy: bool) -> Floats:
    """Gradient in m of 1/2 sum_o ln det S_o, with the data energy where data act at order 1/N only."""
    value = _correction_slope(jnp.asarray(m), problem.data, problem.pairs, lazy)
    return np.asarray(value)


def assemble(m: jax.Array, data: Data, index: Pairs) -> jax.Array:
    """C of shape (T, P, T, P) from the entries solved for, zero elsewhere."""
    shape = np.shape(data.map_.input)
    C = jnp.zeros((shape[0] * shape[1],) * 2).at[index.first, index.second].set(m)
    return C.at[index.second, index.first].set(m).reshape(shape)


@partial(jax.jit, static_argnums=3)
def _correction_slope(m: jax.Array, data: Data, index: Pairs, lazy: bool) -> jax.Array:
    def correction(m: jax.Array) -> jax.Array:
        C = assemble(m, data, index)
        return output_log_determinant(C, data) + lazy * data_energy(C, data)

    return jax.grad(correction)(m)


def _energy(m: jax.Array, data: Data, index: Pairs) -> jax.Array:
    return data_energy(assemble(m, data, index), data)


_data_slope = jax.jit(jax.value_and_grad(_energy))
_data_hessian = jax.jit(jax.hessian(_energy))


def flip(point: Point, problem: Problem, signs: NDArray[np.int64]) -> Point:
    """h[t] -> s_t h[t] for odd phi; ``signs`` (T,)."""
    patterns = np.shape(problem.data.map_.input)[1]
    at = np.repeat(signs, patterns).astype(np.float64)
    both = at[:, None] * at
    clouds: list[Cloud] = []
    for cloud, group in zip(point.clouds, problem.groups, strict=True):
        pivots, sites = at[group.pivots], at[group.sites]
        if isinstance(cloud, Grid):
            clouds.append(cloud._replace(h=cloud.h * pivots, phi=cloud.phi * sites))
        else:
            clouds.append(cloud._replace(z=cloud.z * pivots))
    return point._replace(
        m=entries(both * matrix(point.m, problem), problem),
        conjugate=entries(both * matrix(point.conjugate, problem), problem),
        clouds=tuple(clouds),
    )


def kernel_of(point: Point, problem: Problem) -> Floats:
    """C of shape (T, P, T, P); between groups the product of means, which is zero for odd phi."""
    C = matrix(point.m, problem)
    if len(problem.groups) > 1 and not problem.phi.odd and _is_positive(point.m, problem):
        mean = np.zeros(len(C))
        for at, group in zip(laws(point, problem), problem.groups, strict=True):
            mean[group.sites] = at.weights @ at.phi
        C = np.where(problem.apart, np.outer(mean, mean), C)
    return C.reshape(np.shape(problem.data.map_.input))


def _is_positive(m: Floats, problem: Problem) -> bool:
    """Whether K is positive definite, which it may not be where a solver broke down."""
    try:
        return all(np.all(np.isfinite(np.linalg.cholesky(K))) for K in pivot_kernels(m, problem))
    except np.linalg.LinAlgError:
        return False
