"""Do samples and theory agree? Entry by entry, with error bars from both sides.

For a kernel entry with sampled mean m, Monte-Carlo standard error e and theory value c,

    z = (m - c) / sqrt(e^2 + s^2 + t^2),

where s is the finite-width scale: the size of the leading 1/N shift of the posterior mean that theory
predicts (docs/theory, "Fluctuations"; estimated from the draws where theory has no fluctuations, see
`FluctuationError`), and t the theory's own Monte-Carlo error. No tolerance enters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import norm

from bayeskernel._arviz import arviz as az
from bayeskernel.errors import instance
from bayeskernel.gauge import aligned, sign_symmetry
from bayeskernel.inference.diagnose import Diagnosis, diagnose
from bayeskernel.inference.record import SITES, check_same_run, kernel_and_output
from bayeskernel.kernels import coherence
from bayeskernel.meanfield.fluctuations import FluctuationError
from bayeskernel.meanfield.solve import MeanField
from bayeskernel.plots import plot_comparison

Floats = NDArray[np.float64]

# Error bars of a mean need about this many effective draws to be worth their name.
ENOUGH_DRAWS = 100
# Chance that a true agreement is called a disagreement, over all entries together.
FALSE_ALARM = 1e-4
# Above this ratio of kernel size to width, corrections beyond the leading one matter.
_NARROW = 0.25


@dataclass(frozen=True, eq=False)
class Comparison:
    """Sampled and analytic kernels of one network on one task, side by side.

    Attributes
    ----------
    draws, theory
        What was compared.
    table
        One row per distinct kernel entry (indexed by step, pattern, other_step, other_pattern):
        sampled, mcse, ess, theory, theory_std (posterior standard deviation at this width; NaN where
        theory has none), finite_width (size of the 1/N shift), z.
    kernel
        Sampled mean kernel after sign alignment, shape (T, P, T, P).
    mcse
        Its Monte-Carlo standard error, same shape.
    z
        z scores, same shape.
    output, output_mcse
        Sampled mean outputs (T, P, O) and their errors, signs aligned likewise.
    frobenius_error
        ‖sampled - theory‖ / ‖theory‖ in Frobenius norm.
    cosine_alignment
        <sampled, theory> / (‖sampled‖ ‖theory‖).
    flipped
        Share of draws whose signs were changed to match theory's.
    """

    draws: xr.DataTree
    theory: MeanField
    table: pd.DataFrame
    kernel: Floats
    mcse: Floats
    z: Floats
    output: Floats
    output_mcse: Floats
    frobenius_error: float
    cosine_alignment: float
    flipped: float

    @property
    def coherence(self) -> tuple[Floats, Floats]:
        """Correlation of steps, (T, T): from samples and from theory."""
        return coherence(self.kernel), coherence(self.theory.kernel)

    @property
    def threshold(self) -> float:
        """Largest absolute z expected of agreeing results, at `FALSE_ALARM` over all entries."""
        return float(norm.isf(FALSE_ALARM / 2 / len(self.table)))

    @property
    def agrees(self) -> bool:
        """Whether every entry agrees, with converged theory and enough effective draws."""
        return (
            self.theory.converged
            and self.table["ess"].min() >= ENOUGH_DRAWS
            and self.table["z"].abs().max() <= self.threshold
        )

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        worst, ess = self.table["z"].abs().max(), self.table["ess"].min()
        if not self.theory.converged:
            return f"Inconclusive: the theory did not converge ({self.theory.result})."
        if not ess >= ENOUGH_DRAWS:
            return (
                f"Inconclusive: {ess:.0f} effective draws for the slowest kernel entry, "
                f"{ENOUGH_DRAWS} are needed for error bars; draw more samples."
            )
        word = "agree" if self.agrees else "DISAGREE"
        return (
            f"Samples and theory {word}: largest |z| = {worst:.1f} over {len(self.table)} kernel "
            f"entries (limit {self.threshold:.1f}), Frobenius error "
            f"{100 * self.frobenius_error:.1f} %{self._caveat()}."
        )

    @cached_property
    def diagnosis(self) -> Diagnosis:
        """Whether the chains can be trusted."""
        return diagnose(self.draws)

    def plot(self) -> np.ndarray:
        """Draw `bayeskernel.plots.plot_comparison`; returns its axes."""
        return plot_comparison(self)

    def _caveat(self) -> str:
        steps, patterns, _, _ = self.theory.task.shape
        ratio = steps * patterns / self.theory.network.width
        shift = np.linalg.norm(self.table["finite_width"])
        share = shift / np.linalg.norm(self.table["theory"])
        if ratio > _NARROW:
            return (
                f"; with d/N = {ratio:.2f} the network is not wide for its task, "
                f"and finite-width shifts ({100 * share:.0f} % here) beyond the leading one count"
            )
        return f"; finite-width shift {100 * share:.2g} %"


def compare(draws: xr.DataTree, theory: MeanField) -> Comparison:
    """Compare posterior draws with the mean-field solution of the same network and task.

    Parameters
    ----------
    draws
        From `bayeskernel.sample`.
    theory
        From `bayeskernel.solve`.

    Raises
    ------
    InputError
        If the draws belong to another network or task, or hold no posterior.
    """
    network, task = instance("theory", theory, MeanField).network, theory.task
    check_same_run(draws, network, task)
    symmetry = sign_symmetry(network, task)
    kernels, outputs, flipped = aligned(*kernel_and_output(draws), theory.kernel, symmetry)
    mean, mcse, ess = mean_and_error(kernels, SITES)
    output, output_mcse, _ = mean_and_error(outputs, ("step", "pattern", "output_unit"))
    std, shift = _finite_width(theory, kernels)
    error = np.sqrt(mcse**2 + shift**2 + theory.monte_carlo_error**2)
    difference = mean - theory.kernel
    # Entries without any error (silent units) agree exactly or not at all.
    z = np.divide(difference, error, out=np.where(difference == 0, 0.0, np.inf), where=error > 0)
    columns = {
        "sampled": mean,
        "mcse": mcse,
        "ess": ess,
        "theory": theory.kernel,
        "theory_std": std,
        "finite_width": shift,
        "z": z,
    }
    return Comparison(
        draws=draws,
        theory=theory,
        table=_table(columns),
        kernel=mean,
        mcse=mcse,
        z=z,
        output=output,
        output_mcse=output_mcse,
        frobenius_error=float(np.linalg.norm(difference) / np.linalg.norm(theory.kernel)),
        cosine_alignment=float(
            np.sum(mean * theory.kernel) / np.linalg.norm(mean) / np.linalg.norm(theory.kernel)
        ),
        flipped=flipped,
    )


def mean_and_error(values: np.ndarray, dims: tuple[str, ...]) -> tuple[Floats, Floats, Floats]:
    """Mean, its Monte-Carlo standard error and effective number of draws, entry by entry."""
    data = xr.Dataset({"x": (("chain", "draw", *dims), values.astype(np.float64))})
    mcse, ess = (f(data, method="mean")["x"].to_numpy() for f in (az.mcse, az.ess))
    # A constant has no Monte-Carlo error, and as many effective draws as draws.
    constant = np.ptp(values, axis=(0, 1)) == 0
    count = values.shape[0] * values.shape[1]
    return (
        values.mean(axis=(0, 1), dtype=np.float64),
        np.where(constant, 0.0, mcse),
        np.where(constant, count, ess),
    )


def _finite_width(theory: MeanField, kernels: Floats) -> tuple[Floats, Floats]:
    """Standard deviation of each entry and size of its 1/N shift, from theory where it has them.

    Where it does not (large kernels, saddles), the draws' own spread gives the order of magnitude:
    variance over the size of the entry's diagonal, which is of order 1/N as the shift is.
    """
    variance = kernels.var(axis=(0, 1))
    try:
        std = theory.kernel_std()
    except FluctuationError:
        std = np.full_like(variance, np.nan)
    try:
        return std, np.abs(theory.kernel_shift())
    except FluctuationError:
        size = np.sqrt(np.einsum("tata->ta", theory.kernel))
        scale = np.einsum("ta,sb->tasb", size, size)
        return std, np.divide(variance, scale, out=np.zeros_like(variance), where=scale > 0)


def _table(columns: dict[str, Floats]) -> pd.DataFrame:
    steps, patterns = next(iter(columns.values())).shape[:2]
    first, second = np.triu_indices(steps * patterns)
    sites = np.array([(t + 1, a) for t in range(steps) for a in range(patterns)])
    index = pd.MultiIndex.from_arrays(
        [*sites[first].T, *sites[second].T],
        names=["step", "pattern", "other_step", "other_pattern"],
    )
    square = (steps * patterns, steps * patterns)
    data = {name: values.reshape(square)[first, second] for name, values in columns.items()}
    return pd.DataFrame(data, index=index)
