"""The NumPyro model against explicit loops, and what `sample` returns."""

import json

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from numpyro.infer.util import log_density
from scipy.stats import norm

import bayeskernel as bk
from bayeskernel.errors import InputError
from bayeskernel.inference import weights
from bayeskernel.inference.run import _choose
from bayeskernel.kernels import representational_kernel
from tests.conftest import normals

SHARING = bk.Sharing([0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1])
QUICK = {
    "space": "weights",
    "num_warmup": 50,
    "num_samples": 10,
    "num_chains": 2,
    "progress": False,
}


def loops(z, network, task, sharing):
    """Run the network unit by unit, pattern by pattern; returns kernel, output, log likelihood."""
    T, P, D, O = task.shape  # noqa: E741
    N, phi = network.width, lambda x: float(network.phi(jnp.asarray(x)))
    activity = np.zeros((T, P, N))
    output, log_likelihood = np.zeros((T, P, O)), 0.0
    for t in range(T):
        U = z["input"][sharing.input[t]] * network.input_std / np.sqrt(D)
        v = z["readout"][sharing.readout[t]] * network.readout_std
        for a in range(P):
            h = U @ task.inputs[t, a]
            if t:
                # Recurrent labels 0, 0, 1, 1: step 2 uses the first matrix, steps 3 and 4 the second.
                W = z["recurrent"][sharing.recurrent[t]] * network.recurrent_std / np.sqrt(N)
                h = h + W @ activity[t - 1, a]
            activity[t, a] = [phi(x) for x in h]
            scale, variance = 1 / N, network.noise / N
            if network.scaling == "standard":
                scale, variance = 1 / np.sqrt(N), network.noise
            output[t, a] = scale * v @ activity[t, a]
            for o in range(O):
                if not np.isnan(task.targets[t, a, o]):
                    error = task.targets[t, a, o] - output[t, a, o]
                    log_likelihood += norm.logpdf(error, scale=np.sqrt(variance))
    flat = activity.reshape(T * P, N)
    return (flat @ flat.T / N).reshape(T, P, T, P), output, log_likelihood


@pytest.mark.parametrize("scaling", ["mean_field", "standard"])
@pytest.mark.parametrize("activation", ["linear", "erf", "relu"])
def test_model_is_its_definition(activation, scaling, general_task, double):
    network = bk.Network(
        3, activation, SHARING, scaling=scaling,
        input_std=0.7, recurrent_std=1.3, readout_std=1.2, noise=0.2,
    )  # fmt: skip
    net, data = weights.structure(network, 4), weights.arrays(network, general_task)
    z = normals(net, general_task)
    kernel, output, log_likelihood = loops(
        jax.tree.map(np.asarray, z), network, general_task, SHARING
    )
    prior = sum(float(norm.logpdf(v).sum()) for v in z.values())
    value, trace = log_density(weights.model, (net, data), {}, z)
    assert float(value) == pytest.approx(prior + log_likelihood, rel=1e-10)
    assert np.asarray(trace["kernel"]["value"]) == pytest.approx(kernel, rel=1e-10)
    assert np.asarray(trace["output"]["value"]) == pytest.approx(output, rel=1e-10)


def test_prior_draws_are_standard_normal_and_independent():
    network, task = bk.Network(40, "linear", SHARING), bk.tasks.sine(2, 4)
    net, data = weights.structure(network, 4), weights.arrays(network, task)
    z = weights.draw_prior(jax.random.key(0), net, data)
    values = np.concatenate([np.asarray(v).ravel() for v in z.values()])
    # No site repeats another: equal random bits would make equal tails.
    assert not np.array_equal(
        np.asarray(z["recurrent"]).ravel()[:80], np.asarray(z["input"]).ravel()[:80]
    )
    assert abs(values.mean()) < 5 / np.sqrt(len(values))
    assert abs(values.var() - 1) < 5 * np.sqrt(2 / len(values))


@pytest.fixture(scope="module")
def run():
    task = bk.tasks.sine(2, 3, supervised=[1, 3])
    network = bk.Network(12, "tanh", bk.Sharing("tied", "untied", [0, 1, 0]), noise=0.2)
    keep = ("weights", "preactivations")
    return network, task, bk.sample(jax.random.key(1), network, task, keep=keep, **QUICK)


