"""Closed forms and slow, obvious references, written without the package's solver."""

import numpy as np
from scipy.optimize import brentq


def endpoint_gain(steps, y, noise, recurrent_std=1.0, input_std=1.0, readout_std=1.0, x2=1.0):
    """Untied linear endpoint task, P = D = 1: all stationary r = C[t,t]/K[t,t], smallest first."""
    scale = recurrent_std ** (2 * (steps - 1)) * input_std**2 * x2

    def balance(r):
        c = r**steps * scale
        return r - 1 - readout_std**2 * c * y**2 / (readout_std**2 * c + noise) ** 2

    grid = np.linspace(1 - 1e-9, 50, 200_001)
    values = balance(grid)
    cross = np.flatnonzero(np.sign(values[1:]) != np.sign(values[:-1]))
    return np.array([brentq(balance, grid[i], grid[i + 1], xtol=1e-14) for i in cross])


def first_lag_critical_signal(steps, noise):
    """Signal at which lag-one coherence becomes unstable, all scales one."""
    r = (steps - 1) / (steps - 2)
    c = r**steps
    return np.sqrt(r - 1) * (c + noise) / np.sqrt(c)


def free_energy(C, K, S, y):
    """F with plain inverses; C, K (d, d); S (O, n, n); y (O, n)."""
    data = sum(v @ np.linalg.solve(s, v) for s, v in zip(S, y, strict=True)) / 2
    logdet = np.linalg.slogdet(K)[1] - np.linalg.slogdet(C)[1]
    return data + (np.trace(np.linalg.solve(K, C)) + logdet - len(C)) / 2
