"""Runs that are killed, interrupted, or run out of disk go on to the same draws, to the bit."""

import resource

import jax
import numpy as np
import pytest
import xarray as xr

import bayeskernel as bk
from bayeskernel.errors import InputError
from bayeskernel.inference import chains
from bayeskernel.inference.checkpoint import Checkpoint
from bayeskernel.inference.record import settings

from .kills import assert_kills_change_nothing

TASK = bk.tasks.endpoint([[1.0]], [2.0], 3)
NETWORK = bk.Network(32, "erf", noise=0.1)
SETTINGS = {"num_warmup": 60, "num_samples": 150, "num_chains": 2, "progress": False}


def run(folder, *, network=NETWORK, task=TASK, key=0, **changed):
    options = {**SETTINGS, **changed}
    return bk.sample(jax.random.key(key), network, task, checkpoint=folder, **options)


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


def test_a_checkpoint_changes_nothing(undisturbed, tmp_path, monkeypatch):
    kept = run(tmp_path / "run")
    assert_identical(kept, undisturbed)
    for group, node in undisturbed.children.items():
        xr.testing.assert_identical(kept[group].to_dataset(), node.to_dataset())
    assert kept.attrs.keys() == undisturbed.attrs.keys()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["draws.nc", "run.json"]
    monkeypatch.delattr(chains, "run")  # all there already: nothing is sampled
    assert_identical(run(tmp_path / "run"), undisturbed)


@pytest.mark.parametrize("sampler", ["hmc", "nuts"])
def test_any_number_of_writes_may_be_the_last(sampler, undisturbed, tmp_path, monkeypatch):
    changed = {}
    if sampler == "nuts":
        changed = {"network": bk.Network(32, "linear", noise=0.1), "num_warmup": 300}
    expected = run(None, **changed) if changed else undisturbed
    assert settings(expected)["sampler"] == sampler
    save, left = Checkpoint.save, [0]

    def failing(*given):
        left[0] -= 1
        if left[0] < 0:
            raise bk.StorageError("no more")
        return save(*given)

    monkeypatch.setattr(Checkpoint, "save", failing)
    for writes in (1, 2, 4):
        left[0] = writes
        with pytest.raises(bk.StorageError, match="no more"):
            run(tmp_path / "run", **changed)
    monkeypatch.setattr(Checkpoint, "save", save)
    assert_identical(run(tmp_path / "run", **changed), expected)


def test_a_full_disk_loses_nothing_written(undisturbed, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # The state of a chain fits, a part of its draws does not.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        with pytest.raises(bk.StorageError, match="File too large; what was written before is"):
            run(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "run").rglob("*.part"))
    assert_identical(run(tmp_path / "run"), undisturbed)


def test_a_flipped_bit_is_found(undisturbed, tmp_path, monkeypatch):
    def refused(*given):
        raise bk.StorageError("not now")

    finish = Checkpoint.finish
    monkeypatch.setattr(Checkpoint, "finish", refused)
    with pytest.raises(bk.StorageError, match="not now"):
        run(tmp_path / "run")
    monkeypatch.setattr(Checkpoint, "finish", finish)
    for name in ("draws-000000", "state"):
        path = tmp_path / "run" / "chain-001" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:500] + bytes([whole[500] ^ 4]) + whole[501:])
        with pytest.raises(bk.StorageError, match=rf"chain-001/{name} is damaged"):
            run(tmp_path / "run")
        path.write_bytes(whole[:-20])
        with pytest.raises(bk.StorageError, match=rf"chain-001/{name} is damaged"):
            run(tmp_path / "run")
        path.write_bytes(whole)
    assert_identical(run(tmp_path / "run"), undisturbed)
    path = tmp_path / "run" / "draws.nc"
    whole = path.read_bytes()
    for altered in (whole[:5000] + bytes([whole[5000] ^ 4]) + whole[5001:], whole[:-20], b""):
        path.write_bytes(altered)
        for read in (lambda: run(tmp_path / "run"), lambda: bk.load(path)):
            with pytest.raises(bk.StorageError, match=r"draws.nc is damaged"):
                read()


def test_what_a_kill_before_the_first_file_leaves_is_no_obstacle(undisturbed, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json.part").write_text("{")
    assert_identical(run(tmp_path / "run"), undisturbed)


def test_saved_draws_are_whole_or_not_there(undisturbed, tmp_path, monkeypatch):
    path = bk.save(undisturbed, tmp_path / "draws.nc")
    for back in (bk.load(path), xr.open_datatree(path, engine="h5netcdf")):
        xr.testing.assert_identical(back, undisturbed)
        back.close()
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(bk.StorageError, match=r"cannot write .*draws.nc: "):
            bk.save(undisturbed, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(bk.StorageError, match=r"cannot read .*none.nc: No such file"):
        bk.load(tmp_path / "none.nc")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_draws(tmp_path):
    """Kernels of 1600 entries: 4000 more of them are 26 MB, and as much again for K."""
    targets = np.full((1, 40), np.nan)
    targets[0, :2] = 1.0, -1.0
    task = bk.Task(np.random.default_rng(0).normal(size=(1, 40, 2)), targets)
    network = bk.Network(16, "linear", noise=0.1)

    def peak(name, draws):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run(tmp_path / name, network=network, task=task, num_samples=draws, num_chains=1)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000

    peak("short", 4000)
    assert peak("long", 8000) < 70  # 280 without a checkpoint


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
import sys
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


@pytest.mark.slow
@pytest.mark.usefixtures("own_compiled_code")
@pytest.mark.parametrize("kills", [1, 10])
def test_kills_at_random_moments(kills, tmp_path):
    def written(folder):
        return len(list(folder.rglob("draws-*")))

    assert_kills_change_nothing(
        SCRIPT, tmp_path, written, kills=kills, timeout=300, arguments=[str(kills)]
    )
