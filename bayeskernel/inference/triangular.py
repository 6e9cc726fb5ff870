"""Cholesky factors, their adjoints, and rows and columns of matrices at known places, for compiled code."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax.linalg import cholesky, triangular_solve


def factor(covariance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """L of covariance = L L^T, from its lower half, and L^-1."""
    if covariance.shape == (1, 1):  # a LAPACK call costs more than a whole step of a small task
        root = jnp.sqrt(covariance)
        return root, 1 / root
    root = cholesky(covariance, symmetrize_input=False)
    identity = jnp.eye(len(root), dtype=root.dtype)
    return root, triangular_solve(root, identity, left_side=True, lower=True)


def factor_adjoint(root: jax.Array, inverse: jax.Array, of_root: jax.Array) -> jax.Array:
    """Symmetric adjoint of the covariance from that of its factor, of which the lower half counts."""
    if root.shape == (1, 1):
        return of_root * inverse / 2
    lower = jnp.tril(root.T @ of_root)
    half = inverse.T @ (lower - jnp.diag(jnp.diagonal(lower)) / 2) @ inverse
    return (half + half.T) / 2


def pick(matrix: jax.Array, index: Sequence[int], axis: int = 0) -> jax.Array:
    """Rows or columns; a slice where they are neighbours, which costs less than a gather."""
    if not len(index):
        return jax.lax.slice_in_dim(matrix, 0, 0, axis=axis)
    first, count = index[0], len(index)
    if list(index) == list(range(first, first + count)):
        return jax.lax.slice_in_dim(matrix, first, first + count, axis=axis)
    return jnp.take(matrix, np.array(index), axis=axis)


def place(matrix: jax.Array, index: Sequence[int], size: int, axis: int) -> jax.Array:
    """Rows or columns put at places among ``size``; zeros elsewhere."""
    places = np.full(size, len(index))
    places[list(index)] = np.arange(len(index))
    widths = [(0, 0), (0, 0)]
    widths[axis] = (0, int(len(index) < size))
    return pick(jnp.pad(matrix, widths), places.tolist(), axis)
