"""What is finished stays, whatever dies; what comes out equals a run in which nothing died."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

import bayeskernel as bk
from bayeskernel.sweeps import points

NET = bk.Network(24, "linear", noise=0.1)
TASK = bk.tasks.endpoint([[1.0]], [3.0], 3)
OPTIONS = {"space": "kernels", "num_warmup": 300, "num_samples": 2000, "num_chains": 2}
GRID = {"seed": list(range(8))}


def run(folder, client=None, **changed):
    given = {"sample": OPTIONS, "solve": True} | changed
    return bk.sweep(NET, TASK, GRID, out=folder, client=client, **given)


def samples(folder):
    return {p.name: p.stat().st_mtime_ns for p in Path(folder).rglob("samples/**/*.npz")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed") / "out")


def when(condition, then, seconds=120.0):
    """Do something in a thread as soon as a condition holds."""

    def watch():
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                then()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def children_of(pid):
    """Processes that compute: spawned ones, not the trackers of resources beside them."""
    found = psutil.Process(pid).children(recursive=True)
    return [p for p in found if "spawn_main" in " ".join(p.cmdline())]


@pytest.mark.slow
def test_processes_give_what_this_process_gives(undisturbed, tmp_path):
    assert run(tmp_path / "out", 2).identical(undisturbed)


@pytest.mark.slow
def test_a_process_that_dies_is_replaced(undisturbed, tmp_path):
    killed = []

    def kill():
        victim = children_of(os.getpid())[-1]
        killed.append(victim.pid)
        victim.kill()

    thread = when(lambda: len(samples(tmp_path / "out")) >= 2, kill)
    found = run(tmp_path / "out", 2)
    thread.join()
    assert killed
    assert found.identical(undisturbed)


def _sweep_in_a_process(folder, address):
    from distributed import Client

    run(folder, Client(address))


def _sweep_that_waits(folder):
    """The third point waits, once, so that a stop always comes before the end."""
    waited = []

    def waiting(*args, **kwargs):
        if len(samples(folder)) == 2 and not waited:
            waited.append(True)
            time.sleep(300)
        return bk.sample(*args, **kwargs)

    points.sample = waiting
    run(folder)


@pytest.mark.usefixtures("own_compiled_code")
@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(signal.SIGKILL, marks=pytest.mark.long),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_goes_on(undisturbed, tmp_path, stop):
    process = multiprocessing.get_context("spawn").Process(
        target=_sweep_that_waits, args=(tmp_path / "out",)
    )
    process.start()
    when(lambda: len(samples(tmp_path / "out")) == 2, lambda: os.kill(process.pid, stop)).join()
    process.join()
    before = samples(tmp_path / "out")
    assert len(before) == 2
    assert run(tmp_path / "out").identical(undisturbed)
    after = samples(tmp_path / "out")
    assert {name: after[name] for name in before} == before


@pytest.mark.long
@pytest.mark.usefixtures("own_compiled_code")
def test_a_full_disk_is_said_and_what_was_written_is_intact(undisturbed, tmp_path):
    # Files of samples are larger than those of theory; none of them fits.
    code = (
        "import resource, sys\n"
        "from tests.sweeps.test_faults import run\n"
        "run(sys.argv[1], sample=None)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))\n"
        "run(sys.argv[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "SweepError" in done.stderr
    assert "File too large" in done.stderr
    assert samples(tmp_path / "out") == {}
    theory = list((tmp_path / "out").rglob("theory/**/*.npz"))
    assert len(theory) == 1
    before = theory[0].stat().st_mtime_ns
    assert run(tmp_path / "out").identical(undisturbed)
    assert theory[0].stat().st_mtime_ns == before


@pytest.fixture
def cluster(tmp_path):
    """A scheduler and two workers as processes of their own."""
    pytest.importorskip("distributed", reason="needs the extra 'sweep'")
    where, processes = tmp_path / "scheduler.json", []

    def start(kind, *options):
        command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", "--scheduler-file", where]
        process = subprocess.Popen(
            [*map(str, command), *options], cwd=tmp_path, stderr=subprocess.DEVNULL
        )
        processes.append(process)
        return process

    def scheduler():
        where.unlink(missing_ok=True)
        process = start("scheduler", "--port", "0", "--dashboard-address", ":0")
        while not where.exists():
            time.sleep(0.05)
        return process

    def worker():
        return start("worker", "--nthreads", "1", "--no-dashboard", "--death-timeout", "20")

    yield scheduler, worker, where
    for process in processes:
        family = (
            psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        )
        for member in [process, *family]:
            member.kill()
        process.wait()


def connect(where):
    from distributed import Client

    client = Client(scheduler_file=str(where), timeout=60)
    client.wait_for_workers(2, timeout=60)
    return client


@pytest.mark.slow
def test_a_lost_worker_is_made_up_for(undisturbed, tmp_path, cluster):
    scheduler, worker, where = cluster
    scheduler()
    workers = [worker(), worker()]

    def kill():
        for member in psutil.Process(workers[0].pid).children(recursive=True):
            member.kill()
        workers[0].kill()

    with connect(where) as client:
        when(lambda: len(samples(tmp_path / "out")) >= 2, kill)
        found = run(tmp_path / "out", client)
    assert workers[0].wait(10) is not None
    assert found.identical(undisturbed)


@pytest.mark.slow
def test_a_lost_scheduler_loses_no_point(undisturbed, tmp_path, cluster):
    scheduler, worker, where = cluster
    first = scheduler()
    worker(), worker()
    client = connect(where)
    when(lambda: len(samples(tmp_path / "out")) >= 2, first.kill)
    with pytest.raises(bk.SweepError, match="the same call goes on"):
        run(tmp_path / "out", client)
    client.close(timeout=1)
    before = samples(tmp_path / "out")
    assert 2 <= len(before) < 8
    scheduler()
    worker(), worker()
    with connect(where) as client:
        found = run(tmp_path / "out", client)
    assert found.identical(undisturbed)
    after = samples(tmp_path / "out")
    assert {name: after[name] for name in before} == before


@pytest.mark.slow
def test_a_lost_client_loses_no_point(undisturbed, tmp_path, cluster):
    scheduler, worker, where = cluster
    scheduler()
    worker(), worker()
    with connect(where) as client:
        address = client.scheduler.address
    process = multiprocessing.get_context("spawn").Process(
        target=_sweep_in_a_process, args=(tmp_path / "out", address)
    )
    process.start()
    when(lambda: len(samples(tmp_path / "out")) >= 2, process.kill).join()
    process.join()
    # Points under way may still be finished by their workers.
    assert len(samples(tmp_path / "out")) >= 2
    with connect(where) as client:
        assert run(tmp_path / "out", client).identical(undisturbed)
