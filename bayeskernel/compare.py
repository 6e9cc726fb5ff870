"""Do samples and theory agree? Entry by entry, with error bars from both sides.

For a kernel entry with sampled mean m, Monte-Carlo standard error e and theory value c,

    z = (m - c) / sqrt(e^2 + s^2 + t^2),

where s is the finite-width scale: the size of the leading 1/N shift of the posterior mean that theory
predicts (docs/theory, "Fluctuations"; estimated from the draws where theory has no fluctuations, see
`FluctuationError`), and t the theory's own Monte-Carlo error. No tolerance enters.

Networks that were trained one by one (`bayeskernel.train`, `bayeskernel.measure`) are independent: e is their spread over the
root of their number n, and limits on z are those of Student's t with n - 1 degrees of freedom. In the place of theory there may
be other draws of the same network, with their error for t and no s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import xarray as xr
from scipy.stats import norm as normal
from scipy.stats import t as student

from bayeskernel.errors import InputError
from bayeskernel.exchange import matched, pattern_symmetry
from bayeskernel.gauge import sign_symmetry
from bayeskernel.inference.convergence import kernel_moments, mean_and_error
from bayeskernel.inference.diagnose import Diagnosis, diagnose, named_chains
from bayeskernel.inference.record import check_same_run, kernel_and_output, trained_networks
from bayeskernel.inference.settled import unsettled
from bayeskernel.kernels import coherence
from bayeskernel.meanfield.solve import MeanField
from bayeskernel.plots import plot_comparison
from bayeskernel.problem import Floats
from bayeskernel.references import (
    Drawn,
    check_networks,
    descends,
    drawn,
    finite_width,
    source,
    unfit,
)

# Chance that a true agreement is called a disagreement, over all entries together.
FALSE_ALARM = 1e-4
# Above this ratio of kernel size to width, corrections beyond the leading one matter.
_NARROW = 0.25
# Blocks that a verdict names.
_NAMED = 3


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Kernels of one network on one task from two sources, side by side: draws, and theory or other draws.

    Attributes
    ----------
    draws, theory
        What was compared. If other draws take the place of theory, ``theory`` is a `Drawn` with their mean kernel
        and its error.
    kernel
        Sampled mean kernel, signs and patterns as in theory, shape (T, P, T, P).
    mcse
        Its Monte-Carlo standard error, same shape.
    ess
        Effective number of draws for it, same shape.
    finite_width
        Size of the 1/N shift of each entry, same shape; zero where draws are compared with draws.
    from_draws
        Whether theory has no such shift, and its size is estimated entry by entry from the spread of the draws. Where
        many directions move together it can be several times as large.
    theory_std
        Posterior standard deviation at this width from theory, same shape; NaN where theory has none and beyond 256
        sites, where it takes long: see `MeanField.kernel_std`.
    z
        z scores, same shape.
    output, output_mcse
        Sampled mean outputs (T, P, O) and their errors, likewise.
    frobenius_error
        ‖sampled - theory‖ / ‖theory‖ in Frobenius norm.
    cosine_alignment
        <sampled, theory> / (‖sampled‖ ‖theory‖).
    flipped
        Share of draws whose signs were changed to match theory's.
    exchanged
        Chains whose patterns were exchanged to match theory's; see `bayeskernel.exchange`.
    """

    draws: xr.DataTree
    theory: MeanField | Drawn
    kernel: Floats
    mcse: Floats
    ess: Floats
    finite_width: Floats
    from_draws: bool
    theory_std: Floats
    z: Floats
    output: Floats
    output_mcse: Floats
    frobenius_error: float
    cosine_alignment: float
    flipped: float
    exchanged: tuple[int, ...]

    def __repr__(self) -> str:
        return f"Comparison({self.theory.network}, {self.theory.task})\n{self.verdict}"

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per distinct kernel entry, with the columns sampled, mcse, ess, theory, theory_std, finite_width, z.

        Between draws the columns are sampled, mcse, ess, other, other_mcse, z.

        The index is (step, pattern, other_step, other_pattern), of other graphs than chains (node, pattern, ...).
        """
        nodes, patterns = self.kernel.shape[:2]
        first, second = np.triu_indices(nodes * patterns)
        index = pd.MultiIndex.from_arrays(
            [first // patterns + 1, first % patterns, second // patterns + 1, second % patterns],
            names=[self.noun, "pattern", f"other_{self.noun}", "other_pattern"],
        )
        columns = {"sampled": self.kernel, "mcse": self.mcse, "ess": self.ess}
        if isinstance(self.theory, Drawn):
            columns |= {"other": self.theory.kernel, "other_mcse": self.theory.monte_carlo_error}
        else:
            columns |= {"theory": self.theory.kernel, "theory_std": self.theory_std}
            columns["finite_width"] = self.finite_width
        columns["z"] = self.z
        square = (nodes * patterns, nodes * patterns)
        entries = {name: v.reshape(square)[first, second] for name, v in columns.items()}
        return pd.DataFrame(entries, index=index)

    @cached_property
    def blocks(self) -> pd.DataFrame:
        """One row per pair of steps (nodes), which sums up the block of the kernel between them.

        Norms of sampled and theory's block and of their difference, largest and root mean square z, fewest effective draws.
        """
        across = (1, 3)

        def norm(kernel: Floats) -> Floats:
            return np.sqrt(np.sum(kernel**2, axis=across))

        columns = {
            "sampled": norm(self.kernel),
            "other" if isinstance(self.theory, Drawn) else "theory": norm(self.theory.kernel),
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
        counts = [trained_networks(draws) for draws in self._sources]
        fewest = min((count for count in counts if count), default=0)
        law = student(fewest - 1) if fewest else normal
        return float(law.isf(FALSE_ALARM / 2 / self.entries))

    @property
    def agrees(self) -> bool:
        """Whether every entry agrees; False also where theory did not converge or effective draws are too few."""
        return not self._inconclusive and self.largest_z <= self.threshold

    @property
    def verdict(self) -> str:
        """The outcome in one sentence; it names the blocks of the kernel that differ.

        Theory and samples do not describe minima of the loss: networks that gradient descent brought there
        *deviate*.
        """
        if self._inconclusive:
            return f"Inconclusive: {self._inconclusive}."
        first, second = source(self.draws), "theory"
        if isinstance(self.theory, Drawn):
            second = source(self.theory.draws)
            if descends(self.theory.draws) and not descends(self.draws):
                first, second = second, first
        said = f"{first} and {second} agree"
        if not self.agrees:
            deviate = any(map(descends, self._sources))
            said = f"{first} deviate from {second}" if deviate else f"{first} and {second} DISAGREE"
            said += f" in {self._differing()}"
        moving = [why for draws in self._sources if descends(draws) for why in unsettled(draws)]
        rest = f"; {moving[0]}" if moving else ""
        if self.exchanged:  # chains are in other images of the same minimum
            rest = (
                f"; patterns exchanged, as the task allows, in {named_chains(self.exchanged)}{rest}"
            )
        return (
            f"{said[0].upper()}{said[1:]}: largest |z| = {self.largest_z:.1f} over {self.entries} kernel "
            f"entries (limit {self.threshold:.1f}), Frobenius error "
            f"{100 * self.frobenius_error:.1f} %{self._caveat()}{rest}."
        )

    def _differing(self) -> str:
        """Blocks with an entry beyond the limit, those that differ most first, with their norms from both sides."""
        table = self.blocks[self.blocks["largest_z"] > self.threshold]
        table = table.sort_values("difference", ascending=False)
        other = table.columns[1]
        named = ", ".join(
            f"({t}, {s}) (norm {row['sampled']:.3g}, {other} {row[other]:.3g})"
            for (t, s), row in table[:_NAMED].iterrows()
        )
        more = f" and {len(table) - _NAMED} more" if len(table) > _NAMED else ""
        return f"the block{'s' * (len(table) > 1)} of {self.noun}s {named}{more}"

    @cached_property
    def _inconclusive(self) -> str:
        """Why nothing can be said; empty where something can."""
        if isinstance(self.theory, Drawn):
            found = (
                unfit(self.draws, self.smallest_ess),
                unfit(self.theory.draws, self.theory.smallest_ess),
            )
            return next(filter(None, found), "")
        if not self.theory.converged:
            return f"the theory did not converge ({self.theory.result})"
        if not self.theory.branches[0].stable:
            return "the theory's solution is a saddle, which no network stays at"
        return unfit(self.draws, self.smallest_ess)

    @property
    def _sources(self) -> list[xr.DataTree]:
        return [self.draws, *([self.theory.draws] if isinstance(self.theory, Drawn) else [])]

    @cached_property
    def diagnosis(self) -> Diagnosis:
        """Whether the chains can be trusted."""
        return diagnose(self.draws)

    def plot(self) -> np.ndarray:
        """Draw `bayeskernel.plots.plot_comparison`; returns its axes."""
        return plot_comparison(self)

    def _caveat(self) -> str:
        if isinstance(self.theory, Drawn):
            return ""
        ratio = self.kernel.shape[0] * self.kernel.shape[1] / self.theory.network.width
        share = np.linalg.norm(self.finite_width) / np.linalg.norm(self.theory.kernel)
        if ratio > _NARROW:
            return (
                f"; with d/N = {ratio:.2f} the network is not wide for its task, "
                f"and finite-width shifts ({100 * share:.0f} % here) beyond the leading one count"
            )
        if self.from_draws:
            return (
                f"; finite-width shift about {100 * share:.2g} %, entry by entry from the draws, "
                f"several times as large where many entries move together"
            )
        return f"; finite-width shift {100 * share:.2g} %"


def compare(draws: xr.DataTree, theory: MeanField | xr.DataTree) -> Comparison:
    """Compare draws with the mean-field solution of the same network and task, or with other draws.

    Parameters
    ----------
    draws
        From `bayeskernel.sample`, or networks from `bayeskernel.train` or `bayeskernel.measure`.
    theory
        From `bayeskernel.solve`; or draws or networks, as above, of the same network.

    Raises
    ------
    InputError
        If the draws belong to another network or task, or hold no posterior, and for fewer than three trained networks.
    """
    if not isinstance(theory, (MeanField, xr.DataTree)):
        expected = "a MeanField from bayeskernel.solve or draws"
        raise InputError("theory", expected, f"{type(theory).__name__}: {theory!r:.80}")
    reference = theory if isinstance(theory, MeanField) else drawn(theory)
    network, task = reference.network, reference.task
    check_same_run(draws, network, task)
    check_networks("draws", draws)
    if isinstance(reference, Drawn):
        check_networks("theory", reference.draws)
    symmetry = sign_symmetry(network, task)
    own = matched(
        *kernel_and_output(draws), reference.kernel, symmetry, pattern_symmetry(network, task)
    )
    mean, spread, mcse, ess = kernel_moments(own.kernel)
    output, output_mcse, _ = mean_and_error(own.output)
    width = finite_width(reference, spread)
    error = np.sqrt(mcse**2 + width.shift**2 + reference.monte_carlo_error**2)
    difference = mean - reference.kernel
    # Entries without any error (silent units) agree exactly or not at all.
    z = np.divide(difference, error, out=np.where(difference == 0, 0.0, np.inf), where=error > 0)
    size = np.linalg.norm(reference.kernel)
    return Comparison(
        draws=draws,
        theory=reference,
        kernel=mean,
        mcse=mcse,
        ess=ess,
        finite_width=width.shift,
        from_draws=width.from_draws,
        theory_std=width.std,
        z=z,
        output=output,
        output_mcse=output_mcse,
        frobenius_error=float(np.linalg.norm(difference) / size),
        cosine_alignment=float(np.sum(mean * reference.kernel) / np.linalg.norm(mean) / size),
        flipped=own.flipped,
        exchanged=own.exchanged,
    )
