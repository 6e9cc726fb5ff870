r"""How well are means known from correlated draws? Effective draws, standard errors and R-hat of many quantities at once.

The definitions of Vehtari, Gelman, Simpson, Carpenter, Buerkner (2021) as ArviZ computes them, whose loop over quantities
takes too long for half a million kernel entries. Arrays are (chain, draw, n): n quantities.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import ndtri
from scipy.stats import rankdata

Floats = NDArray[np.float64]

# Numbers held at a time.
_PIECE = 2**22
# Tails are the draws beyond these quantiles; offset of normal scores (Blom, 1958).
_TAILS, _BLOM = (0.05, 0.95), 3 / 8


def by_pieces(
    measure: Callable[[Floats], Floats], values: NDArray[np.floating], columns: NDArray[np.int64]
) -> Floats:
    """Measures (k, n) of the chosen columns of values (chain, draw, ...), some of them at a time in double precision."""
    flat = values.reshape(*values.shape[:2], -1)
    count = max(1, len(columns) * flat.shape[0] * flat.shape[1] // _PIECE)
    parts = np.array_split(columns, count)
    return np.concatenate([measure(flat[:, :, p].astype(np.float64)) for p in parts], axis=-1)


def distinct(size: int) -> NDArray[np.int64]:
    """Positions of the entries on and above the diagonal among all of a (size, size) matrix, row by row."""
    first, second = np.triu_indices(size)
    return np.asarray(first * size + second, np.int64)


def kernel_moments(kernel: NDArray[np.floating]) -> Floats:
    """`moments` of every entry of kernels (chain, draw, T, P, T, P), shape (4, T, P, T, P)."""
    shape, size = kernel.shape[2:], kernel.shape[2] * kernel.shape[3]
    entries, out = distinct(size), np.empty((4, size, size))
    first, second = np.divmod(entries, size)
    out[:, first, second] = out[:, second, first] = by_pieces(moments, kernel, entries)
    return out.reshape(4, *shape)


def mean_and_error(values: NDArray[np.floating]) -> tuple[Floats, Floats, Floats]:
    """Mean of each quantity, its Monte-Carlo standard error and effective number of draws, (...) of (chain, draw, ...)."""
    shape = values.shape[2:]
    mean, _, error, ess = by_pieces(moments, values, np.arange(int(np.prod(shape))))
    return mean.reshape(shape), error.reshape(shape), ess.reshape(shape)


def moments(x: Floats) -> Floats:
    """Mean, standard deviation, error of the mean and effective draws for it, (4, n).

    A constant has no Monte-Carlo error, and as many effective draws as draws. Chains of one draw are independent of each
    other: networks trained one by one.
    """
    count = x.shape[0] * x.shape[1]
    ess = effective_draws(_split(x)) if x.shape[1] > 1 else np.full(x.shape[2], float(count))
    std, constant = x.std((0, 1)), (np.ptp(x, axis=(0, 1)) == 0) & (count > 1)
    error = std * np.sqrt(count / (count - 1) / ess) if count > 1 else np.full_like(std, np.nan)
    return np.array(
        [x.mean((0, 1)), std, np.where(constant, 0.0, error), np.where(constant, count, ess)]
    )


def trust(x: Floats) -> Floats:
    """Effective draws in bulk and tails, and rank-normalised R-hat, (3, n).

    What is constant over all chains is known, not badly sampled.
    """
    halves = _split(x)
    ranked = _normal_scores(halves)
    tails = [
        effective_draws(_split((x <= np.quantile(x, tail, axis=(0, 1))).astype(np.float64)))
        for tail in _TAILS
    ]
    r_hat = np.full(x.shape[2], np.nan)
    if len(x) > 1:
        folded = np.abs(halves - np.median(halves, axis=(0, 1)))
        r_hat = np.maximum(_r_hat(ranked), _r_hat(_normal_scores(folded)))
    out = np.array([effective_draws(ranked), np.minimum(*tails), r_hat])
    out[:, ~np.isfinite(x).all((0, 1))] = np.nan
    constant = np.ptp(x, axis=(0, 1)) == 0
    return np.where(constant, np.array([[np.inf], [np.inf], [1.0]]), out)


def rank_r_hat(x: Floats) -> Floats:
    """Rank-normalised R-hat of whole chains, (n,)."""
    return _r_hat(_normal_scores(x))


def effective_draws(x: Floats) -> Floats:
    """Draws divided by the autocorrelation time, by Geyer's initial monotone sequence; (n,)."""
    chains, draws, n = x.shape
    rho = _autocorrelation(x)
    kept, even, odd = np.zeros((draws, n)), np.ones(n), rho[1]
    kept[:2] = rho[:2]
    # Pairs of neighbours are taken until their sum is negative.
    positive, last = np.ones(n, bool), np.full(n, -1)
    for t in range(1, draws - 3, 2):
        positive = positive & (even + odd > 0)
        if not positive.any():
            break
        even, odd = (
            np.where(positive, new, old) for new, old in ((rho[t + 1], even), (rho[t + 2], odd))
        )
        kept[t + 1 : t + 3] = np.where(positive & (even + odd >= 0), [even, odd], 0.0)
        last[positive] = t
    every = np.arange(n)
    kept[last + 1, every] = np.where(even > 0, even, kept[last + 1, every])
    for t in range(1, int(last.max(initial=-1)) - 1, 2):
        mean = (kept[t - 1] + kept[t]) / 2
        grows = (t <= last - 2) & (kept[t + 1] + kept[t + 2] > 2 * mean)
        kept[t + 1 : t + 3] = np.where(grows, mean, kept[t + 1 : t + 3])
    summed = np.arange(draws)[:, None] <= last
    time = -1 + 2 * np.sum(np.where(summed, kept, 0.0), axis=0) + kept[last + 1, every]
    count = chains * draws
    ess = count / np.maximum(time, 1 / np.log10(count))
    ess[np.isnan(kept).any(0)] = np.nan
    ess[np.ptp(x, axis=(0, 1)) < np.finfo(np.float64).resolution] = count
    return np.asarray(ess)


def _autocorrelation(x: Floats) -> Floats:
    """Of all chains together, with what their means differ by; (draws, n)."""
    draws = x.shape[1]
    centred = x - x.mean(1, keepdims=True)
    length = next_fast_len(2 * draws, real=True)
    power = np.abs(rfft(centred, length, axis=1)) ** 2
    covariance = irfft(power.mean(0), length, axis=0)[:draws] / draws
    within = covariance[0] * draws / (draws - 1)
    total = covariance[0] + (np.var(x.mean(1), axis=0, ddof=1) if len(x) > 1 else 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = 1 - (within - covariance) / total
    rho[0] = 1.0
    return np.asarray(rho)


def _split(x: Floats) -> Floats:
    """Both halves of every chain as chains."""
    half = x.shape[1] // 2
    return np.concatenate([x[:, :half], x[:, -half:]])


def _normal_scores(x: Floats) -> Floats:
    count = x.shape[0] * x.shape[1]
    ranks = rankdata(x.reshape(count, -1), axis=0)
    return np.asarray(ndtri((ranks - _BLOM) / (count - 2 * _BLOM + 1)).reshape(x.shape))


def _r_hat(x: Floats) -> Floats:
    draws = x.shape[1]
    between = draws * np.var(x.mean(1), axis=0, ddof=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = between / np.var(x, axis=1, ddof=1).mean(0)
    return np.asarray(np.sqrt((ratio + draws - 1) / draws))
