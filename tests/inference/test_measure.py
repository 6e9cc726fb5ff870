"""Networks that were trained elsewhere: their kernels, errors from their spread, a verdict that says what they are."""

import jax
import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel.errors import InputError

NETWORK = bk.Network(64, "erf", noise=0.3)
TASK = bk.tasks.endpoint([[1.0, 0.0], [0.5, 1.0]], [0.7, -0.4], 3)


def posterior(seed, count):
    return bk.sample(
        jax.random.key(seed), NETWORK, TASK, space="preactivations", keep=("preactivations",),
        num_warmup=200, num_samples=count, num_chains=2, progress=False,
    )  # fmt: skip


def trained(count, seed=0):
    """Activities of networks drawn from the exact posterior: the best trained networks there are."""
    draws = posterior(seed, 20 * (count // 2))
    apart = draws["posterior"].isel(draw=slice(19, None, 20))
    h = apart["preactivation"].to_numpy().reshape(-1, 3, 2, NETWORK.width)
    return np.asarray(NETWORK.phi(h)), apart["output"].to_numpy().reshape(-1, 3, 2, 1)


@pytest.fixture(scope="module")
def networks():
    return trained(24)


@pytest.fixture(scope="module")
def theory():
    return bk.solve(NETWORK, TASK)


class Tensor:
    """What other libraries have: no ndarray, but one at request."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


@pytest.mark.parametrize("convert", [np.asarray, jax.numpy.asarray, Tensor])
def test_kernels_are_second_moments_over_units(networks, convert):
    phi, outputs = networks
    tree = bk.measure(NETWORK, TASK, convert(phi), convert(outputs))
    kernel = tree["posterior"]["kernel"]
    assert kernel.dims[:4] == ("chain", "draw", "step", "pattern")
    assert kernel.shape == (24, 1, 3, 2, 3, 2)
    one = np.mean(phi[5, 2, 1] * phi[5, 0, 1])
    assert float(kernel.sel(chain=5, draw=0, step=3, pattern=1, other_step=1, other_pattern=1)) == (
        pytest.approx(one, rel=1e-5)
    )
    np.testing.assert_allclose(tree["posterior"]["output"][:, 0], outputs, rtol=1e-6)


def test_nodes_of_a_stack_are_layers_and_steps():
    network = bk.Network(8, "tanh", layers=2)
    phi = np.random.default_rng(0).normal(size=(3, 2, 3, 2, 8))
    kernel = bk.measure(network, TASK, phi.reshape(3, 6, 2, 8))["posterior"]["kernel"]
    entry = kernel.sel(layer=2, step=1, pattern=0, other_layer=1, other_step=3, other_pattern=1)
    np.testing.assert_allclose(entry[:, 0], np.mean(phi[:, 1, 0, 0] * phi[:, 0, 2, 1], axis=-1))


def test_errors_are_from_the_spread_over_networks(networks, theory):
    from bayeskernel.gauge import aligned, sign_symmetry

    tree = bk.measure(NETWORK, TASK, *networks)
    cmp = bk.compare(tree, theory)
    kernel, output = (tree["posterior"][name].to_numpy() for name in ("kernel", "output"))
    kernel = aligned(kernel, output, theory.kernel, sign_symmetry(NETWORK, TASK))[0][:, 0]
    np.testing.assert_allclose(cmp.kernel, kernel.mean(0), atol=1e-12)
    np.testing.assert_allclose(cmp.mcse, kernel.std(0, ddof=1) / np.sqrt(24), atol=1e-12)
    assert np.all(cmp.ess == 24)
    assert cmp.agrees
    assert cmp.verdict.startswith("24 measured networks and theory agree")


def test_limits_on_z_are_student_s(networks, theory):
    many, few = (bk.compare(bk.measure(NETWORK, TASK, networks[0][:n]), theory) for n in (24, 3))
    # Quantile 1 - 1e-4 / 42 of Student's t: with two degrees of freedom in closed form.
    p = 1 - 1e-4 / 42
    assert few.threshold == pytest.approx((2 * p - 1) * np.sqrt(2 / (4 * p * (1 - p))), rel=1e-6)
    assert 4.6 < many.threshold < 7


def test_other_networks_disagree(networks, theory):
    scaled = bk.measure(NETWORK, TASK, 1.2 * networks[0])
    cmp = bk.compare(scaled, theory)
    assert not cmp.agrees
    assert cmp.verdict.startswith("24 measured networks and theory DISAGREE")


def test_draws_and_networks_agree_in_distribution(networks):
    """Mean kernels of networks that are posterior draws are those of the chain, in its errors."""
    chain = posterior(9, 400)
    diagonal = [
        np.einsum("cdtata->cdta", draws["posterior"]["kernel"].to_numpy())
        for draws in (chain, bk.measure(NETWORK, TASK, *networks))
    ]
    mean, sem = diagonal[1].mean((0, 1)), diagonal[1].std((0, 1), ddof=1) / np.sqrt(24)
    assert np.max(np.abs(mean - diagonal[0].mean((0, 1))) / sem) < 4.5


def test_few_networks_are_refused_where_an_error_is_needed(networks, theory):
    two = bk.measure(NETWORK, TASK, networks[0][:2])
    with pytest.raises(InputError, match="at least 3 networks, whose spread gives the error"):
        bk.compare(two, theory)
    assert bk.diagnose(two).verdict == "Failed: 2 networks, 3 are needed for an error."
    one = bk.diagnose(bk.measure(NETWORK, TASK, networks[0][0]))
    assert not one.ok
    assert np.isnan(one.table["mcse"]).all()


def test_diagnosis_knows_no_chains(networks):
    found = bk.diagnose(bk.measure(NETWORK, TASK, *networks))
    assert found.ok
    assert found.networks == 24
    assert list(found.table.columns) == ["mean", "std", "mcse"]
    assert found.table.index[0] == "norm[1,1]"
    assert "24 networks trained one by one" in found.verdict


@pytest.mark.parametrize("given", [True, False])
def test_report_and_plots_take_them(networks, theory, tmp_path, given):
    phi, outputs = networks
    tree = bk.measure(NETWORK, TASK, phi, outputs if given else None)
    assert np.isnan(tree["posterior"]["output"]).all() != given
    bk.plots.plot_predictions(tree)
    bk.plots.plot_kernel(tree)
    page = bk.report(bk.compare(tree, theory), tmp_path / "report.html").read_text()
    assert "24 measured networks and theory agree" in page
    assert "bk.measure(network, task, activities, outputs)" in page


def test_they_are_kept_on_disk(networks, theory, tmp_path):
    tree = bk.load(bk.save(bk.measure(NETWORK, TASK, *networks), tmp_path / "networks.nc"))
    assert bk.compare(tree, theory).networks == 24


@pytest.mark.parametrize(
    ("activities", "outputs", "said"),
    [
        (np.ones((3, 2, 63)), None, r"activities: expected shape \(3, 2, 64\) or \(networks, 3, 2"),
        (np.ones((0, 3, 2, 64)), None, "activities: expected shape"),
        (np.ones((4, 64)), None, "activities: expected shape"),
        (np.ones((3, 2, 64)) * 1j, None, "activities: expected real numbers"),
        (np.ones((2, 3, 2, 64)), np.ones((3, 3, 2, 1)), "outputs: expected those of 2 networks"),
        (np.ones((2, 3, 2, 64)), np.ones((2, 3, 1, 2)), "outputs: expected shape"),
    ],
)
def test_what_does_not_fit_is_refused(activities, outputs, said):
    with pytest.raises(InputError, match=said):
        bk.measure(NETWORK, TASK, activities, outputs)


def test_broken_networks_are_named(networks):
    phi = networks[0][:4].copy()
    phi[2, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"finite numbers, got others in networks \[2\]"):
        bk.measure(NETWORK, TASK, phi)
