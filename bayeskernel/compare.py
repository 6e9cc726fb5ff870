"""Do samples and theory agree? Entry by entry, with error bars from both sides.

For a kernel entry with sampled mean m, Monte-Carlo standard error e and theory value c,

    z = (m - c) / sqrt(e^2 + s^2 + t^2),

where s is the finite-width scale: the size of the leading 1/N shift of the posterior mean that theory
predicts (docs/theory, "Fluctuations"; estimated from the draws where theory has no fluctuations, see
`FluctuationError`), and t the theory's own Monte-Carlo error. No tolerance enters.

Networks that were trained one by one (`bayeskernel.train`, `bayeskernel.measure`) are independent: e is their spread over the
root of their number n, and limits on z are those of Student's t with n - 1 degrees of freedom.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import norm as normal
from scipy.stats import t as student

from bayeskernel.errors import InputError, instance
from bayeskernel.gauge import aligned, sign_symmetry
from bayeskernel.inference.convergence import kernel_moments, mean_and_error
from bayeskernel.inference.diagnose import ENOUGH_NETWORKS, Diagnosis, diagnose
from bayeskernel.inference.record import (
    check_same_run,
    kernel_and_output,
    settings,
    trained_networks,
)
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
# Sites up to which theory is asked for standard deviations: seconds there, more than a minute at a thousand.
_SPREAD = 256


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Sampled and analytic kernels of one network on one task, side by side.

    Attributes
    ----------
    draws, theory
        What was compared.
    kernel
        Sampled mean kernel after sign alignment, shape (T, P, T, P).
    mcse
        Its Monte-Carlo standard error, same shape.
    ess
        Effective draws for it, same shape.
    finite_width
        Size of the 1/N shift of each entry, same shape.
    theory_std
        Posterior standard deviation at this width from theory, same shape; NaN where theory has none and, for
        the time it takes, beyond 256 sites: see `MeanField.kernel_std`.
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
    kernel: Floats
    mcse: Floats
    ess: Floats
    finite_width: Floats
    theory_std: Floats
    z: Floats
    output: Floats
    output_mcse: Floats
    frobenius_error: float
    cosine_alignment: float
    flipped: float

    def __repr__(self) -> str:
        return f"Comparison({self.theory.network}, {self.theory.task})\n{self.verdict}"

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per distinct kernel entry, with the columns sampled, mcse, ess, theory, theory_std, finite_width, z.

        The index is (step, pattern, other_step, other_pattern), of other graphs than chains (node, pattern, ...).
        """
        nodes, patterns = self.kernel.shape[:2]
        first, second = np.triu_indices(nodes * patterns)
        index = pd.MultiIndex.from_arrays(
            [first // patterns + 1, first % patterns, second // patterns + 1, second % patterns],
            names=[self.noun, "pattern", f"other_{self.noun}", "other_pattern"],
        )
        columns = {
            "sampled": self.kernel,
            "mcse": self.mcse,
            "ess": self.ess,
            "theory": self.theory.kernel,
            "theory_std": self.theory_std,
            "finite_width": self.finite_width,
            "z": self.z,
        }
        square = (nodes * patterns, nodes * patterns)
        entries = {name: v.reshape(square)[first, second] for name, v in columns.items()}
        return pd.DataFrame(entries, index=index)

    @cached_property
    def blocks(self) -> pd.DataFrame:
        """One row per pair of steps (nodes): what the table says about the block of the kernel between them.

        Norms of sampled and theory's block and of their difference, largest and root mean square z, fewest effective draws.
        """
        across = (1, 3)

        def norm(kernel: Floats) -> Floats:
            return np.sqrt(np.sum(kernel**2, axis=across))

        columns = {
            "sampled": norm(self.kernel),
            "theory": norm(self.theory.kernel),
            "difference": norm(self.kernel - self.theory.kernel),
            "largest_z": np.abs(self.z).max(across),
            "rms_z": np.sqrt(np.mean(self.z**2, across)),
            "smallest_ess": self.ess.min(across),
        }
        first, second = np.triu_indices(len(self.kernel))
        names = [self.noun, f"other_{self.noun}"]
        index = pd.MultiIndex.from_arrays([first + 1, second + 1], names=names)
        return pd.DataFrame({k: v[first, second] for k, v in columns.items()}, index=index)

    @property
    def noun(self) -> str:
        """What a node of the network is called, "step" or "node"."""
        return self.theory.network.graph_of(self.theory.task.shape[0]).noun

    @cached_property
    def networks(self) -> int:
        """Number of networks trained one by one that are compared; zero for draws of chains."""
        return trained_networks(self.draws)

    @property
    def entries(self) -> int:
        """Number of distinct kernel entries."""
        size = self.kernel.shape[0] * self.kernel.shape[1]
        return size * (size + 1) // 2

    @property
    def largest_z(self) -> float:
        """Largest absolute z."""
        return float(np.abs(self.z).max())

    @property
    def smallest_ess(self) -> float:
        """Fewest effective draws of any entry."""
        return float(np.min(self.ess))

    @property
    def coherence(self) -> tuple[Floats, Floats]:
        """Correlation of steps, (T, T): from samples and from theory."""
        return coherence(self.kernel), coherence(self.theory.kernel)

    @property
    def threshold(self) -> float:
        """Largest absolute z expected of agreeing results, at `FALSE_ALARM` over all entries."""
        law = student(self.networks - 1) if self.networks else normal
        return float(law.isf(FALSE_ALARM / 2 / self.entries))

    @property
    def agrees(self) -> bool:
        """Whether every entry agrees, with converged theory and enough effective draws."""
        return (
            self.theory.converged
            and (self.networks > 0 or self.smallest_ess >= ENOUGH_DRAWS)
            and self.largest_z <= self.threshold
        )

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        worst, ess = self.largest_z, self.smallest_ess
        if not self.theory.converged:
            return f"Inconclusive: the theory did not converge ({self.theory.result})."
        if not (self.networks or ess >= ENOUGH_DRAWS):
            return (
                f"Inconclusive: {ess:.0f} effective draws for the slowest kernel entry, "
                f"{ENOUGH_DRAWS} are needed for error bars; draw more samples."
            )
        word = "agree" if self.agrees else "DISAGREE"
        return (
            f"{self._source()} and theory {word}: largest |z| = {worst:.1f} over {self.entries} kernel "
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

    def _source(self) -> str:
        if not self.networks:
            return "Samples"
        made = settings(self.draws)
        left_out = len(made.get("left_out", ()))
        rest = f" ({left_out} more diverged, left out)" if left_out else ""
        return f"{self.networks} {made['space']} networks{rest}"

    def _caveat(self) -> str:
        ratio = self.kernel.shape[0] * self.kernel.shape[1] / self.theory.network.width
        share = np.linalg.norm(self.finite_width) / np.linalg.norm(self.theory.kernel)
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
        From `bayeskernel.sample`, or networks from `bayeskernel.train` or `bayeskernel.measure`.
    theory
        From `bayeskernel.solve`.

    Raises
    ------
    InputError
        If the draws belong to another network or task, or hold no posterior, and for fewer than three trained networks.
    """
    network, task = instance("theory", theory, MeanField).network, theory.task
    check_same_run(draws, network, task)
    if 0 < trained_networks(draws) < ENOUGH_NETWORKS:
        expected = f"at least {ENOUGH_NETWORKS} networks, whose spread gives the error"
        raise InputError("draws", expected, trained_networks(draws))
    symmetry = sign_symmetry(network, task)
    kernels, outputs, flipped = aligned(*kernel_and_output(draws), theory.kernel, symmetry)
    mean, spread, mcse, ess = kernel_moments(kernels)
    output, output_mcse, _ = mean_and_error(outputs)
    std, shift = _finite_width(theory, spread)
    error = np.sqrt(mcse**2 + shift**2 + theory.monte_carlo_error**2)
    difference = mean - theory.kernel
    # Entries without any error (silent units) agree exactly or not at all.
    z = np.divide(difference, error, out=np.where(difference == 0, 0.0, np.inf), where=error > 0)
    return Comparison(
        draws=draws,
        theory=theory,
        kernel=mean,
        mcse=mcse,
        ess=ess,
        finite_width=shift,
        theory_std=std,
        z=z,
        output=output,
        output_mcse=output_mcse,
        frobenius_error=float(np.linalg.norm(difference) / np.linalg.norm(theory.kernel)),
        cosine_alignment=float(
            np.sum(mean * theory.kernel) / np.linalg.norm(mean) / np.linalg.norm(theory.kernel)
        ),
        flipped=flipped,
    )


def _finite_width(theory: MeanField, spread: Floats) -> tuple[Floats, Floats]:
    """Standard deviation of each entry and size of its 1/N shift, from theory where it has them.

    Where it does not (large kernels, saddles), the draws' spread gives the order of magnitude:
    variance over the size of the entry's diagonal, which is of order 1/N as the shift is.
    """
    variance = spread**2
    std = np.full_like(variance, np.nan)
    if variance.shape[0] * variance.shape[1] <= _SPREAD:
        with suppress(FluctuationError):
            std = theory.kernel_std()
    try:
        return std, np.abs(theory.kernel_shift())
    except FluctuationError:
        size = np.sqrt(np.einsum("tata->ta", theory.kernel))
        scale = np.einsum("ta,sb->tasb", size, size)
        return std, np.divide(variance, scale, out=np.zeros_like(variance), where=scale > 0)
