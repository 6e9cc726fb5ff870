"""Networks of PyTorch, flax, equinox and NumPy give the kernels that their weights say; each where it is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayeskernel as bk

P, D, N, T = 3, 2, 8, 3
TASK = bk.Task(np.random.default_rng(0).normal(size=(T, P, D)), np.zeros((T, P)))
NETWORK = bk.Network(N, "tanh")


def by_hand(W, U):
    """The how-to's loop in NumPy, (T, P, N)."""
    h, activities = np.zeros((P, N)), []
    for x in TASK.inputs:
        h = np.tanh(h @ W.T + x @ U.T)
        activities.append(h)
    return np.stack(activities)


def check(activities, W, U):
    tree = bk.measure(NETWORK, TASK, activities)
    phi = by_hand(np.asarray(W, float), np.asarray(U, float))
    kernel = np.einsum("tai,sbi->tasb", phi, phi) / N
    np.testing.assert_allclose(tree["posterior"]["kernel"][0, 0], kernel, atol=1e-6)
    assert np.ptp(kernel) > 0.1


def scanned(cell):
    """The how-to's scan of a cell over steps."""
    x = jnp.asarray(TASK.inputs, jnp.float32)
    return jax.lax.scan(lambda h, x: (h := cell(h, x), h), jnp.zeros((P, N)), x)[1]


def test_pytorch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    rnn = torch.nn.RNN(D, N, bias=False, batch_first=True)
    inputs = torch.tensor(TASK.inputs.transpose(1, 0, 2), dtype=torch.float32)
    with torch.no_grad():
        activities = rnn(inputs)[0].transpose(0, 1).cpu()
    check(activities, rnn.weight_hh_l0.detach(), rnn.weight_ih_l0.detach())


def test_flax():
    nnx = pytest.importorskip("flax.nnx")
    cell = nnx.SimpleCell(D, N, rngs=nnx.Rngs(0))
    activities = scanned(lambda h, x: cell(h, x)[0])
    check(activities, cell.dense_h.kernel[...].T, cell.dense_i.kernel[...].T)


def test_equinox():
    eqx = pytest.importorskip("equinox")
    one, two = jax.random.split(jax.random.key(0))
    W, U = (
        eqx.nn.Linear(N, N, use_bias=False, key=one),
        eqx.nn.Linear(D, N, use_bias=False, key=two),
    )
    cell = jax.vmap(lambda h, x: jnp.tanh(W(h) + U(x)))
    check(scanned(cell), W.weight, U.weight)


def test_numpy():
    rng = np.random.default_rng(1)
    W, U = rng.normal(size=(N, N)) / np.sqrt(N), rng.normal(size=(N, D))
    check(by_hand(W, U), W, U)
