"""Effective draws, errors and R-hat against ArviZ, quantity by quantity."""

import arviz as az
import numpy as np
import pytest
import xarray as xr

from bayeskernel.inference import convergence


def chains(count, draws):
    """Independent, slow, antithetic, discrete, drifting, heavy-tailed, disagreeing and constant quantities."""
    rng = np.random.default_rng(0)
    white = rng.normal(size=(count, draws, 5))
    slow, back = np.zeros((2, count, draws))
    for t in range(1, draws):
        slow[:, t] = 0.95 * slow[:, t - 1] + rng.normal(size=count)
        back[:, t] = -0.7 * back[:, t - 1] + rng.normal(size=count)
    others = [
        slow,
        back,
        np.round(white[..., 0]),
        white[..., 1] + np.linspace(0, 3, draws),
        rng.standard_cauchy((count, draws)),
        white[..., 2] + np.arange(count)[:, None],
        np.full((count, draws), 0.3),
        white[..., 3] * 1e-9 + 1.0,
    ]
    return np.concatenate([white, np.stack(others, axis=-1)], axis=-1)


@pytest.mark.parametrize("draws", [4, 5, 7, 30, 501])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_numbers_are_those_of_arviz(count, draws, monkeypatch):
    monkeypatch.setattr(convergence, "_PIECE", 6 * count * draws)
    x = chains(count, draws)
    data = xr.Dataset({"x": (("chain", "draw", "n"), x)})
    moving = np.ptp(x, axis=(0, 1)) > 0
    columns = np.arange(x.shape[-1])

    def arviz(measure, **options):
        with np.errstate(all="ignore"):
            return measure(data, **options)["x"].to_numpy()[moving]

    mean, error, ess = convergence.mean_and_error(x)
    bulk, tail, r_hat = convergence.by_pieces(convergence.trust, x, columns)
    assert mean == pytest.approx(x.mean((0, 1)))
    assert error[moving] == pytest.approx(arviz(az.mcse, method="mean"), rel=1e-6)
    assert ess[moving] == pytest.approx(arviz(az.ess, method="mean"), rel=1e-6)
    assert bulk[moving] == pytest.approx(arviz(az.ess, method="bulk"), rel=1e-6)
    assert tail[moving] == pytest.approx(arviz(az.ess, method="tail", prob=(0.05, 0.95)), rel=1e-6)
    if count > 1:
        assert r_hat[moving] == pytest.approx(arviz(az.rhat, method="rank"), rel=1e-6)
    else:
        assert np.isnan(r_hat[moving]).all()
    still = ~moving
    assert (error[still] == 0).all()
    assert (ess[still] == count * draws).all()
    assert np.isinf(bulk[still]).all()
    assert (r_hat[still] == 1).all()


def test_what_is_not_finite_has_no_numbers():
    x = chains(2, 20)
    x[1, 3, 0] = np.nan
    out = convergence.trust(x)
    assert np.isnan(out[:, 0]).all()
    assert np.isfinite(out[:, 1]).all()
    assert np.isnan(convergence.moments(x)[:, 0]).any()
