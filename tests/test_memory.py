"""Is what would not fit into memory refused before it begins, with its size and a way out?"""

import jax
import pytest

import bayeskernel as bk
from bayeskernel import memory
from bayeskernel.errors import InputError

NETWORK = bk.Network(8, "linear")


def task(patterns):
    return bk.tasks.linear_teacher(jax.random.key(0), patterns=patterns, steps=2, input_dim=3)


@pytest.fixture
def megabytes(monkeypatch):
    """A machine of so many."""
    return lambda size: monkeypatch.setattr(memory, "memory", lambda: 1e6 * size)


def sampled(**options):
    given = {"num_warmup": 300, "num_samples": 60, "num_chains": 2, "space": "preactivations"}
    task = bk.tasks.endpoint([[1.0]], [1.0], 3)
    return bk.sample(jax.random.key(0), NETWORK, task, progress=False, **given | options)


def test_kernels_too_large_for_theory(megabytes):
    bk.solve(NETWORK, task(5))
    megabytes(1)
    with pytest.raises(InputError, match=r"inputs: .* 0.001 GB .*fewer patterns.*40 \* 40 numbers"):
        bk.solve(NETWORK, task(20))


def test_draws_too_many_for_memory(megabytes, tmp_path):
    megabytes(0.03)  # two chains of 60 draws of two kernels of 3 * 3, twice, take 0.02 MB
    assert sampled()["posterior"].sizes["draw"] == 60
    with pytest.raises(InputError, match=r"num_samples: .*checkpoint.*2 \* 120 draws of 21 "):
        sampled(num_samples=120)
    for space in ("kernels", "auto"):  # in float64
        with pytest.raises(InputError, match=r"num_samples: .*60 draws of 21 "):
            sampled(space=space)
    megabytes(0.025)
    with pytest.raises(InputError, match=r"num_samples: .*60 draws of 45 numbers"):
        sampled(keep=["preactivations"])
    kept = sampled(num_samples=120, checkpoint=tmp_path)  # draws stay on disk
    assert kept["posterior"].sizes["draw"] == 120
    megabytes(0.01)
    with pytest.raises(InputError, match=r"inputs: .*fewer patterns.*2 \* 50 draws"):
        sampled(checkpoint=tmp_path / "other")
