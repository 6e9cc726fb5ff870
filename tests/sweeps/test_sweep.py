"""Every point of a grid: right, kept, found again, and refused where it makes no sense."""

import functools
import itertools
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel import kernels
from bayeskernel.meanfield.path import solve_path
from bayeskernel.sweeps.description import read_description
from bayeskernel.sweeps.grid import checked_grid, sample_file, theory_file

NET = bk.Network(64, "linear", noise=0.1)
TASK = bk.tasks.endpoint([[1.0]], [1.0], 3)
QUICK = {"space": "kernels", "num_warmup": 300, "num_samples": 200, "num_chains": 2}
GRID = {"signal": [1.0, 4.5], "sharing": ["tied", "untied"], "seed": [0, 1]}


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")}


def some_digits(patterns):
    return bk.tasks.digits((0, 1), patterns // 2, 2)


def some_steps(steps):
    return bk.tasks.endpoint([[1.0]], [1.0], steps)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "out"
    return bk.sweep(NET, TASK, GRID, sample=QUICK, out=folder), folder


@pytest.mark.long
def test_points_are_those_of_solve_and_sample(swept):
    data, _ = swept
    assert bool(data["ok"].sel(source="theory").all())
    assert set(data["status"].sel(source="theory").values.ravel()) == {"converged"}
    for sharing in GRID["sharing"]:
        for signal in GRID["signal"]:
            here = data.sel(sharing=sharing, signal=signal)
            network = bk.Network(64, "linear", sharing, noise=0.1)
            theory = bk.solve(network, TASK.scaled(signal))
            for seed in GRID["seed"]:
                found = here["kernel"].sel(source="theory", seed=seed).to_numpy()
                np.testing.assert_allclose(found, theory.kernel, atol=1e-6)
            std = here["kernel_std"].sel(source="theory", seed=0).to_numpy()
            np.testing.assert_allclose(std, theory.kernel_std(), atol=1e-6)
            np.testing.assert_allclose(here["free_energy"], theory.free_energy, atol=1e-9)
            rho = here["coherence"].sel(source="theory", seed=0).to_numpy()
            np.testing.assert_allclose(rho, bk.coherence(theory.kernel), atol=1e-6)
    # Ten correlated entries at each of eight points.
    assert float(abs(data["z"]).max()) < 6
    one, two = (data["kernel"].sel(source="sampled", seed=k) for k in (0, 1))
    assert not np.any(one.sel(signal=4.5) == two.sel(signal=4.5))


@pytest.mark.long
def test_the_sample_of_a_point_does_not_depend_on_the_grid(swept, tmp_path):
    data, _ = swept
    alone = bk.sweep(
        bk.Network(64, "linear", noise=0.1),
        TASK,
        {"signal": [4.5], "seed": [1]},
        sample=QUICK,
        out=tmp_path / "alone",
    )
    np.testing.assert_array_equal(
        alone["kernel"].sel(source="sampled").isel(signal=0, seed=0),
        data["kernel"].sel(source="sampled", signal=4.5, seed=1, sharing="tied"),
    )


@pytest.mark.long
def test_what_is_there_is_not_computed_again_and_what_is_damaged_is(swept):
    data, folder = swept
    before = files(folder)
    lost, altered = sorted(path for path in before if "samples" in str(path))[:2]
    lost.unlink()
    content = bytearray(altered.read_bytes())
    content[200] ^= 1
    altered.write_bytes(content)
    # A dataset opens at any time; what is missing says so.
    partial = bk.open_sweep(folder)
    assert int((partial["status"] == "not computed").sum()) == 2
    assert (
        int(partial["kernel"].sel(source="sampled").isnull().all(partial["z"].dims[-4:]).sum()) == 2
    )
    again = bk.sweep(NET, TASK, GRID, sample=QUICK, out=folder)
    after = files(folder)
    assert {path for path in after if after[path] != before.get(path)} == {lost, altered}
    assert again.identical(data)


@pytest.mark.long
def test_a_larger_grid_adds_to_a_smaller_one(swept, tmp_path):
    data, smaller = swept
    # Tests run in any order, and a folder keeps what was added to it.
    folder = shutil.copytree(smaller, tmp_path / "out")
    before = files(folder)
    larger = GRID | {"signal": [1.0, 2.0, 4.5]}
    more = bk.sweep(NET, TASK, larger, sample=QUICK, out=folder)
    after = files(folder)
    assert {path for path in before if after[path] != before[path]} == set()
    assert more["signal"].values.tolist() == [1.0, 2.0, 4.5]
    assert more.sel(signal=[1.0, 4.5])["kernel"].identical(data["kernel"])
    # Back to the smaller grid: nothing is forgotten.
    assert bk.sweep(NET, TASK, GRID, sample=QUICK, out=folder).identical(more)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"network": bk.Network(64, "linear", noise=0.1, readout_std=2.0)}, "network"),
        ({"task": bk.tasks.endpoint([[1.0]], [2.0], 3)}, "task of 3 steps"),
        ({"sample": QUICK | {"num_samples": 5}}, "sample"),
    ],
)
@pytest.mark.long
def test_a_folder_of_another_sweep_is_refused(swept, changed, name):
    given = {"network": NET, "task": TASK, "sample": QUICK} | changed
    with pytest.raises(bk.InputError, match=f"out: expected a sweep with {name}"):
        bk.sweep(given["network"], given["task"], GRID, sample=given["sample"], out=swept[1])


