"""A script that is interrupted and killed at random moments must end as if nothing had happened."""

import signal
import subprocess
import sys
import time

import numpy as np

# Shells start background jobs without it.
_INTERRUPTIBLE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def assert_kills_change_nothing(script, tmp_path, written, *, kills, timeout, arguments=()):
    """Ctrl-C once, then kill -9 until a run gets through.

    ``script`` takes its checkpoint's folder ("" for none), the file for its result, and ``arguments``; ``written`` tells of that
    folder by a number that changes with every write.
    """
    rng, folder = np.random.default_rng(), tmp_path / "run"

    def started(where, name):
        command = [
            sys.executable,
            "-c",
            _INTERRUPTIBLE + script,
            where,
            tmp_path / name,
            *arguments,
        ]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def begun():
        """A run of which something more has been written."""
        before, process = written(folder), started(folder, "a.npy")
        while written(folder) == before:
            time.sleep(0.01)
            assert process.poll() is None
        return process

    interrupted = begun()
    interrupted.send_signal(signal.SIGINT)
    _, said = interrupted.communicate(timeout=60)
    assert interrupted.returncode != 0
    assert f"what there is so far is kept in {folder}, and the same call goes on" in said
    for _ in range(kills):
        killed = begun()
        time.sleep(rng.uniform(0, 0.3))
        killed.kill()
        killed.communicate()
        assert not (tmp_path / "a.npy").exists()
    for where, name in ((folder, "a.npy"), ("", "b.npy")):
        whole = started(where, name)
        _, said = whole.communicate(timeout=timeout)
        assert whole.returncode == 0, said
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))
