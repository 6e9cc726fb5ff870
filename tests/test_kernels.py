import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel.errors import InputError
from bayeskernel.likelihood import covariance
from bayeskernel.problem import problem

SHARING = bk.Sharing([0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1])


def test_preactivation_kernel_entry_by_entry(general_task):
    network = bk.Network(8, sharing=SHARING, recurrent_std=1.3, input_std=0.7)
    C = np.random.default_rng(1).normal(size=(4, 2, 4, 2))
    defined = problem(network, general_task)
    K = defined.tensor(defined.preactivation_kernel(defined.matrix(C)))
    x, w, u = general_task.inputs, SHARING.recurrent, SHARING.input
    for t in range(4):
        for s in range(4):
            for a in range(2):
                for b in range(2):
                    expected = (u[t] == u[s]) * 0.7**2 * (x[t, a] @ x[s, b]) / 3
                    if t and s:
                        expected += (w[t] == w[s]) * 1.3**2 * C[t - 1, a, s - 1, b]
                    assert K[t, a, s, b] == pytest.approx(expected, abs=1e-12)


def test_output_covariance_entry_by_entry(general_task):
    network = bk.Network(8, sharing=SHARING, readout_std=1.2, noise=0.3)
    root = np.random.default_rng(2).normal(size=(8, 9))
    C = (root @ root.T).reshape(4, 2, 4, 2)
    defined = problem(network, general_task)
    seen = set()
    for reading in defined.readings:
        S = covariance(defined.read(defined.matrix(C)), reading, defined)
        seen |= {(site, o) for site in reading.sites for o in reading.outputs}
        for i, p in enumerate(reading.sites):
            for j, q in enumerate(reading.sites):
                (t, a), (s, b) = divmod(p, 2), divmod(q, 2)
                shared = SHARING.readout[t] == SHARING.readout[s]
                expected = shared * 1.2**2 * C[t, a, s, b] + (i == j) * 0.3
                assert S[i, j] == pytest.approx(expected, abs=1e-12)
    assert seen == set(zip(*np.nonzero(general_task.supervised.reshape(8, 2)), strict=True))


def test_fed_back_is_the_adjoint_of_fed(general_task):
    defined = problem(bk.Network(8, sharing=SHARING), general_task)
    A, B = np.random.default_rng(0).normal(size=(2, 8, 8))
    assert np.sum(defined.fed(A) * B) == pytest.approx(np.sum(A * defined.fed_back(B)))


def test_coherence_of_equal_and_opposite_steps():
    h = np.random.default_rng(0).normal(size=(1, 3, 50))
    activities = np.concatenate([h, h, -2 * h])
    kernel = np.einsum("tai,sbi->tasb", activities, activities)
    assert bk.coherence(kernel) == pytest.approx(np.array([[1, 1, -1], [1, 1, -1], [-1, -1, 1]]))


def test_coherence_refuses_other_shapes():
    with pytest.raises(InputError, match=r"kernel: expected shape \(\.\.\., T, P, T, P\)"):
        bk.coherence(np.ones((4, 4)))
