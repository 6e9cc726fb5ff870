"""Products of float32 are exact to float32 on every device, where JAX's default leaves accelerators to round their factors."""

import jax
import numpy as np
import pytest
from jax.extend.core.primitives import dot_general_p

import bayeskernel as bk
from bayeskernel.meanfield import crowd
from bayeskernel.meanfield.particles import moved
from bayeskernel.meanfield.sites import groups
from bayeskernel.problem import problem

NETWORK = bk.Network(12, "erf", noise=0.3)
TASK = bk.tasks.endpoint([[1.0, 0.0], [0.2, 1.0]], [1.0, -1.0], 2)


def sample(**options):
    bk.sample(
        jax.random.key(0), NETWORK, TASK, num_warmup=1, num_samples=1, num_chains=1, progress=False, **options
    )  # fmt: skip


def train():
    bk.train(jax.random.key(0), NETWORK, TASK, num_networks=1, num_steps=1, progress=False)


def move_weighted():
    moved(NETWORK.phi, np.ones((8, 4)), np.eye(4), np.eye(4), 0, 1)


def move_crowd():
    sites = groups(problem(NETWORK, TASK))[0]
    d = len(sites.members)
    particles = crowd.from_prior(sites, np.random.default_rng(0))
    particles.swept(np.eye(d), np.eye(d), jax.random.key(0), 1, symmetric=True)


@pytest.mark.parametrize(
    "run",
    [
        # What NumPyro compiles itself, and what the package does; the rest in the slow tests.
        pytest.param(lambda: sample(space="weights", sampler="nuts"), id="NUTS"),
        pytest.param(move_weighted, id="particles"),
        pytest.param(move_crowd, id="crowd"),
        pytest.param(lambda: sample(space="weights"), id="weights", marks=pytest.mark.slow),
        pytest.param(
            lambda: sample(space="preactivations", keep=("preactivations",)),
            id="pre-activations",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda: bk.sample_prior(jax.random.key(0), NETWORK, TASK, num_samples=1),
            id="prior",
            marks=pytest.mark.slow,
        ),
        pytest.param(train, id="train", marks=pytest.mark.slow),
    ],
)
def test_products_are_exact(run, monkeypatch):
    asked, bind = [], dot_general_p.bind

    def watched(first, second, **options):
        if first.dtype == np.float32:
            asked.append(options["precision"])
        return bind(first, second, **options)

    monkeypatch.setattr(dot_general_p, "bind", watched)
    jax.clear_caches()
    run()
    assert asked
    assert set(asked) == {2 * (jax.lax.Precision.HIGHEST,)}
