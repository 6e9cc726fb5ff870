"""Slow, obvious densities of the three spaces, in numpy, with explicit inverses and loops."""

import numpy as np


def kernel_maps(network, task, sharing):
    """Return K(C) and S_o(C) as functions, from their definitions."""
    T, P, D, _ = task.shape
    sites = [(t, a) for t in range(T) for a in range(P)]

    def K(C):
        out = np.zeros((T * P, T * P))
        for i, (t, a) in enumerate(sites):
            for j, (s, b) in enumerate(sites):
                same_input = sharing.input[t] == sharing.input[s]
                out[i, j] = (
                    network.input_std**2 * same_input * task.inputs[t, a] @ task.inputs[s, b] / D
                )
                if t and s and sharing.recurrent[t] == sharing.recurrent[s]:
                    out[i, j] += network.recurrent_std**2 * C[(t - 1) * P + a, (s - 1) * P + b]
        return out

    def S(C, o):
        rows = [i for i, (t, a) in enumerate(sites) if not np.isnan(task.targets[t, a, o])]
        out = np.zeros((len(rows), len(rows)))
        for k, i in enumerate(rows):
            for m, j in enumerate(rows):
                same = sharing.readout[sites[i][0]] == sharing.readout[sites[j][0]]
                out[k, m] = network.readout_std**2 * same * C[i, j] + network.noise * (k == m)
        return out, task.targets[..., o].ravel()[rows]

    return K, S


def log_evidence(C, network, task, S):
    """sum_o ln N(y_o; 0, S_o / N) without the constants of 2 pi."""
    total, count = 0.0, network.width if network.scaling == "mean_field" else 1
    for o in range(task.shape[3]):
        cov, y = S(C, o)
        cov = cov / count
        total -= (y @ np.linalg.solve(cov, y) + np.linalg.slogdet(cov)[1]) / 2
    return total


def preactivations(z, network, task, K, phi):
    """h (T P, N) from z (T P, N): conditional mean plus Cholesky root, with explicit inverses."""
    T, P = task.shape[:2]
    h = np.zeros((0, z.shape[1]))
    activity = np.zeros((T * P, z.shape[1]))
    for t in range(T):
        full = K(activity @ activity.T / network.width)
        past, now = np.arange(t * P), np.arange(t * P, (t + 1) * P)
        gain = full[np.ix_(now, past)] @ np.linalg.inv(full[np.ix_(past, past)])
        conditional = full[np.ix_(now, now)] - gain @ full[np.ix_(past, now)]
        h = np.concatenate([h, gain @ h + np.linalg.cholesky(conditional) @ z[now]])
        activity[now] = phi(h[now])
    return h
