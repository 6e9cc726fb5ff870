r"""The posterior over pre-activations: weights integrated out exactly, at any width.

Given C, the N units are independent Gaussians with covariance K(C), and K at a step needs C at earlier
steps only (docs/theory, section 2H). With standard normal z[t] the map

    h[t] = K[t,<t] K[<t,<t]^-1 h[<t] + chol(K[t,t] - K[t,<t] K[<t,<t]^-1 K[<t,t]) z[t]

carries N(0, 1) to the prior of the network, so the density to sample is

    N(z; 0, 1)  prod_o N(y_o; 0, S(C(z)) / N)        (standard scaling: S in place of S / N)

in N T P dimensions instead of N^2. The readout is integrated out too; outputs are drawn from their exact
conditional distribution afterwards. Where K is singular (duplicate patterns, more patterns than the
directions inputs and earlier units can reach) a step keeps only *pivots*: sites whose innovations are
linearly independent. The other sites follow from them without error, and no jitter is added.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.linalg import cho_solve, solve_triangular
from numpy.typing import NDArray

from bayeskernel.activations import Activation
from bayeskernel.kernels import (
    KernelMap,
    Supervision,
    kernel_map,
    output_covariances,
    preactivation_kernel,
    representational_kernel,
    supervision,
)
from bayeskernel.network import Network
from bayeskernel.tasks import Task

Floats = NDArray[np.float64]

# A site whose innovation variance falls below this share of its variance follows from the others.
# Rounding errors of a conditional variance grow as the machine's over the root of the share.
PIVOT_TOLERANCE = {np.dtype(np.float32): 1e-4, np.dtype(np.float64): 1e-8}


class Coordinates(NamedTuple):
    """The static part of the model.

    Attributes
    ----------
    width, phi, mean_field
        Width, activation and scaling of the network.
    pivots
        For every step the patterns whose innovations are linearly independent.
    """

    width: int
    phi: Activation
    mean_field: bool
    pivots: tuple[tuple[int, ...], ...]

    @property
    def rank(self) -> int:
        """Rows of z."""
        return sum(len(p) for p in self.pivots)


def coordinates(network: Network, pivots: tuple[tuple[int, ...], ...] = ()) -> Coordinates:
    """Collect the static part of a network; drawing a readout needs no pivots."""
    mean_field = network.scaling == "mean_field"
    return Coordinates(network.width, network.phi, mean_field, pivots)


class Data(NamedTuple):
    """What can change without compiling again, sharing included.

    Attributes
    ----------
    map_, supervised
        Definitions of K and S, supervised targets.
    readout
        Label of the readout weights of every step, shape (T,).
    """

    map_: KernelMap
    supervised: Supervision
    readout: jax.Array


def data(network: Network, task: Task) -> Data:
    """Collect the arrays of a network on a task, in the caller's default float type."""
    map_ = KernelMap(*(jnp.asarray(a, float) for a in kernel_map(network, task)))
    given = supervision(task)
    return Data(
        map_,
        Supervision(given.sites, *(jnp.asarray(a, float) for a in given[1:])),  # type: ignore[arg-type]
        jnp.asarray(network.labels(task.shape[0]).readout),
    )


def preactivations(z: jax.Array, at: Coordinates, given: Data) -> jax.Array:
    """Map z of shape (rank, N) to h of shape (T, P, N)."""
    return unfold(z, at, given)[0]


