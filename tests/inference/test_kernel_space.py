"""The kernel density of linear networks against its closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer.util import log_density

import bayeskernel as bk
from bayeskernel.inference import coordinates as co
from bayeskernel.inference import kernel_space, run
from bayeskernel.inference import preactivations as pre
from bayeskernel.problem import problem

from . import references

TIED = bk.Sharing([0, 0, 0], [0, 0, 0], [0, 0, 0])
MIXED = bk.Sharing([0, 0, 1], [0, 1, 1], [0, 0, 1])


@pytest.mark.long
@pytest.mark.parametrize(
    ("sharing", "scaling", "width"),
    [
        (TIED, "mean_field", 11),
        (MIXED, "mean_field", 11),
        (MIXED, "standard", 11),
        (MIXED, "mean_field", 10**6),
    ],
    ids=["tied", "mixed", "standard", "wide"],
)
def test_density_is_its_closed_form(sharing, scaling, width, double):
    """-ln p(C) = N F0(C) + (d + 1)/2 ln det C - ln p(y|C), in the sampler's coordinates by Jacobian."""
    task = bk.Task(np.random.default_rng(0).normal(size=(3, 1, 2)), [[np.nan], [0.3], [1.5]])
    network = bk.Network(width, "linear", sharing, scaling=scaling, noise=0.4, recurrent_std=1.1)
    form = co.coordinates(problem(network, task), ((0,), (0,), (0,)))
    data = co.arrays(problem(network, task))
    K, S = references.kernel_maps(network, task, sharing)
    rows, columns = np.tril_indices(3, -1)
    upper = np.triu_indices(3)

    def position(u):
        below = jnp.zeros((3, 3)).at[rows, columns].set(u[:3])
        return {"below": below, "diagonal": u[3:]}

    @jax.jit
    def C(u):
        B = kernel_space.factor(position(u), form, data)
        return pre.full_kernel(pre.unfold(B, form, data)[0], form).reshape(3, 3)

    slopes = jax.jit(jax.jacfwd(lambda u: C(u)[upper]))

    def closed_form(u):
        c = np.asarray(C(u))
        full = K(c)
        logdet = np.linalg.slogdet(c)[1] - np.linalg.slogdet(full)[1]
        prior = width / 2 * (np.trace(np.linalg.solve(full, c)) - logdet)
        value = -prior - 4 / 2 * np.linalg.slogdet(c)[1]
        jacobian = np.asarray(slopes(u))
        return value + references.log_evidence(c, network, task, S) + np.linalg.slogdet(jacobian)[1]

    def package(u):
        # The idle entries of ``below`` are standard normal.
        return float(log_density(kernel_space.model, (form, data), {}, position(u))[0])

    rng = np.random.default_rng(1)
    points = [jnp.asarray(rng.normal(size=6)) for _ in range(4)]
    expected = [closed_form(u) - closed_form(points[0]) for u in points[1:]]
    found = [package(u) - package(points[0]) for u in points[1:]]
    # Terms of size N cancel in float64.
    assert found == pytest.approx(expected, rel=1e-8, abs=1e-11 * width + 1e-8)


def test_prior_draws_have_bartletts_distribution(double):
    """B B^T / N is Wishart: mean one, variances 2/N and 1/N."""
    network = bk.Network(20, "linear")
    task = bk.tasks.endpoint([[1.0]], [1.0], 3)
    form = co.coordinates(problem(network, task), ((0,), (0,), (0,)))
    data = co.arrays(problem(network, task))
    draw = jax.vmap(
        lambda k: kernel_space.factor(kernel_space.draw_prior(k, form, data), form, data)
    )
    count = 40_000
    B = np.asarray(draw(jax.random.split(jax.random.key(0), count)))
    Q = B @ B.swapaxes(1, 2) / 20
    variance = (1 + np.eye(3)) / 20
    assert np.abs((Q.mean(0) - np.eye(3)) / np.sqrt(variance / count)).max() < 5
    assert Q.var(axis=0) == pytest.approx(variance, rel=0.06)


def test_code_of_one_width_serves_all():
    statics = {
        run._choose(
            "kernels", bk.Network(width, "linear"), bk.tasks.endpoint([[1.0]], [1.0], 3), ()
        ).static
        for width in (20, 30, 10**6)
    }
    assert len(statics) == 1


def test_linear_kernels_go_to_kernel_space_by_default(table1_task):
    draws = bk.sample(
        jax.random.key(0), bk.Network(10**6, "linear"), table1_task,
        num_warmup=300, num_samples=5, num_chains=1, progress=False,
    )  # fmt: skip
    settings = bk.inference.record.settings(draws)
    assert settings["space"] == "kernels"
    assert "fewest dimensions" in settings["space_reason"]
    assert draws["posterior"]["kernel"].dtype == np.float64
