"""What are draws compared with? Theory with its finite-width scale, or other draws with their error."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xarray as xr

from bayeskernel.errors import InputError
from bayeskernel.inference.convergence import kernel_moments, mean_and_error
from bayeskernel.inference.diagnose import gauge_fixed
from bayeskernel.inference.record import check_draws, problem, settings, trained_networks
from bayeskernel.inference.settled import ENOUGH_NETWORKS, unsettled
from bayeskernel.meanfield.fluctuations import FluctuationError
from bayeskernel.meanfield.solve import MeanField
from bayeskernel.network import Network
from bayeskernel.problem import Floats
from bayeskernel.tasks import Task

# Error bars of a mean need about this many effective draws to be worth their name.
ENOUGH_DRAWS = 100
# Sites up to which theory is asked for standard deviations: seconds there, more than a minute at a thousand.
_SPREAD = 256


@dataclass(frozen=True, eq=False)
class Drawn:
    """Means of draws in the place of theory.

    Attributes
    ----------
    draws
        From `bayeskernel.sample`, `bayeskernel.train` or `bayeskernel.measure`.
    network, task
        Theirs.
    kernel, output
        Means after sign alignment, (T, P, T, P) and (T, P, O).
    monte_carlo_error, kernel_spread
        Standard error and standard deviation of the kernel, (T, P, T, P).
    smallest_ess
        Fewest effective draws of an entry.
    """

    draws: xr.DataTree
    network: Network
    task: Task
    kernel: Floats
    output: Floats
    monte_carlo_error: Floats
    kernel_spread: Floats
    smallest_ess: float


def drawn(draws: xr.DataTree) -> Drawn:
    """Draws as a reference."""
    check_draws(draws)
    kernels, outputs, *_ = gauge_fixed(draws)
    mean, spread, error, ess = kernel_moments(kernels)
    output = mean_and_error(outputs)[0]
    return Drawn(draws, *problem(draws), mean, output, error, spread, float(ess.min()))


def source(draws: xr.DataTree) -> str:
    """What draws are, for a verdict."""
    networks = trained_networks(draws)
    if not networks:
        return "samples"
    made = settings(draws)
    left_out = len(made.get("left_out", ()))
    rest = f" ({left_out} more diverged, left out)" if left_out else ""
    if made["space"] == "trained":
        return f"{networks} networks trained by {made['optimizer']}{rest}"
    return f"{networks} {made['space']} networks{rest}"


def descends(draws: xr.DataTree) -> bool:
    """Whether networks were trained towards something else than the posterior, of which theory does not speak."""
    made = settings(draws)
    if made.get("space") != "trained":
        return False
    return bool(made["optimizer"] != "langevin" or made["weight_decay"] != 1)


def unfit(draws: xr.DataTree, smallest_ess: float) -> str:
    """Why the posterior's mean is not known from draws; nothing where it is, or is not what they are after."""
    networks = trained_networks(draws)
    if networks and not descends(draws):
        return "; ".join(f"{source(draws)}: {why}" for why in unsettled(draws))
    if networks or smallest_ess >= ENOUGH_DRAWS:
        return ""
    return (
        f"{smallest_ess:.0f} effective draws for the slowest kernel entry, {ENOUGH_DRAWS} are needed for error "
        f"bars; draw more samples"
    )


def check_networks(argument: str, draws: xr.DataTree) -> None:
    """Refuse networks that are too few to have a spread."""
    if 0 < trained_networks(draws) < ENOUGH_NETWORKS:
        expected = f"at least {ENOUGH_NETWORKS} networks, whose spread gives the error"
        raise InputError(argument, expected, trained_networks(draws))


class FiniteWidth(NamedTuple):
    """What width does to each entry: its standard deviation, the size of its 1/N shift, and whether that is from the draws."""

    std: Floats
    shift: Floats
    from_draws: bool


def finite_width(reference: MeanField | Drawn, spread: Floats) -> FiniteWidth:
    """Standard deviation of each entry and size of its 1/N shift, from theory where it has them.

    Where it does not (large kernels, saddles), the draws' spread gives the order of magnitude:
    variance over the size of the entry's diagonal, which is of order 1/N as the shift is. Draws of the same
    network have no such shift.
    """
    variance = spread**2
    if isinstance(reference, Drawn):
        return FiniteWidth(reference.kernel_spread, np.zeros_like(variance), False)
    std = np.full_like(variance, np.nan)
    if variance.shape[0] * variance.shape[1] <= _SPREAD:
        with suppress(FluctuationError):
            std = reference.kernel_std()
    try:
        return FiniteWidth(std, np.abs(reference.kernel_shift()), False)
    except FluctuationError:
        size = np.sqrt(np.einsum("tata->ta", reference.kernel))
        scale = np.einsum("ta,sb->tasb", size, size)
        shift = np.divide(variance, scale, out=np.zeros_like(variance), where=scale > 0)
        return FiniteWidth(std, shift, True)