def unfold(z: jax.Array, at: Coordinates, given: Data) -> tuple[jax.Array, jax.Array]:
    """Map z of shape (rank, N) to h of shape (T, P, N) and C of shape (T, P, T, P)."""
    steps, patterns = given.map_.input.shape[:2]
    # Lists, joined where a product needs them: the adjoint of slicing one array would add padded ones.
    noise = jnp.split(z, np.cumsum([len(p) for p in at.pivots])[:-1])
    activities: list[jax.Array] = []
    overlaps = jnp.zeros((patterns, 0), z.dtype)  # C[t - 1, <t]
    factor, used = jnp.zeros((0, 0), z.dtype), 0
    out, lower = [], []
    sites: list[int] = []  # pivots of earlier steps, as flat sites
    for t in range(steps):
        own = slice(t * patterns, (t + 1) * patterns)
        rows = _preactivation_rows(overlaps, t, given.map_)
        past = solve_triangular(factor, rows[:, np.array(sites, int)].T, lower=True).T
        conditional = rows[:, own] - past @ past.T
        pivots = list(at.pivots[t])
        innovation = _root(conditional, pivots)
        count = len(pivots)
        h = innovation @ noise[t]
        if used:
            h = h + past @ jnp.concatenate(noise[:t])
        factor = jnp.block(
            [
                [factor, jnp.zeros((used, count), z.dtype)],
                [past[np.array(pivots, int)], innovation[np.array(pivots, int)]],
            ]
        )
        sites += [own.start + a for a in pivots]
        used += count
        activities.append(at.phi(h))
        # Plain products of matrices: contractions over more axes cost XLA three times as much.
        overlaps = activities[-1] @ jnp.concatenate(activities).T / at.width
        out.append(h)
        lower.append(jnp.pad(overlaps, ((0, 0), (0, (steps - t - 1) * patterns))))
    blocks = jnp.concatenate(lower)
    earlier = np.kron(np.tri(steps, k=-1), np.ones((patterns, patterns))).astype(bool)
    kernel = jnp.where(earlier.T, blocks.T, blocks)
    return jnp.stack(out), kernel.reshape(steps, patterns, steps, patterns)


def _preactivation_rows(overlaps: jax.Array, t: int, map_: KernelMap) -> jax.Array:
    """K[t, <=t], shape (P, (t + 1) P), from C[t - 1, <t] of shape (P, t P)."""
    patterns = map_.input.shape[1]
    rows = jnp.asarray(map_.input)[t, :, : t + 1]
    if t:
        mask = map_.recurrent[t, 0, 1 : t + 1, 0][:, None]
        rows = rows.at[:, 1:].add(mask * overlaps.reshape(patterns, t, patterns))
    return rows.reshape(patterns, -1)


def _root(covariance: jax.Array, pivots: list[int]) -> jax.Array:
    """A with A A^T = covariance and as many columns as pivots; Cholesky where all sites are pivots."""
    if covariance.shape == (1, 1) and pivots:
        return jnp.sqrt(covariance)  # a LAPACK call costs more than a whole step of a small task
    if len(pivots) == covariance.shape[0]:
        return jnp.linalg.cholesky(covariance)
    index = np.array(pivots, int)
    factor = jnp.linalg.cholesky(covariance[index][:, index])
    return solve_triangular(factor, covariance[index], lower=True).T


def find_pivots(rng_key: jax.Array, network: Network, task: Task) -> tuple[tuple[int, ...], ...]:
    """Choose pivots along one prior draw of the network, in float64.

    Which directions are null depends on inputs, sharing, activation and width but, except on a set of
    measure zero, not on the draw.
    """
    tolerance = PIVOT_TOLERANCE[np.dtype(jnp.asarray(0.0).dtype)]
    steps, patterns = task.shape[:2]
    size = steps * patterns
    activities = np.zeros((steps, patterns, network.width))
    h = np.zeros((0, network.width))
    pivots, sites = list[tuple[int, ...]](), np.zeros(0, np.int64)
    with jax.enable_x64(True):
        map_ = kernel_map(network, task)
        for t, key in enumerate(jax.random.split(rng_key, steps)):
            C = representational_kernel(jnp.asarray(activities))
            K = np.asarray(preactivation_kernel(C, map_)).reshape(size, size)
            own = np.arange(t * patterns, (t + 1) * patterns)
            gain = np.linalg.solve(K[np.ix_(sites, sites)], K[np.ix_(sites, own)]).T
            conditional = K[np.ix_(own, own)] - gain @ K[np.ix_(sites, own)]
            chosen, root = pivoted_cholesky(conditional, tolerance * np.diag(K)[own])
            noise = np.asarray(jax.random.normal(key, (len(chosen), network.width)))
            now = gain @ h[sites] + root @ noise
            h = np.concatenate([h, now])
            activities[t] = np.asarray(network.phi(jnp.asarray(now)))
            pivots.append(tuple(chosen))
            sites = np.concatenate([sites, own[chosen]])
    return tuple(pivots)


