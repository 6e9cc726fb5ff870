"""Would it fit? What exceeds this machine's memory is refused before it begins, not killed hours later."""

from __future__ import annotations

import os

from bayeskernel.errors import InputError


def check_memory(argument: str, made_of: str, size: float, instead: str) -> None:
    """Refuse work that needs ``size`` bytes, more than the machine has.

    Its ``argument`` makes it large, how large ``made_of`` says in words, and ``instead`` what a user could do.
    """
    if size > memory():
        expected = f"what fits into the {_gigabytes(memory())} of this machine ({instead})"
        raise InputError(argument, expected, f"{made_of}, which take about {_gigabytes(size)}")


def memory() -> float:
    """Bytes of main memory; infinite where the system does not tell."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # not everywhere
        return float("inf")


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.3g} GB"
