"""How chains are run."""

import jax
import pytest

import bayeskernel as bk
from bayeskernel.inference import chains, run
from bayeskernel.inference.spaces import SPACES


@pytest.mark.parametrize(
    ("space", "algorithm"),
    [("weights", "hmc"), ("weights", "nuts"), ("preactivations", "hmc"), ("kernels", "nuts")],
)
def test_a_shape_is_compiled_once(space, algorithm, table1_task):
    """A state that changed its type on the way, were it only weakly typed, would be compiled for again."""
    with jax.enable_x64(space == "kernels"):
        network = bk.Network(8, "linear")
        chosen = run._choose(space, network, table1_task, ())
        sampler = chains.build(SPACES[space](chosen.static), algorithm, 10, ())
        first = jax.eval_shape(sampler.start, jax.random.key(0), chosen.data)
        later, _ = jax.eval_shape(sampler.advance, first, chosen.data, 1)
    assert jax.tree.map(str, first) == jax.tree.map(str, later)


def test_draws_hold_no_more_memory_than_they_need(monkeypatch, table1_task):
    """Slow transitions come one by one, out of buffers made for many."""
    monkeypatch.setattr(chains, "_CHUNK_SECONDS", 0.0)
    parts = []

    def joined(rows):
        parts.extend(rows)
        return original(rows)

    original = chains.joined
    monkeypatch.setattr(chains, "joined", joined)
    bk.sample(
        jax.random.key(0), bk.Network(8, "linear"), table1_task,
        num_warmup=300, num_samples=5, num_chains=1, progress=False,
    )  # fmt: skip
    assert len(parts) == 5
    for values in (values for part in parts for values in part.values()):
        assert values.base is None
        assert len(values) == 1
