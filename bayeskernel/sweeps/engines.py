"""Who does the jobs of a sweep: this process, processes beside it, or the workers of a Dask cluster.

JAX does not survive a fork, so processes are spawned. A worker keeps to cores of its own, so that as many
workers as cores do not fight for them, and keeps compiled code on disk, where the next worker on its machine
finds it.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import jax
from threadpoolctl import threadpool_limits

from bayeskernel.errors import InputError, positive_integer
from bayeskernel.sweeps.points import Job, execute

# Jobs handed to a cluster beyond those running, for each thread: enough to keep it busy, few enough to keep in
# memory. Seconds after which it is asked for its size again.
_AHEAD, _ASK_AGAIN = 4, 2.0
# A job whose worker dies is tried this often in all.
_TRIES = 3
# Files whose locks say which cores are taken; they last as long as the process.
_locks: list[Any] = []


# A job and the error that came out of it, if one did.
Outcome: TypeAlias = tuple[Job, BaseException | None]


class Here:
    """One job at a time in this process."""

    room = 1  # how many jobs an engine would like to have at a time

    def __init__(self) -> None:
        self._job: Job | None = None

    def submit(self, job: Job) -> None:
        """Keep the job until it is asked for."""
        self._job = job

    def finished(self) -> list[Outcome]:
        """Do the job."""
        job = self._job
        assert job is not None
        try:
            execute(job)
        except Exception as error:
            return [(job, error)]
        return [(job, None)]


class Processes:
    """Spawned processes on this machine, replaced when they die."""

    def __init__(self, count: int, folder: Path) -> None:
        # One job for each process: a death is then blamed on none that was only waiting.
        self.room, self.folder = count, folder
        self._jobs: dict[Future[None], Job] = {}
        self._tries: dict[tuple[Path, ...], int] = {}
        self._pool = self._new()

    def submit(self, job: Job) -> None:
        """Hand out a job; to new processes if one of the old ones died."""
        try:
            self._jobs[self._pool.submit(execute, job)] = job
        except BrokenProcessPool:
            self._pool = self._new()
            self._jobs[self._pool.submit(execute, job)] = job

    def finished(self) -> list[Outcome]:
        """Wait; a death ends the whole pool, so what it had is handed out again."""
        done, _ = wait(self._jobs, return_when=FIRST_COMPLETED)
        found = list[Outcome]()
        for future in done:
            job, error = self._jobs.pop(future), future.exception()
            if isinstance(error, BrokenProcessPool):
                tries = self._tries[job.files] = self._tries.get(job.files, 0) + 1
                if tries < _TRIES:
                    self.submit(job)
                    continue
                error = RuntimeError(f"its process died {tries} times")
            found.append((job, error))
        return found

    def close(self) -> None:
        """End the processes, in the middle of their jobs if need be."""
        running = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._jobs:
            for process in running:
                process.terminate()

    def _new(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self.room,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=prepare_worker,
            initargs=(self.folder, 1),
        )


class Dask:
    """Workers of a cluster the user brings."""

    def __init__(self, client: Any, folder: Path) -> None:
        self.client = client
        self._jobs: dict[Any, Job] = {}
        self._room, self._asked = 1, -math.inf
        client.register_plugin(_plugin(folder))

    @property
    def room(self) -> int:
        """Some jobs ahead for each thread of a worker; the cluster may grow and shrink."""
        if time.monotonic() - self._asked > _ASK_AGAIN:
            threads = sum(self.client.nthreads().values())
            self._room, self._asked = max(1, threads) * (1 + _AHEAD), time.monotonic()
        return self._room

    def submit(self, job: Job) -> None:
        """Hand a job to the scheduler, which gives it to another worker if one dies."""
        self._jobs[self.client.submit(execute, job, pure=False)] = job

    def finished(self) -> list[Outcome]:
        """Wait for the first."""
        from distributed import wait as wait_for

        found = list[Outcome]()
        try:
            done, _ = wait_for(list(self._jobs), return_when="FIRST_COMPLETED")
            for future in done:
                error = None if future.status == "finished" else future.exception()
                found.append((self._jobs.pop(future), error))
        except (OSError, CancelledError):
            lost = ConnectionError("the cluster's scheduler is gone")
            found += [(self._jobs.pop(future), lost) for future in list(self._jobs)]
        return found

    def close(self) -> None:
        """Take back what has not begun."""
        if self._jobs:
            self.client.cancel(list(self._jobs))


# Takes jobs, and gives them back when they are done.
Engine: TypeAlias = Here | Processes | Dask


@contextmanager
def engine_for(client: Any, folder: Path) -> Iterator[Engine]:
    """Choose by what the user gave: nothing, a number of processes, or a Dask client."""
    if client is None:
        yield Here()
        return
    engine: Processes | Dask
    if hasattr(client, "submit") and hasattr(client, "register_plugin"):
        engine = Dask(client, folder)
    elif isinstance(client, (int, float)):
        engine = Processes(positive_integer("client", client), folder)
    else:
        expected = "None, a number of processes, or a dask.distributed Client"
        raise InputError("client", expected, type(client).__name__)
    try:
        yield engine
    finally:
        engine.close()


def prepare_worker(folder: Path, threads: int) -> None:
    """Keep to cores of one's own, and keep compiled code for the next worker on this machine."""
    _claim_cores(threads)
    # BLAS has started its threads already, on all cores.
    threadpool_limits(threads)
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled" / platform.node()))


def _claim_cores(count: int) -> None:
    """Restrict this process to cores no other worker has claimed; all threads JAX starts follow."""
    if not hasattr(os, "sched_setaffinity"):
        return  # only Linux lets a process choose
    import fcntl

    free = sorted(os.sched_getaffinity(0))
    claimed = list[int]()
    for core in free:
        try:
            lock = open(Path(tempfile.gettempdir()) / f"bayeskernel-core-{core}.lock", "a")  # noqa: SIM115
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        _locks.append(lock)
        claimed.append(core)
        if len(claimed) == count:
            os.sched_setaffinity(0, claimed)
            return
    # Not enough are left: share all of them.


def _plugin(folder: Path) -> Any:
    from distributed import WorkerPlugin

    class Prepare(WorkerPlugin):
        name = "bayeskernel"

        def setup(self, worker: Any) -> None:
            prepare_worker(folder, worker.state.nthreads)

    return Prepare()
