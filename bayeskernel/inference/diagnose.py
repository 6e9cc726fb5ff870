"""Can these draws be trusted? Convergence judged on what the symmetries of the posterior leave alone.

Raw weights tell nothing: units may be exchanged and signs flipped without changing the posterior, so chains
that agree on everything observable disagree on every weight. Judged are kernel entries with signs and patterns matched, the
outputs, the log density, and invariants of the whole orbit (norms of the blocks of C), by the numbers and
thresholds of ArviZ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from bayeskernel.errors import InputError
from bayeskernel.exchange import Matched, matched, pattern_symmetry
from bayeskernel.inference.convergence import by_pieces, distinct, moments, trust
from bayeskernel.inference.record import (
    check_draws,
    kernel_and_output,
    problem,
    settings,
    symmetry,
    trained_networks,
)
from bayeskernel.inference.settled import ENOUGH_NETWORKS, unsettled

Floats = NDArray[np.float64]

# Thresholds of Vehtari, Gelman, Simpson, Carpenter, Buerkner (2021), as ArviZ uses them: rank-normalised split
# R-hat, effective draws per chain in bulk and tails.
R_HAT = 1.01
ESS_PER_CHAIN = 100
# Betancourt (2016): below this the energy is explored too slowly.
E_BFMI = 0.3
# NumPyro's largest tree.
TREE_DEPTH = 10
# A chain that stays where it is in more than this share of its transitions is stuck.
_STUCK = 0.95
# Chains whose means of an invariant lie further apart than so many of their standard deviations are in
# different branches.
_APART = 3.0
_COLUMNS = ("mean", "std", "mcse", "ess_bulk", "ess_tail", "r_hat")


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Whether draws can be trusted, and why not.

    Attributes
    ----------
    numbers
        mean, std, mcse, ess_bulk, ess_tail and r_hat of every quantity in the order of ``table``, (6, n).
    shape
        (nodes, T, P, O).
    divergences
        Number of divergent transitions of every chain.
    tree_depth_hits
        Transitions that reached the largest tree, of every chain (NUTS).
    e_bfmi
        Energy Bayesian fraction of missing information of every chain.
    stuck
        Chains that hardly move.
    branches
        Chains grouped by the branch of the posterior they are in.
    flipped
        Share of draws whose signs were changed to match the others.
    exchanged
        Chains whose patterns were exchanged to match the others; see `bayeskernel.exchange`.
    broken
        Chains with numbers that are not finite.
    """

    numbers: Floats
    shape: tuple[int, int, int, int]
    divergences: tuple[int, ...]
    tree_depth_hits: tuple[int, ...]
    e_bfmi: tuple[float, ...]
    stuck: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    flipped: float
    exchanged: tuple[int, ...]
    broken: tuple[int, ...]

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per quantity: mean, std, mcse, ess_bulk, ess_tail, r_hat.

        Quantities are "lp", "norm[t,s]", the norm of a block of C, "kernel[t,a,s,b]" and "output[t,a,o]", signs and
        patterns matched.
        """
        columns = dict(zip(_COLUMNS, self.numbers, strict=True))
        names = ["lp", *self._quantities()]
        return pd.DataFrame(columns, index=pd.Index(names, name="quantity"))

    def _quantities(self) -> list[str]:
        nodes, *output = self.shape
        names = [f"norm[{n + 1},{m + 1}]" for n, m in zip(*np.triu_indices(nodes), strict=True)]
        sites = [f"{n + 1},{a}" for n, a in np.ndindex(nodes, output[1])]
        names += [f"kernel[{one},{two}]" for i, one in enumerate(sites) for two in sites[i:]]
        return names + [f"output[{t + 1},{a},{o}]" for t, a, o in np.ndindex(*output)]

    @property
    def reasons(self) -> tuple[str, ...]:
        """What is wrong, one sentence each; empty where nothing is."""
        count, reasons = len(self.divergences), list[str]()
        if self.broken:
            reasons.append(f"numbers that are not finite in {named_chains(self.broken)}")
        if self.stuck:
            reasons.append(f"{named_chains(self.stuck)} of {count} hardly moved")
        if len(self.branches) > 1:
            groups = " | ".join(", ".join(str(c) for c in g) for g in self.branches)
            reasons.append(f"chains are in {len(self.branches)} different branches: {groups}")
        if sum(self.divergences):
            reasons.append(f"{sum(self.divergences)} divergent transitions")
        if sum(self.tree_depth_hits):
            reasons.append(f"{sum(self.tree_depth_hits)} transitions reached the largest tree")
        low = [c for c, value in enumerate(self.e_bfmi) if not value >= E_BFMI]
        if low:
            reasons.append(f"E-BFMI below {E_BFMI} in {named_chains(low)}")
        needed = ESS_PER_CHAIN * count
        for column, name in (("ess_bulk", "in bulk"), ("ess_tail", "in the tails")):
            least = np.nan_to_num(self._column(column), posinf=np.inf)
            i = int(np.argmin(least))
            if least[i] < needed:
                reasons.append(
                    f"{least[i]:.0f} effective draws {name} of {self.table.index[i]}, {needed} are needed"
                )
        r_hat = np.nan_to_num(self._column("r_hat"), nan=np.inf, posinf=np.inf)
        i = int(np.argmax(r_hat))
        if count > 1 and r_hat[i] >= R_HAT:
            reasons.append(
                f"R-hat {r_hat[i]:.3f} of {self.table.index[i]}, below {R_HAT} is needed"
            )
        return tuple(reasons)

    @property
    def ok(self) -> bool:
        """Whether every criterion is met."""
        return not self.reasons

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        if self.ok:
            worst, ess = np.nanmax(self._column("r_hat")), np.min(self._column("ess_bulk"))
            return f"Passed: largest R-hat {worst:.3f}, {ess:.0f} effective draws at least."
        return "Failed: " + "; ".join(self.reasons) + "."

    def _column(self, name: str) -> Floats:
        return np.asarray(self.numbers[_COLUMNS.index(name)])


@dataclass(frozen=True, eq=False)
class EnsembleDiagnosis(Diagnosis):
    """Whether networks trained one by one can be trusted: there are no chains, so no R-hat and no effective draws.

    ``numbers`` are mean, std and mcse, (3, n); everything about transitions is empty. ``unsettled`` says why training is
    not at its end, as far as that is known: of networks from `bayeskernel.train`.
    """

    unsettled: tuple[str, ...] = ()
    judged: bool = False

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per quantity: mean and std over networks and the error of the mean; names as in `Diagnosis`."""
        columns = dict(zip(_COLUMNS, self.numbers, strict=False))
        return pd.DataFrame(columns, index=pd.Index(self._quantities(), name="quantity"))

    @property
    def networks(self) -> int:
        """How many there are."""
        return len(self.branches[0])

    @property
    def reasons(self) -> tuple[str, ...]:
        """What is wrong, one sentence each; empty where nothing is."""
        few = self.networks < ENOUGH_NETWORKS
        reasons = [f"{self.networks} networks, {ENOUGH_NETWORKS} are needed for an error"] * few
        which = ", ".join(map(str, self.broken))
        reasons += [f"some more diverged and are left out: {which}"] * bool(self.broken)
        return (*reasons, *self.unsettled)

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        if not self.ok:
            return "Failed: " + "; ".join(self.reasons) + "."
        end = "is at its end" if self.judged else "has come to its end is not judged"
        return (
            f"{self.networks} networks trained one by one, all finite; errors are from their spread, "
            f"and {'' if self.judged else 'whether '}training {end}."
        )


