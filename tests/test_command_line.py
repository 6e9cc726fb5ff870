"""The command line's own matters: data from files, compiled code kept between runs, the browser."""

import subprocess
import sys
import webbrowser

import jax
import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel.cli.held_out import images
from bayeskernel.cli.options import task_of
from bayeskernel.errors import InputError
from bayeskernel.inference.run import sample_with_units

TABLE = """step,pattern,x1,x2,y1
1,0,1.0,0.5,
1,1,-1.0,0.25,
2,1,0,0,-2
2,0,0,0,2
"""


def test_a_table_is_a_task(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text(TABLE)
    task = bk.tasks.from_arrays(file)
    assert task.name == "mine"
    assert np.array_equal(task.inputs, [[[1, 0.5], [-1, 0.25]], [[0, 0], [0, 0]]])
    assert np.array_equal(task.targets[..., 0], [[np.nan, np.nan], [2, -2]], equal_nan=True)


@pytest.mark.parametrize("targets", [np.full((3, 2), 0.5), np.full((3, 2, 4), 0.5)])
def test_an_archive_is_a_task(tmp_path, targets):
    inputs = np.random.default_rng(0).normal(size=(3, 2, 5))
    targets[0] = np.nan
    np.savez(tmp_path / "mine.npz", inputs=inputs, targets=targets)
    task = bk.tasks.from_arrays(str(tmp_path / "mine.npz"))
    assert np.array_equal(task.inputs, inputs)
    assert np.array_equal(task.targets.reshape(targets.shape), targets, equal_nan=True)


BAD = {
    "no column step": (TABLE.replace("step", "time"), "columns step, pattern, x1 to xD"),
    "no inputs": ("step,pattern,y1\n1,0,2\n", "columns step, pattern, x1 to xD"),
    "no targets": ("step,pattern,x1\n1,0,2\n", "columns step, pattern, x1 to xD"),
    "a gap in the columns": (TABLE.replace("x2", "x3"), "columns step, pattern, x1 to xD"),
    "a column twice": (TABLE.replace("x2", "x1"), "columns step, pattern, x1 to xD"),
    "an unknown column": (TABLE.replace("x2", "z"), "columns step, pattern, x1 to xD"),
    "nothing": ("", "got none"),
    "no rows": ("step,pattern,x1,y1\n", "got none of step 1, pattern 0"),
    "a row missing": (TABLE.replace("2,1,0,0,-2\n", ""), "got none of step 2, pattern 1"),
    "a row far away": (TABLE + "900000000,0,0,0,\n", "got none of step 3, pattern 0"),
    "a row twice": (TABLE + "2,0,0,0,2\n", "line 6: expected one row for every step and pattern"),
    "a step that is no number": (TABLE.replace("2,1,", "b,1,"), "line 4, step: expected a whole"),
    "steps from zero": (TABLE.replace("2,1,", "0,1,"), "a whole number from 1 on, got '0'"),
    "half a pattern": (TABLE.replace("2,1,", "2,1.5,"), "line 4, pattern: expected a whole number"),
    "an endless step": (TABLE + "9" * 5000 + ",0,0,0,\n", "line 6, step: expected a whole number"),
    "an input that is no number": (TABLE.replace("0.25", "a"), "line 3, x2: expected a number"),
    "an empty input": (TABLE.replace("0.25", ""), "line 3, x2: expected a number, got ''"),
    "an infinite input": (TABLE.replace("0.25", "inf"), "inputs: expected finite numbers"),
    "a target that is no number": (TABLE.replace("-2", "two"), "line 4, y1: expected a number"),
    "no target given": (TABLE.replace(",-2", ",").replace(",2\n", ",\n"), "at least one supervised"),
    "a short row": (TABLE.replace("2,1,0,0,-2", "2,1,0"), "line 4: expected 5 values, got 3"),
    "not text": (b"\xff\xfe\x00", "a table of comma-separated values"),
    "a quote without end": (TABLE + '"' + "a" * 200_000, "a table of comma-separated values"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_refused_in_one_line(name, tmp_path, command):
    content, message = BAD[name]
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / "mine.csv").write_bytes(content)
    done = command("solve", "--data", "mine.csv")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def bad_archives(folder):
    good = {"inputs": np.ones((2, 1, 1)), "targets": np.ones((2, 1))}
    np.savez(folder / "one.npz", inputs=good["inputs"])
    np.savez(folder / "shapes.npz", **good | {"targets": np.ones((3, 1))})
    np.savez(folder / "words.npz", **good | {"inputs": np.full((2, 1, 1), "a")})
    np.savez(folder / "objects.npz", **good | {"inputs": np.full((2, 1, 1), None)})
    np.savez(folder / "whole.npz", **good)
    whole = (folder / "whole.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[:-30])
    (folder / "damaged.npz").write_bytes(whole.replace(b"NUMPY", b"XXXXX", 1))
    (folder / "text.npz").write_text("step")
    (folder / "empty.npz").write_text("")
    with open(folder / "lone.npz", "wb") as file:
        np.save(file, good["inputs"])
    (folder / "folder.csv").mkdir()
    (folder / "table.txt").write_text(TABLE)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("one.npz", "one.npz: expected arrays inputs and targets, got a file without targets"),
        ("shapes.npz", "targets: expected leading shape"),
        ("words.npz", "inputs: expected real numbers"),
        ("objects.npz", "a NumPy archive with arrays inputs and targets"),
        ("cut.npz", "a NumPy archive with arrays inputs and targets"),
        ("damaged.npz", "a NumPy archive with arrays inputs and targets"),
        ("text.npz", "a NumPy archive with arrays inputs and targets"),
        ("empty.npz", "a NumPy archive with arrays inputs and targets"),
        ("lone.npz", "a NumPy archive with arrays inputs and targets"),
        ("missing.npz", "No such file"),
        ("missing.csv", "No such file"),
        ("folder.csv", "a table of comma-separated values"),
        ("table.txt", "source: expected a file that ends in .npz or .csv"),
    ],
)
def test_bad_files_are_refused_in_one_line(file, message, tmp_path, command):
    bad_archives(tmp_path)
    done = command("solve", "--data", file)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    with pytest.raises(InputError):
        bk.tasks.from_arrays(tmp_path / file)


@pytest.mark.parametrize("option", [("--task", "digits"), ("--patterns", "4"), ("--steps", "4")])
@pytest.mark.parametrize("name", ["compare", "solve", "sample"])
def test_data_stand_alone(name, option, command):
    done = command(name, "--data", "mine.csv", *option)
    assert done.returncode == 2
    assert (
        f"--data: expected no --task, --patterns, --steps beside it, got {option[0]}" in done.stderr
    )


def test_own_data_are_solved(tmp_path, command):
    (tmp_path / "mine.csv").write_text(TABLE)
    options = ("--activation", "linear", "--sharing", "tied", "--signal", "1.5", "--json")
    done = command("solve", "--data", "mine.csv", *options)
    assert done.returncode == 0, done.stderr
    task = bk.tasks.from_arrays(tmp_path / "mine.csv").scaled(1.5)
    theory = bk.solve(bk.Network(1, "linear", noise=0.3), task)
    assert f'"free_energy": {theory.free_energy}' in done.stdout


@pytest.mark.parametrize(
    "name", ["decision", "match_to_sample", "context_decision", "integration", "flip_flop"]
)
def test_trials_have_their_own_sizes(name):
    own, longer = (task_of(None, name, None, steps, 0) for steps in (None, 12))
    assert np.array_equal(own.targets, getattr(bk.tasks, name)().targets, equal_nan=True)
    assert (longer.shape[0], longer.name) == (12, own.name)


def test_images_are_held_out_while_there_are_any():
    """The next ones, in order."""
    for count, left in ((3, 100), (170, 8), (178, None)):
        test = images(bk.tasks.digits(patterns_per_class=count, steps=8))
        if left is None:
            assert test is None
        else:
            assert test.shape[1] == 2 * left
            again = bk.tasks.digits(patterns_per_class=count + 1, steps=8).inputs[:, count]
            assert np.array_equal(test.inputs[:, 0], again)


@pytest.mark.long
@pytest.mark.parametrize("fails", [False, True])
def test_the_page_is_opened(fails, tmp_path, command, monkeypatch):
    (tmp_path / "mine.csv").write_text("step,pattern,x1,y1\n1,0,1,\n2,0,0,\n3,0,0,2\n")
    opened = []

    def show(address):
        opened.append(address)
        if fails:
            raise webbrowser.Error("no browser")

    monkeypatch.setattr(webbrowser, "open", show)
    quick = "--data mine.csv --activation linear --width 8 --draws 9 --warmup 300"
    more = "--chains 1 --sharing tied --json --out results"
    done = command("compare", *quick.split(), *more.split())
    assert done.returncode == 0, done.stderr
    assert opened == []
    done = command("report", "results/draws_tied.nc", "--open")
    assert done.returncode == 0, done.stderr
    assert opened == [(tmp_path / "report.html").as_uri()]
    done = command("compare", *quick.split(), *more.split(), "--open")
    assert done.returncode == 0, done.stderr
    assert opened[1:] == [(tmp_path / "results" / "report.html").as_uri()]


@pytest.mark.long
@pytest.mark.parametrize(
    "space",
    [*(pytest.param(s, marks=pytest.mark.slow) for s in ("weights", "preactivations")), "kernels"],
)
def test_the_last_draw_comes_with_its_units(space, double):
    task = bk.tasks.sine(2, 3, supervised=[1, 3])
    network = bk.Network(16, "linear", noise=0.5)
    options = {"num_warmup": 300, "num_samples": 3, "num_chains": 2, "progress": False}
    key = jax.random.key(0)
    run, last = sample_with_units(key, network, task, space=space, **options)
    own, whole = last["posterior"], run["posterior"].isel(chain=0, draw=-1)
    h = own["preactivation"].to_numpy()[0, 0]
    again = np.einsum("tan,sbn->tasb", h, h) / 16
    assert again == pytest.approx(whole["kernel"].to_numpy(), abs=1e-9)
    if space != "kernels":  # they leave the readout open
        assert own["output"].to_numpy()[0, 0] == pytest.approx(whole["output"].to_numpy(), abs=1e-9)
    W = bk.weights(key, last, network, task)["recurrent_weights"].to_numpy()[0, 0, 0]
    assert h[1] == pytest.approx(h[0] @ W.T, abs=1e-9)  # there is no input at later steps


CODE = """
import sys, jax
heard = []
jax.monitoring.register_event_listener(lambda event, **_: heard.append(event.rsplit("/")[-1]))
from bayeskernel.cli import main
sys.argv = ["bayeskernel", "solve", "--data", "mine.csv", "--activation", "linear", *sys.argv[1:]]
try:
    main()
finally:
    limits = jax.config.jax_compilation_cache_dir, jax.config.jax_compilation_cache_max_size
    print("cache_hits" in heard, *limits)
"""

# What a command does before it computes.
KEEP = """
import sys
from bayeskernel.cli.compiled import keep_compiled_code
print(keep_compiled_code(lambda words: print(words, file=sys.stderr)))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A command in an interpreter of its own, with a cache folder of its own: (line at the end, errors)."""
    (tmp_path / "mine.csv").write_text(TABLE)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    for name in ("XDG_CACHE_HOME", "HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))

    def run(*arguments, code=CODE):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[-1].split(), done.stderr

    return run


@pytest.mark.long
def test_compiled_code_is_kept_and_found_again(run, tmp_path):
    (hit, folder, limit), said = run()
    assert (hit, int(limit) > 0) == ("False", True)
    assert folder.startswith(str(tmp_path / "cache"))
    assert "compiled code" not in said
    (hit, _, _), said = run()
    assert hit == "True"
    assert "compiled code" not in said
    # A machine on which keys never match: what is there from before is not found.
    for file in (tmp_path / "cache").rglob("jit_probe*-*"):
        stem, kind = file.name.rsplit("-", 1)
        file.rename(file.with_name(f"{stem}0-{kind}"))
    _, said = run(code=KEEP)
    assert said.count("does not fit this machine") == 1


@pytest.mark.slow
def test_the_user_decides_on_compiled_code(run, tmp_path, monkeypatch):
    assert run("--no-cache")[0] == ["False", "None", "-1"]
    assert not list((tmp_path / "cache").rglob("*-cache"))
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setenv("HOME", str(blocked))
    end, said = run()
    assert end == ["False", "None", "-1"]
    assert said.count("compiled code is not kept: cannot write to") == 1
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    assert run()[0] == ["False", str(tmp_path / "mine"), "-1"]
