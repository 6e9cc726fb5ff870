"""Reference posteriors, to the standard of posteriordb (Magnusson et al., 2024), which has none for neural networks.

``python -m tests.data.references`` samples them anew, about half an hour on two cores: NumPyro's NUTS in weights, in
float64, ten chains of 1000 draws after thinning, and refuses to write what does not meet the standard: R-hat below
1.01, no divergence, E-BFMI above 0.2, and close to 10,000 effective draws of every entry.

Kept are the distinct kernel entries of every draw, each draw brought to the signs for which its steps are most
positively correlated, as whole numbers of 2^-16 of the entry's range.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import arviz as az
import jax
import numpy as np
import xarray as xr

import bayeskernel as bk
from bayeskernel.gauge import canonical, sign_symmetry

FILE = Path(__file__).with_name("references.npz")
CHAINS, DRAWS = 10, 1000
_ENDPOINT = bk.tasks.endpoint([[1.0]], [2.0], 3)
# (network, task, thinning)
CASES: dict[str, tuple[bk.Network, bk.Task, int]] = {
    "linear, tied": (bk.Network(12, "linear", noise=0.5), _ENDPOINT, 8),
    "linear, untied": (bk.Network(12, "linear", "untied", noise=0.5), _ENDPOINT, 8),
    "erf, tied": (bk.Network(12, "erf", noise=0.5), _ENDPOINT, 8),
    "erf, untied": (bk.Network(12, "erf", "untied", noise=0.5), _ENDPOINT, 8),
    "erf, tied, digits": (
        bk.Network(12, "erf", noise=0.5),
        bk.tasks.digits(patterns_per_class=1, steps=2),
        8,
    ),
}


def entries(draws: xr.DataTree, network: bk.Network, task: bk.Task) -> np.ndarray:
    """Distinct kernel entries (chain, draw, n), every draw with signs of its own."""
    kernel = draws["posterior"]["kernel"].to_numpy().astype(np.float64)
    symmetry = sign_symmetry(network, task)
    flat = kernel.reshape(-1, *kernel.shape[2:])
    fixed = np.stack([canonical(k, symmetry) for k in flat])
    size = kernel.shape[2] * kernel.shape[3]
    first, second = np.triu_indices(size)
    return fixed.reshape(*kernel.shape[:2], size, size)[..., first, second]


def load(name: str) -> np.ndarray:
    """Draws of a reference, shape (chain, draw, n)."""
    with np.load(FILE) as kept:
        low, high, numbers = (kept[f"{name}: {part}"] for part in ("low", "high", "draws"))
    return low + (high - low) * (numbers / 65535)


def _make(name: str) -> dict[str, np.ndarray]:
    network, task, thin = CASES[name]
    with jax.enable_x64(True):
        draws = bk.sample(
            jax.random.key(2026),
            network,
            task,
            space="weights",
            sampler="nuts",
            num_warmup=1000,
            num_samples=thin * DRAWS,
            num_chains=CHAINS,
        )
    draws = draws.isel(draw=slice(thin - 1, None, thin))
    values = entries(draws, network, task)
    data = xr.Dataset({"x": (("chain", "draw", "entry"), values)})
    r_hat = float(az.rhat(data)["x"].max())
    ess = float(min(az.ess(data, method=method)["x"].min() for method in ("bulk", "tail")))
    divergences = sum(bk.diagnose(draws).divergences)
    e_bfmi = min(bk.diagnose(draws).e_bfmi)
    print(
        f"{name}: R-hat {r_hat:.4f}, ESS {ess:.0f}, {divergences} divergences, E-BFMI {e_bfmi:.2f}"
    )
    if r_hat >= 1.01 or divergences or e_bfmi < 0.2 or ess < 0.8 * CHAINS * DRAWS:
        sys.exit(f"{name} does not meet the standard")
    low, high = values.min((0, 1)), values.max((0, 1))
    numbers = np.round((values - low) / (high - low) * 65535).astype(np.uint16)
    return {f"{name}: low": low, f"{name}: high": high, f"{name}: draws": numbers}


def main() -> None:
    """Sample all cases and write them."""
    kept: dict[str, np.ndarray] = {}
    for name in CASES:
        began = time.time()
        kept |= _make(name)
        print(f"  {time.time() - began:.0f} s", flush=True)
    np.savez_compressed(FILE, **kept)  # type: ignore[arg-type]
    print(f"{FILE.name}: {FILE.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