def pivoted_cholesky(covariance: Floats, smallest: Floats) -> tuple[list[int], Floats]:
    """Choose sites greedily until none has more than ``smallest`` variance left.

    Returns the chosen sites, sorted, and the root A (sites, chosen) with A A^T = covariance up to the
    variance left.
    """
    left, pivots = covariance.copy(), list[int]()
    while len(pivots) < len(left):
        excess = np.diag(left) - smallest
        excess[pivots] = -np.inf
        best = int(
            np.argmax(np.where(smallest > 0, excess / np.maximum(smallest, 1e-300), -np.inf))
        )
        if not excess[best] > 0 or smallest[best] == 0:
            break
        pivots.append(best)
        left = left - np.outer(left[best], left[best]) / left[best, best]
    pivots.sort()
    factor = np.linalg.cholesky(covariance[np.ix_(pivots, pivots)])
    return pivots, np.linalg.solve(factor, covariance[pivots]).T


def log_evidence(kernel: jax.Array, at: Coordinates, given: Data) -> jax.Array:
    """Ln p(y | C): sum over outputs of N(y_o; 0, S_o / N), up to constants of the noise."""
    factors, scaled = _whitened_targets(kernel, given)
    count = at.width if at.mean_field else 1
    log_det = jnp.sum(jnp.log(jnp.diagonal(factors, axis1=-2, axis2=-1)))
    return -count / 2 * jnp.sum(scaled**2) - log_det


def _whitened_targets(kernel: jax.Array, given: Data) -> tuple[jax.Array, jax.Array]:
    factors = jnp.linalg.cholesky(output_covariances(kernel, given.map_, given.supervised))
    solve = jax.vmap(lambda L, y: solve_triangular(L, y, lower=True))
    return factors, solve(factors, jnp.asarray(given.supervised.targets).T)


def model(at: Coordinates, given: Data) -> None:
    """Define the NumPyro model: z of shape (rank, N), and the evidence of its kernel."""
    z = numpyro.sample("z", dist.Normal(0, 1).expand((at.rank, at.width)).to_event(2))
    _, kernel = unfold(z, at, given)
    numpyro.deterministic("kernel", kernel)
    numpyro.factor("targets", log_evidence(kernel, at, given))


def kernel_of(activities: jax.Array, at: Coordinates) -> jax.Array:
    """C of shape (T, P, T, P); activities may be given in fewer columns than units, see kernel_space."""
    return representational_kernel(activities) * (activities.shape[-1] / at.width)


def draw_readout(
    rng_key: jax.Array, activities: jax.Array, at: Coordinates, given: Data
) -> jax.Array:
    """Draw readout weights v given activities (T, P, N) and targets; shape (T, O, N), one row a label.

    Matheron's rule: a prior draw, corrected by what it misses of the targets,
    v_l = v0_l + c sum_{supervised (t,a), label l} [S^-1 (y - y0)]_(t,a) phi[t,a], with c = sv^2 in
    mean-field and sv^2 / sqrt(N) in standard scaling. Rows beyond the number of labels are not used: with
    as many as steps, all sharing patterns run the same code.
    """
    steps, patterns, columns = activities.shape
    given_at = given.supervised
    key_readout, key_noise = jax.random.split(rng_key)
    variance = given.map_.readout[0, 0, 0, 0]
    shape = (steps, given_at.targets.shape[1], columns)
    v0 = jnp.sqrt(variance) * jax.random.normal(key_readout, shape, activities.dtype)
    site_labels = given.readout[given_at.sites // patterns]
    at_sites = activities.reshape(-1, columns)[given_at.sites]
    f0 = outputs(v0, activities, at, given).reshape(-1, shape[1])[given_at.sites]
    temperature = given.map_.noise / (at.width if at.mean_field else 1)
    y0 = f0 + jnp.sqrt(temperature) * jax.random.normal(key_noise, f0.shape, f0.dtype)
    factors, _ = _whitened_targets(kernel_of(activities, at), given)
    missed = (given_at.mask * (given_at.targets - y0)).T
    dual = jax.vmap(lambda L, b: cho_solve((L, True), b))(factors, missed).T * given_at.mask
    gain = variance if at.mean_field else variance / np.sqrt(at.width)
    change = dual[:, :, None] * at_sites[:, None, :]
    return v0 + gain * jax.ops.segment_sum(change, site_labels, steps)


def outputs(v: jax.Array, activities: jax.Array, at: Coordinates, given: Data) -> jax.Array:
    """F of shape (T, P, O) from readout weights (T, O, N), one row a label."""
    norm = at.width if at.mean_field else np.sqrt(at.width)
    return jnp.einsum("tai,toi->tao", activities, v[given.readout]) / norm