def named_chains(chains: Sequence[int]) -> str:
    """Some chains, for a sentence."""
    return f"chain{'s' if len(chains) > 1 else ''} {', '.join(str(c) for c in chains)}"


def diagnose(draws: xr.DataTree) -> Diagnosis:
    """Judge the chains of a run, or networks trained one by one (an `EnsembleDiagnosis`).

    Parameters
    ----------
    draws
        From `bayeskernel.sample`, `bayeskernel.train` or `bayeskernel.measure`.

    Raises
    ------
    InputError
        If the draws hold no posterior, or too few draws to split a chain.
    """
    check_draws(draws)
    networks, count = trained_networks(draws), draws["posterior"].sizes["draw"]
    if not networks and count < 4:
        raise InputError("draws", "at least 4 draws a chain", count)
    kernel, output, flipped, exchanged = gauge_fixed(draws)
    norms = np.sqrt(np.einsum("cdtasb,cdtasb->cdts", kernel, kernel, dtype=np.float64))
    nodes, patterns = kernel.shape[2:4]
    every = distinct(nodes), distinct(nodes * patterns), np.arange(output[0, 0].size)
    parts = [*zip((norms, kernel, output), every, strict=True)]
    shape = (nodes, *output.shape[2:])
    if networks:
        return EnsembleDiagnosis(
            numbers=np.concatenate([by_pieces(moments, *part)[:3] for part in parts], axis=1),
            shape=shape,
            divergences=(),
            tree_depth_hits=(),
            e_bfmi=(),
            stuck=(),
            branches=(tuple(range(networks)),),
            flipped=flipped,
            exchanged=exchanged,
            broken=tuple(settings(draws).get("left_out", ())),
            unsettled=unsettled(draws),
            judged="trace" in draws.children,
        )
    stats = draws["sample_stats"].to_dataset()
    lp = stats["lp"].to_numpy().astype(np.float64)
    parts.insert(0, (lp[..., None], np.arange(1)))
    finite = np.isfinite(lp).all(1) & np.isfinite(kernel).all(axis=(1, 2, 3, 4, 5))
    moved = np.any(np.diff(kernel, axis=1) != 0, axis=(2, 3, 4, 5)) | (np.diff(lp, axis=1) != 0)
    stuck = tuple(int(c) for c in np.flatnonzero(moved.mean(1) < 1 - _STUCK))
    invariants = np.concatenate([norms.reshape(*lp.shape, -1), lp[..., None]], axis=-1)
    energy = stats["energy"].to_numpy().astype(np.float64)
    hits = (0,) * len(lp)
    if settings(draws)["sampler"] == "nuts":
        hits = tuple(int(n) for n in (stats["tree_depth"] >= TREE_DEPTH).sum("draw"))
    return Diagnosis(
        numbers=np.concatenate([by_pieces(_judged, *part) for part in parts], axis=1),
        shape=shape,
        divergences=tuple(int(n) for n in stats["diverging"].sum("draw")),
        tree_depth_hits=hits,
        e_bfmi=tuple(_bfmi(e) for e in energy),
        stuck=stuck,
        branches=_branches(invariants),
        flipped=flipped,
        exchanged=exchanged,
        broken=tuple(int(c) for c in np.flatnonzero(~finite)),
    )


