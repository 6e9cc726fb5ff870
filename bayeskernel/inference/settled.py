"""Has training come to its end? Judged on the norms of the kernel's blocks along training, which no symmetry moves.

Langevin: on the second half of training the networks must have forgotten their starts, each having seen what the others see.
Were x the share of a norm's variance that lies between the networks' means over that half, of length L, R-hat is about
1 / sqrt(1 - x), and x = 2 tau / L for a relaxation time tau: R-hat below 1.2 asks for some seven of them, as long as which the
networks had to settle before. A drift that all share shows in the change of every network between the last two quarters.
Descent: norms averaged over networks must stay where they are over the last quarter.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import t as student

from bayeskernel.inference.convergence import rank_r_hat
from bayeskernel.inference.record import settings

Floats = NDArray[np.float64]

R_HAT = 1.2
# Change of a norm's mean from the third quarter of training to the last, relative to its size.
MOVED = 0.01
# Chance that networks without a drift are said to have one.
FALSE_ALARM = 1e-4
# Trained networks whose spread gives an error.
ENOUGH_NETWORKS = 3
# Rate times curvature beyond which Langevin's bias may be as large as what is to be measured.
STIFF = 1.0


def unsettled(draws: xr.DataTree) -> tuple[str, ...]:
    """Why training is not at its end, one sentence each; empty where it is, and where nothing is known."""
    if "trace" not in draws.children:
        return ()
    made, trace = settings(draws), draws["trace"].to_dataset()
    norms = trace["norm"].to_numpy().astype(np.float64)
    norms = norms[np.isfinite(norms).all(axis=tuple(range(1, norms.ndim)))]
    nodes = int(np.sqrt(np.prod(norms.shape[2:])))
    norms = norms.reshape(*norms.shape[:2], nodes, nodes)
    progress = trace["training_step"].to_numpy() / made["num_steps"]
    if made["optimizer"] != "langevin":
        return _still_moving(norms, progress)
    found = _not_mixed(norms[:, progress >= 0.5]) or _drifting(norms, progress)
    stiff = made["learning_rate"] * made["curvature"]
    if stiff > STIFF:
        found += (f"learning rate times curvature {stiff:.2g}, at most {STIFF:g} is wanted",)
    return found


def _not_mixed(norms: Floats) -> tuple[str, ...]:
    first, second = np.triu_indices(norms.shape[2])
    if len(norms) < 2:
        return ()
    found = np.nan_to_num(rank_r_hat(norms[:, :, first, second]), nan=1.0)
    k = int(np.argmax(found))
    if found[k] < R_HAT:
        return ()
    where = f"norm[{first[k] + 1},{second[k] + 1}]"
    return (
        f"R-hat {found[k]:.2f} of {where} over the second half of training, below {R_HAT} is needed: train longer",
    )


def _drifting(norms: Floats, progress: Floats) -> tuple[str, ...]:
    first, second = np.triu_indices(norms.shape[2])
    change = (_quarter(norms, progress, 0.75) - _quarter(norms, progress, 0.5))[:, first, second]
    if len(change) < ENOUGH_NETWORKS:
        return ()
    error = change.std(0, ddof=1) / np.sqrt(len(change))
    t = np.abs(change.mean(0)) / np.where(error > 0, error, np.inf)
    k = int(np.argmax(t))
    if t[k] < student(len(change) - 1).isf(FALSE_ALARM / 2 / len(t)):
        return ()
    return (
        f"norm[{first[k] + 1},{second[k] + 1}] drifts: t = {t[k]:.1f} between the last two quarters of training: "
        f"train longer",
    )


def _quarter(norms: Floats, progress: Floats, start: float) -> Floats:
    """Means over a quarter of training."""
    return norms[:, (progress > start) & (progress <= start + 0.25)].mean(1)


def _still_moving(norms: Floats, progress: Floats) -> tuple[str, ...]:
    before, last = (_quarter(norms, progress, start).mean(0) for start in (0.5, 0.75))
    size = np.sqrt(np.diag(last))
    change = (last - before) / np.where(np.outer(size, size) > 0, np.outer(size, size), np.inf)
    t, s = np.unravel_index(np.argmax(np.abs(change)), change.shape)
    if abs(change[t, s]) < MOVED:
        return ()
    return (
        f"norm[{t + 1},{s + 1}] still moves, by {100 * change[t, s]:.2g} % in a quarter of training",
    )