@pytest.mark.long
def test_errors_are_results_and_do_not_stop_the_rest(tmp_path):
    grid = {"width": [2, 16]}  # N < d cannot be sampled in kernels
    data = bk.sweep(NET, TASK, grid, sample=QUICK, out=tmp_path / "out")
    narrow, wide = (data.sel(source="sampled", width=width) for width in grid["width"])
    assert "InputError: width: expected at least the rank 3" in narrow["status"].item()
    assert not narrow["ok"]
    assert np.isnan(narrow["kernel"]).all()
    assert np.isfinite(wide["kernel"]).all()
    before = files(tmp_path)
    bk.sweep(NET, TASK, grid, sample=QUICK, out=tmp_path / "out")
    assert files(tmp_path) == before


@pytest.mark.long
def test_hysteresis_is_seen_along_the_signal(tmp_path):
    """T = 8: two branches between the end of the coherent one and the spinodal, 0.7784."""
    signals = [0.5, 0.74, 0.77, 0.79, 1.0]
    data = bk.sweep(NET, some_steps, {"signal": signals, "steps": [8]}, out=tmp_path / "out")
    here = data["branch_coherence"].isel(steps=0).sel(step=1, other_step=8)
    up, down = (here.sel(direction=way).to_numpy() for way in ("up", "down"))
    np.testing.assert_allclose(up[:3], 0, atol=1e-5)
    assert np.all(up[3:] > 0.05)
    assert np.all(down[1:] > 0.03)
    np.testing.assert_allclose(up[[0, 3, 4]], down[[0, 3, 4]], atol=1e-5)
    # Above the coexistence, 0.7032, the coherent branch is the better one.
    chosen = data["coherence"].isel(steps=0).sel(source="theory", step=1, other_step=8)
    np.testing.assert_allclose(chosen, down, atol=1e-5)


@pytest.mark.parametrize(
    "activation",
    [pytest.param("linear", marks=pytest.mark.long), pytest.param("erf", marks=pytest.mark.slow)],
)
def test_a_path_meets_the_solutions_of_each_signal(activation):
    signals = [3.5, 0.0, 2.5]
    network = bk.Network(1, activation, noise=0.1)
    stages = list(solve_path(network, TASK, signals))
    assert [(s.direction, s.position) for s in stages] == [
        ("up", 1), ("up", 2), ("up", 0), ("down", 0), ("down", 2), ("down", 1),
    ]  # fmt: skip
    for stage in stages:
        alone = bk.solve(network, TASK.scaled(signals[stage.position]))
        assert stage.theory.converged
        # Grids are matched to where a solution came from.
        np.testing.assert_allclose(stage.theory.kernel, alone.kernel, atol=2e-4)
        np.testing.assert_allclose(stage.theory.free_energy, alone.free_energy, atol=2e-4)
        np.testing.assert_array_equal(stage.theory.task.targets, alone.task.targets)
        for name in ("kernel_std", "kernel_shift", "output_std", "output_shift"):
            one, two = (getattr(theory, name)(1) for theory in (stage.theory, alone))
            np.testing.assert_allclose(one, two, rtol=0.01, atol=2e-3, err_msg=name)