def test_datatree_follows_the_schema(run):
    _network, task, draws = run
    assert isinstance(draws, xr.DataTree)
    assert set(draws) == {"posterior", "sample_stats", "observed_data", "constant_data"}
    posterior = draws["posterior"].to_dataset()
    sites = ("step", "pattern", "other_step", "other_pattern")
    assert posterior["kernel"].dims == ("chain", "draw", *sites)
    assert posterior["preactivation_kernel"].dims == ("chain", "draw", *sites)
    assert posterior["output"].dims == ("chain", "draw", "step", "pattern", "output_unit")
    assert posterior.sizes["chain"] == 2
    assert posterior.sizes["draw"] == 10
    assert list(posterior["step"].values) == [1, 2, 3]
    stats = {"lp", "energy", "diverging", "n_steps", "tree_depth", "acceptance_rate", "step_size"}
    assert stats <= set(draws["sample_stats"])
    assert np.array_equal(draws["observed_data"]["targets"], task.targets, equal_nan=True)
    assert np.array_equal(draws["constant_data"]["inputs"], task.inputs)
    assert json.loads(draws.attrs["network"])["width"] == 12
    assert json.loads(draws.attrs["settings"])["rng_key"] == [0, 1]
    assert draws.attrs["jax_version"] == jax.__version__


def test_stored_weights_give_the_stored_kernels_and_outputs(run):
    _network, task, draws = run
    w = {
        k: draws["posterior"][f"{k}_weights"].to_numpy()[1, 4]
        for k in ("recurrent", "input", "readout")
    }
    assert w["recurrent"].shape == (1, 12, 12)
    assert w["input"].shape == (3, 12, 2)
    phi, output = np.zeros((3, 2, 12)), np.zeros((3, 2, 1))
    for t in range(3):
        h = task.inputs[t] @ w["input"][t].T
        if t:
            h = h + phi[t - 1] @ w["recurrent"][0].T
        stored = draws["posterior"]["preactivation"].to_numpy()[1, 4, t]
        assert stored == pytest.approx(h, abs=1e-5)
        phi[t] = np.tanh(h)
        output[t] = phi[t] @ w["readout"][[0, 1, 0][t]].T / 12
    kernel = np.einsum("tai,sbi->tasb", phi, phi) / 12
    assert draws["posterior"]["kernel"].to_numpy()[1, 4] == pytest.approx(kernel, abs=1e-5)
    assert draws["posterior"]["output"].to_numpy()[1, 4] == pytest.approx(output, abs=1e-5)


def test_preactivation_kernel_is_computed_from_the_kernel(run):
    _network, task, draws = run
    C, K = (draws["posterior"][k].to_numpy()[0, 3] for k in ("kernel", "preactivation_kernel"))
    expected = np.zeros((3, 2, 3, 2))
    expected[1:, :, 1:] = C[:2, :, :2]
    for t in range(3):  # input weights are untied
        expected[t, :, t] += task.inputs[t] @ task.inputs[t].T / 2
    assert pytest.approx(expected, abs=1e-6) == K


def test_prediction_for_training_patterns_is_the_stored_output(run):
    network, task, draws = run
    again = bk.predict(jax.random.key(0), draws, network, task, task.inputs)
    assert again["output"].to_numpy() == pytest.approx(
        draws["posterior"]["output"].to_numpy(), abs=1e-5
    )


def test_netcdf_keeps_everything(run, tmp_path):
    draws = run[2]
    draws.to_netcdf(tmp_path / "draws.nc", engine="h5netcdf")
    back = xr.open_datatree(tmp_path / "draws.nc", engine="h5netcdf")
    assert back.attrs == draws.attrs
    for group in draws:
        xr.testing.assert_identical(back[group].to_dataset().load(), draws[group].to_dataset())
    back.close()


def test_arviz_reads_the_tree(run):
    draws = run[2]
    # ArviZ 0.23 has its own container and a bridge to it; 1.x takes the tree itself.
    native = az.from_datatree(draws) if hasattr(az, "from_datatree") else draws
    summary = az.summary(native, var_names=["output"])
    assert len(summary) == 6
    assert az.ess(draws["posterior"].to_dataset())["kernel"].shape == (3, 2, 3, 2)


@pytest.mark.long
def test_same_key_same_draws(table1_task):
    def kernels(seed):
        options = {"num_warmup": 300, "num_samples": 10, "num_chains": 2, "progress": False}
        network = bk.Network(8, "linear")
        return bk.sample(jax.random.key(seed), network, table1_task, **options)["posterior"][
            "kernel"
        ]

    assert np.array_equal(kernels(3), kernels(3))
    assert not np.array_equal(kernels(3), kernels(4))


def assert_same(space, one, two, task):
    """The same compiled code is given the same numbers."""
    one, two = (_choose(space, bk.Network(8, "linear", s), task, ()) for s in (one, two))
    assert one.static == two.static
    jax.tree.map(np.testing.assert_array_equal, one.data, two.data)


