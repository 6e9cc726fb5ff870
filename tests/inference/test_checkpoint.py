"""Runs that are killed, interrupted, or run out of disk go on to the same draws, to the bit."""

import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel.errors import InputError
from bayeskernel.inference import chains
from bayeskernel.inference.checkpoint import Checkpoint, CheckpointError

TASK = bk.tasks.endpoint([[1.0]], [2.0], 3)
NETWORK = bk.Network(32, "erf", noise=0.1)
SETTINGS = {"num_warmup": 60, "num_samples": 150, "num_chains": 2, "progress": False}


def run(folder, *, network=NETWORK, task=TASK, key=0, **changed):
    settings = {**SETTINGS, **changed}
    return bk.sample(jax.random.key(key), network, task, checkpoint=folder, **settings)


def assert_identical(one, two):
    for group in ("posterior", "sample_stats"):
        for name, values in one[group].data_vars.items():
            assert np.array_equal(values, two[group][name]), name


@pytest.fixture(scope="module")
def undisturbed():
    return run(None)


@pytest.fixture(autouse=True)
def written_often(monkeypatch):
    monkeypatch.setattr(chains, "_WRITE_SECONDS", 0.0)


def test_a_checkpoint_changes_nothing(undisturbed, tmp_path):
    assert_identical(run(tmp_path / "run"), undisturbed)
    # All there already: nothing is sampled.
    assert_identical(run(tmp_path / "run"), undisturbed)


@pytest.mark.parametrize("sampler", ["hmc", "nuts"])
def test_any_number_of_writes_may_be_the_last(sampler, undisturbed, tmp_path, monkeypatch):
    expected = undisturbed if sampler == "hmc" else run(None, sampler=sampler)
    save, left = Checkpoint.save, [0]

    def failing(*given):
        left[0] -= 1
        if left[0] < 0:
            raise CheckpointError("no more")
        return save(*given)

    monkeypatch.setattr(Checkpoint, "save", failing)
    for writes in (1, 2, 4):
        left[0] = writes
        with pytest.raises(CheckpointError, match="no more"):
            run(tmp_path / "run", sampler=sampler)
    monkeypatch.setattr(Checkpoint, "save", save)
    assert_identical(run(tmp_path / "run", sampler=sampler), expected)


def test_a_full_disk_loses_nothing_written(undisturbed, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # The state of a chain fits, a part of its draws does not.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        with pytest.raises(CheckpointError, match="File too large; what was written before is"):
            run(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "run").rglob("*.part"))
    assert_identical(run(tmp_path / "run"), undisturbed)


def test_a_flipped_bit_is_found(tmp_path):
    run(tmp_path / "run")
    for name in ("draws-000000", "state"):
        path = tmp_path / "run" / "chain-001" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:500] + bytes([whole[500] ^ 4]) + whole[501:])
        with pytest.raises(CheckpointError, match=rf"chain-001/{name} is damaged"):
            run(tmp_path / "run")
        path.write_bytes(whole[:-20])
        with pytest.raises(CheckpointError, match=rf"chain-001/{name} is damaged"):
            run(tmp_path / "run")
        path.write_bytes(whole)
    run(tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"key": 1}, "rng_key"),
        ({"task": TASK.scaled(1.1)}, "task"),
        ({"network": bk.Network(33, "erf", noise=0.1)}, "network"),
        ({"num_samples": 151}, "num_samples"),
        ({"num_chains": 3}, "num_chains"),
        ({"sampler": "nuts"}, "sampler"),
    ],
)
def test_another_run_is_refused(changed, name, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "finished"
    run(folder)
    with pytest.raises(InputError, match=f"checkpoint: expected a run with {name} = "):
        run(folder, **changed)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="checkpoint: expected a new folder"):
        run(tmp_path)


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs without it
import jax, numpy as np
import bayeskernel as bk
from bayeskernel.inference import chains
chains._WRITE_SECONDS = 0.0
draws = bk.sample(
    jax.random.key(0), bk.Network(512, "erf", noise=0.1), bk.tasks.endpoint([[1.0]], [2.0], 3),
    num_warmup=300, num_samples=4000 * int(sys.argv[3]), num_chains=2, checkpoint=sys.argv[1] or None, progress=False,
)
np.save(sys.argv[2], draws["posterior"]["kernel"].to_numpy())
"""


@pytest.mark.parametrize(
    "kills", [pytest.param(1, marks=pytest.mark.long), pytest.param(10, marks=pytest.mark.slow)]
)
def test_kills_at_random_moments(kills, tmp_path):
    """Ctrl-C once, then kill -9 until a run gets through."""
    rng, folder = np.random.default_rng(), tmp_path / "run"

    def started(where, name):
        command = [sys.executable, "-c", SCRIPT, where, tmp_path / name, str(kills)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    interrupted = started(folder, "a.npy")
    while not (folder / "chain-000" / "draws-000000").exists():
        time.sleep(0.01)
        assert interrupted.poll() is None
    interrupted.send_signal(signal.SIGINT)
    _, said = interrupted.communicate(timeout=60)
    assert interrupted.returncode != 0
    assert f"draws so far are kept in {folder}, and the same call goes on" in said
    for _ in range(kills):
        parts = len(list(folder.rglob("draws-*")))
        killed = started(folder, "a.npy")
        while len(list(folder.rglob("draws-*"))) <= parts:
            time.sleep(0.01)
            assert killed.poll() is None
        time.sleep(rng.uniform(0, 0.3))
        killed.kill()
        killed.communicate()
        assert not (tmp_path / "a.npy").exists()
    for where, name in ((folder, "a.npy"), ("", "b.npy")):
        whole = started(where, name)
        _, said = whole.communicate(timeout=300)
        assert whole.returncode == 0, said
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))