def gauge_fixed(draws: xr.DataTree) -> Matched:
    """Kernels and outputs with signs and patterns brought to those of the mean."""
    kernel, output = kernel_and_output(draws)
    usable = np.isfinite(kernel).all(axis=(2, 3, 4, 5))
    if not usable.any():
        return Matched(kernel, output, 0.0, ())
    held = usable[..., None, None, None, None]
    free = symmetry(draws), pattern_symmetry(*problem(draws))
    reference = kernel[tuple(np.argwhere(usable)[-1])].astype(np.float64)
    for _ in range(2):  # the mean of matched draws is a better reference than one draw
        now = matched(kernel, output, reference, *free)
        reference = now.kernel.mean((0, 1), np.float64, where=held)
    return matched(kernel, output, reference, *free)


def _judged(x: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.concatenate([moments(x)[:3], trust(x)])


def _bfmi(energy: Floats) -> float:
    """<(E_n - E_(n-1))^2> / var E of one chain; NaN where the energy does not move."""
    variance = float(np.var(energy))
    return float(np.mean(np.diff(energy) ** 2)) / variance if variance > 0 else float("nan")


def _branches(invariants: Floats) -> tuple[tuple[int, ...], ...]:
    """Group chains that overlap in every invariant; invariants (chain, draw, n)."""
    mean, std = invariants.mean(1), invariants.std(1)
    near = [
        np.all(np.abs(mean - m) <= _APART * np.hypot(std, s) + 1e-12, axis=1)
        for m, s in zip(mean, std, strict=True)
    ]
    count, group = connected_components(np.array(near), directed=False)
    groups = (tuple(np.flatnonzero(group == k).tolist()) for k in range(count))
    return tuple(sorted(groups, key=lambda g: (-len(g), g)))
