"""Where do descents start? At the prior or close to the minimum it leads to, or at a solution extended to more patterns.

A law's nodes are chosen here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bayeskernel.meanfield import grid, particles
from bayeskernel.meanfield.laws import Gaussian, Nodes
from bayeskernel.meanfield.prior import prior_recursion
from bayeskernel.meanfield.saddle import Point, inside
from bayeskernel.meanfield.sites import Sites, groups, read_blocks
from bayeskernel.meanfield.whitened import near_minimum
from bayeskernel.problem import Floats, Problem

# Fewest and most particles while a solution is looked for, and how many for each of their statistics.
_PARTICLES = (4096, 16384)
_PER_STATISTIC = 5
# Linear networks of more sites start close to a minimum.
_LARGE = 256


def prior_point(problem: Problem, rng: np.random.Generator) -> Point:
    """The prior, where Ct = 0."""
    C = prior_recursion(problem)
    K = problem.preactivation_kernel(C)
    nodes = [_nodes(sites, K[sites.block], rng) for sites in groups(problem)]
    return Point(C, np.zeros_like(C), tuple(nodes), symmetric=True)


def first_point(
    problem: Problem,
    rng: np.random.Generator,
    report: Callable[[int, float], None] | None = None,
) -> Point:
    """The prior; for a large linear network, where one can be had, a point close to the minimum that the prior leads to."""
    point = prior_point(problem, rng)
    large = problem.phi.linear and problem.mean_field and problem.size > _LARGE
    reached = near_minimum(problem, report) if large else None
    if reached is None:
        return point
    C, Ct = reached
    even, read = (problem.over_sites(b) for b in (problem.even, read_blocks(problem)))
    near = point._replace(C=np.where(even, C, 0), Ct=np.where(even & read, Ct, 0))
    return near if inside(problem, near) else point


def extended_point(problem: Problem, C: Floats, Ct: Floats, h: Floats, *, symmetric: bool) -> Point:
    """A point at kernels (d, d) with draws of q, (M, d), none for linear phi; one group where activities have a mean."""
    if not problem.phi.linear:
        phi = problem.phi.values(h)
        # C of the draws is positive definite, as a mixture with more exact entries need not be.
        C = phi.T @ phi / len(phi)
    if symmetric:
        even = np.asarray(problem.over_sites(problem.even))
        C, Ct = np.where(even, C, 0), np.where(even, Ct, 0)
    K = problem.preactivation_kernel(C)
    nodes = [
        _nodes_of_draws(sites, h[:, sites.members], K[sites.block], Ct[sites.block])
        for sites in groups(problem, joined=not problem.phi.odd)
    ]
    return Point(C, Ct, tuple(nodes), symmetric)


def _nodes(sites: Sites, K: Floats, rng: np.random.Generator) -> Nodes:
    if sites.phi.linear:
        return Gaussian(sites)
    if len(sites.pivots) <= grid.DIMENSIONS:
        return grid.matched(sites, K[np.ix_(sites.pivots, sites.pivots)])
    count = _PER_STATISTIC * len(sites.entries.first)
    return particles.from_prior(sites, int(np.clip(count, *_PARTICLES)), rng)


def _nodes_of_draws(sites: Sites, h: Floats, K: Floats, Ct: Floats) -> Nodes:
    if sites.phi.linear:
        return Gaussian(sites)
    if len(sites.pivots) > grid.DIMENSIONS:
        return particles.from_draws(sites, h, K, Ct)
    pivotal = h[:, sites.pivots]
    return grid.matched(sites, pivotal.T @ pivotal / len(h))