@pytest.mark.parametrize("space", ["weights", "preactivations", "kernels"])
def test_labels_decide_sharing(space, table1_task):
    assert_same(space, "tied", [2, 2, 2], table1_task)
    assert_same(space, "untied", [2, 0, 1], table1_task)
    with pytest.raises(AssertionError):
        assert_same(space, "tied", "untied", table1_task)
    assert_same(space, "tied", "untied", bk.tasks.endpoint([[1.0, 0.5]], [1.0], 1))  # one step


def test_permuting_patterns_permutes_kernels(general_task):
    network = bk.Network(6, "erf", SHARING)
    net, data = weights.structure(network, 4), weights.arrays(network, general_task)
    swapped = weights.arrays(
        network, bk.Task(general_task.inputs[:, ::-1], general_task.targets[:, ::-1])
    )
    z = normals(net, general_task)
    kernel, moved = (
        np.asarray(representational_kernel(network.phi(weights.preactivations(z, net, arrays))))
        for arrays in (data, swapped)
    )
    assert moved == pytest.approx(kernel[:, ::-1][:, :, :, ::-1], rel=1e-5)


def test_prior_samples_have_no_chain_statistics(table1_task):
    prior = bk.sample_prior(jax.random.key(0), bk.Network(8, "relu"), table1_task, num_samples=300)
    assert prior["prior"]["kernel"].shape == (1, 300, 3, 1, 3, 1)
    assert "sample_stats" not in prior


@pytest.mark.long
def test_float64_is_the_callers_choice_and_weights_are_not_stored_unasked(run, table1_task):
    with jax.enable_x64(True):
        draws = bk.sample(jax.random.key(0), bk.Network(8, "linear"), table1_task, **QUICK)
    assert draws["posterior"]["kernel"].dtype == np.float64
    assert run[2]["posterior"]["kernel"].dtype == np.float32
    assert set(draws["posterior"].data_vars) == {"kernel", "output", "preactivation_kernel"}


BAD = {
    "no key": ({"rng_key": 0}, "rng_key: expected one JAX key"),
    "many keys": (
        {"rng_key": jax.random.split(jax.random.key(0))},
        "rng_key: expected one JAX key",
    ),
    "space": ({"space": "functions"}, "space: expected"),
    "kernels of tanh": ({"space": "kernels", "network": bk.Network(8, "tanh")}, "space: expected"),
    "kernels of a narrow network": (
        {"space": "kernels", "network": bk.Network(2, "linear")},
        "width: expected at least the rank 3",
    ),
    "hmc on kernels": ({"space": "kernels", "sampler": "hmc"}, "sampler: expected 'nuts'"),
    "weights from pre-activations": (
        {"space": "preactivations", "keep": ("weights",)},
        "keep: expected a subset",
    ),
    "sampler": ({"sampler": "gibbs"}, "sampler: expected 'auto', 'nuts' or 'hmc'"),
    "keep": ({"keep": "weights"}, "keep: expected a sequence"),
    "keep unknown": ({"keep": ("gradients",)}, "keep: expected a sequence"),
    "samples": ({"num_samples": 0}, "num_samples: expected an integer >= 1"),
    "chains": ({"num_chains": 0}, "num_chains: expected an integer >= 1"),
    "warm-up": ({"num_warmup": -1}, "num_warmup: expected an integer >= 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name, table1_task):
    settings, message = BAD[name]
    defaults = {"rng_key": jax.random.key(0), "network": bk.Network(8, "linear")}
    with pytest.raises(InputError) as caught:
        bk.sample(task=table1_task, **{**defaults, **settings})
    assert message in str(caught.value)


def test_prediction_refuses_other_draws(run, table1_task):
    network, task, draws = run
    key = jax.random.key(0)
    with pytest.raises(InputError, match="draws: expected a run of this network"):
        bk.predict(key, draws, bk.Network(13, "tanh"), task, task.inputs)
    with pytest.raises(InputError, match="draws: expected a run on this task's targets"):
        bk.predict(key, draws, network, task.scaled(2), task.inputs)
    with pytest.raises(InputError, match="inputs: expected shape"):
        bk.predict(key, draws, network, task, task.inputs[:2])
    slim = draws.copy()
    kept = ["readout_weights", "recurrent_weights", "input_weights", "preactivation"]
    slim["posterior"] = xr.DataTree(draws["posterior"].to_dataset().drop_vars(kept))
    with pytest.raises(InputError, match="draws: expected draws made with keep"):
        bk.predict(key, slim, network, task, task.inputs)
