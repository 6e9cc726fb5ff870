"""Where does the command line keep compiled code between its runs, and does this machine find it again?

Only commands do this: importing the library changes no setting of JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import platformdirs

# Shorter compilations are not worth a file; together those of `compare` above it are nine tenths of the time.
_WORTH_SECONDS = 0.2
_MOST_BYTES = 500 * 2**20


def keep_compiled_code(say: Callable[[str], None]) -> None:
    """Let JAX keep compiled code in the user's cache folder, unless the user chose a folder or switched it off.

    ``say`` is told in one line where what earlier runs kept is not found, or nothing can be kept.
    """
    chosen = jax.config.values["jax_compilation_cache_dir"] is not None
    if chosen or not jax.config.values["jax_enable_compilation_cache"]:
        return
    folder = Path(platformdirs.user_cache_dir("bayeskernel", False)) / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        say(f"compiled code is not kept: cannot write to {folder}: {error.strerror}")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
    _check(folder, say)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_SECONDS)


def _check(folder: Path, say: Callable[[str], None]) -> None:
    """Compile a function that every run of these versions compiles: a new file beside one from before is a miss."""

    def probe(x: jax.Array) -> jax.Array:
        return x + 1

    # JAX names the file by the function.
    probe.__name__ = f"probe_{version('jax')}_{version('jaxlib')}".replace(".", "_")
    files = f"jit_{probe.__name__}-*-cache"
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    before = {*folder.glob(files)}
    jax.jit(probe).lower(np.float32(0)).compile()
    after = {*folder.glob(files)}
    if not after:
        say(f"compiled code is not kept: JAX wrote nothing to {folder}")
    elif before and after != before:
        say(
            f"compiled code that earlier runs kept in {folder} does not fit this machine and its settings, "
            "and is made again; if every run says so, use --no-cache"
        )