def test_steps_of_different_numbers_are_filled_up():
    found = checked_grid(NET, some_steps, {"steps": [2, 4]})
    assert len(found) == 2
    assert [found.problem(line)[1].shape[0] for line in found.lines()] == [2, 4]


def test_numbers_of_patterns_are_filled_up(tmp_path):
    """Each point is the task of its own number, and what a smaller one does not have is NaN."""
    grid = {"patterns": [2, 4], "signal": [1.0, 2.0]}
    data = bk.sweep(NET, some_digits, grid, out=tmp_path)
    for patterns, signal in itertools.product(*grid.values()):
        theory = bk.solve(NET, some_digits(patterns).scaled(signal))
        here = data.sel(patterns=patterns, signal=signal, source="theory")
        own = here["kernel"].isel(pattern=slice(patterns), other_pattern=slice(patterns))
        np.testing.assert_allclose(own, theory.kernel, atol=1e-6)
        np.testing.assert_allclose(here["coherence"], kernels.coherence(theory.kernel), atol=1e-6)
    assert data["kernel"].sel(patterns=2).isel(pattern=[2, 3]).isnull().all()
    # A larger grid adds to a smaller one; one number of patterns is another sweep.
    more = bk.sweep(NET, some_digits, {"patterns": [6], "signal": [1.0]}, out=tmp_path)
    assert more["patterns"].values.tolist() == [2, 4, 6]
    assert (
        more["kernel"]
        .sel(patterns=[2, 4])
        .isel(pattern=slice(4), other_pattern=slice(4))
        .equals(data["kernel"])
    )
    with pytest.raises(bk.InputError, match="out: expected a sweep with patterns = 2"):
        bk.sweep(NET, some_digits(2), {"signal": [1.0]}, out=tmp_path)


def test_files_are_named_by_their_point(tmp_path):
    found = checked_grid(NET, TASK, {"sharing": [[0, 0, 1], bk.Sharing("untied")], "signal": [2]})
    points = [p for line in found.lines() for p in found.within(line)]
    names = [str(sample_file(tmp_path, p).relative_to(tmp_path)) for p in points]
    assert names[0] == (
        "samples/sharing=0,0,1,activation=linear,steps=3,noise=0.1/signal=2.0,width=64,seed=0.npz"
    )
    assert "recurrent=untied;input=tied;readout=tied" in names[1]
    assert len({theory_file(tmp_path, p) for p in points}) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"grid": {"depth": [1]}}, "grid: expected axes among"),
        ({"grid": [1.0]}, "grid: expected a mapping"),
        ({"grid": {"signal": 1.0}}, r"grid\['signal'\]: expected a list of values"),
        ({"grid": {"signal": []}}, "expected at least one value, none twice"),
        ({"grid": {"signal": [1, 1.0]}}, "expected at least one value, none twice"),
        ({"grid": {"signal": [np.nan]}}, r"grid\['signal'\]: expected a finite number > 0"),
        ({"grid": {"noise": [0.0]}}, r"grid\['noise'\]: expected a finite number > 0"),
        ({"grid": {"width": [0]}}, r"grid\['width'\]: expected an integer >= 1"),
        ({"grid": {"seed": [-1]}}, r"grid\['seed'\]: expected whole numbers from 0"),
        ({"grid": {"sharing": "tied"}}, r"grid\['sharing'\]: expected a list of values"),
        ({"grid": {"sharing": [[0, 1]]}}, "sharing: expected 3 labels"),
        ({"grid": {"activation": ["step"]}}, "activation: expected one of"),
        ({"grid": {"steps": [3]}}, "task: expected a function of steps"),
        ({"task": some_steps}, "task: expected a Task, or with steps or patterns in the grid a"),
        (
            {"task": some_digits, "grid": {"patterns": [3]}},
            r"task\(patterns\): .* 3 patterns, got 2",
        ),
        (
            {"task": some_digits, "grid": {"patterns": [0]}},
            r"grid\['patterns'\]: expected an integer",
        ),
        (
            {"grid": {"patterns": [2], "steps": [3]}},
            "task: expected a function of steps and patterns",
        ),
        ({"task": lambda _: TASK, "grid": {"steps": [4]}}, "expected a task of 4 steps, got 3"),
        ({"sample": {"draws": 3}}, "sample: expected options among"),
        ({"solve": False}, "sample, solve: expected samples, theory or both"),
        ({"client": "here"}, "client: expected None, a number of processes"),
        ({"client": 0}, "client: expected an integer >= 1"),
    ],
)
def test_what_makes_no_sweep_is_refused(given, message, tmp_path):
    given = {"task": TASK, "grid": {"signal": [1.0]}} | given
    task, grid = given.pop("task"), given.pop("grid")
    with pytest.raises(bk.InputError, match=message):
        bk.sweep(NET, task, grid, out=tmp_path / "out", **given)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(bk.InputError, match="out: expected a new folder or that of a sweep"):
        bk.sweep(NET, TASK, {"signal": [1.0]}, out=tmp_path)
    with pytest.raises(bk.InputError, match="folder: expected the folder of a sweep"):
        bk.open_sweep(tmp_path)


TOML = """
[task]
name = "endpoint"
patterns = [[1.0]]
labels = [1.0]

[network]
width = 32
activation = "linear"

[grid]
signal = { start = 1.0, stop = 4.0, count = 2, spacing = "log" }
steps = [2, 3]
"""


@pytest.mark.long
def test_command_line_reads_a_description(tmp_path, command):
    (tmp_path / "sweep.toml").write_text(TOML)
    done = command("sweep", "sweep.toml", "--out", "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"points": 4, "ok": {"theory": 4}, "folder": "out"}
    data = bk.open_sweep(tmp_path / "out")
    np.testing.assert_allclose(data["signal"], [1, 4])
    # Two steps where others have three.
    here = data["kernel"].sel(source="theory", steps=2)
    assert np.isnan(here.sel(step=3)).all()
    assert np.isfinite(here.sel(step=[1, 2], other_step=[1, 2])).all()


def test_a_description_may_sweep_over_both_sizes(tmp_path):
    text = '[task]\nname = "digits"\nclasses = [3, 8]\n[grid]\nsteps = [2, 4]\npatterns = [2, 6]\n'
    (tmp_path / "sweep.toml").write_text(text)
    given = read_description(tmp_path / "sweep.toml")
    found = checked_grid(given["network"], given["task"], given["grid"])
    for (steps, patterns), task in found.tasks.items():
        np.testing.assert_array_equal(
            task.inputs, bk.tasks.digits((3, 8), patterns // 2, steps).inputs
        )
    (tmp_path / "sweep.toml").write_text(text.replace("6", "5"))
    given = read_description(tmp_path / "sweep.toml")
    with pytest.raises(
        bk.InputError, match="patterns: expected a multiple of the 2 classes, got 5"
    ):
        checked_grid(given["network"], given["task"], given["grid"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[grid]", "[gird]"), "FILE: expected nothing but"),
        (("[task]", "[task"), "FILE: expected a TOML file"),
        (('"endpoint"', '"mnist"'), "[task] name: expected one of"),
        (("labels", "label"), "[task]: expected arguments of endpoint"),
        (("width", "widht"), "[network]: expected arguments of Network"),
        (("count = 2", "counts = 2"), "[grid] signal: expected a list, or start, stop, count"),
        (("[2, 3]", "[2, 3]\n[run]"), "FILE: expected nothing but"),
        (
            ("[2, 3]", "[2, 3]\npatterns = [1]"),
            "[task] patterns: expected none, as [grid] has patterns",
        ),
    ],
)
def test_a_bad_description_is_refused(change, message, tmp_path):
    (tmp_path / "sweep.toml").write_text(TOML.replace(*change))

    def check():
        given = read_description(tmp_path / "sweep.toml")
        checked_grid(given["network"], given["task"], given["grid"])

    with pytest.raises(bk.InputError, match=re.escape(message)):
        check()


def test_command_line_refuses_in_one_line(tmp_path, command):
    (tmp_path / "sweep.toml").write_text(TOML.replace('"endpoint"', '"mnist"'))
    done = command("sweep", "sweep.toml")
    assert done.returncode == 2
    assert "error: [task] name: expected one of" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_activation_that_cannot_travel_is_refused(tmp_path):
    network = bk.Network(32, functools.partial(lambda rate, x: jnp.tanh(rate * x), 2.0))
    with pytest.raises(bk.InputError, match="activation: expected a function of a module"):
        bk.sweep(network, TASK, {}, out=tmp_path / "sweep", client=2)
