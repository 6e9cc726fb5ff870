"""How does one's own data become a task? From arrays or a table in a file."""

from __future__ import annotations

import csv
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bayeskernel.errors import InputError
from bayeskernel.tasks.task import Floats, Task

_BROKEN = (OSError, ValueError, EOFError, csv.Error, zipfile.BadZipFile, zlib.error)


def from_arrays(source: str | os.PathLike[str]) -> Task:
    """Read a task from a file.

    Parameters
    ----------
    source
        A file of one of two kinds.

        ``.npz``, written by ``numpy.savez(file, inputs=inputs, targets=targets)``: the arrays of `Task`.

        ``.csv``, a table in UTF-8 with one row for every step and pattern, in any order, and a header: ``step``
        (1 to T), ``pattern`` (0 to P - 1), ``x1`` to ``xD`` and ``y1`` to ``yO``. A target left empty is
        unsupervised.

    Returns
    -------
    The task, by the name of the file.

    Raises
    ------
    InputError
        For a file that cannot be read or is no such table, and for what `Task` refuses.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise InputError("source", "the path of a .npz or .csv file", repr(source))
    path = Path(source)
    read = {".npz": _from_npz, ".csv": _from_csv}.get(path.suffix.lower())
    if read is None:
        raise InputError("source", "a file that ends in .npz or .csv", str(path))
    inputs, targets = read(path)
    return Task(inputs, targets, path.stem)


def _from_npz(path: Path) -> tuple[Floats, Floats]:
    expected = "arrays inputs and targets"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            missing = {"inputs", "targets"} - {*arrays}
            if not missing:
                return arrays["inputs"], arrays["targets"]
    except (*_BROKEN, AttributeError, TypeError) as error:  # a lone array is no archive
        raise InputError(str(path), f"a NumPy archive with {expected}", error) from None
    raise InputError(str(path), expected, f"a file without {' and '.join(sorted(missing))}")


def _from_csv(path: Path) -> tuple[Floats, Floats]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            rows = [(f"{path}, line {reader.line_num}", row) for row in reader if row]
    except _BROKEN as error:
        raise InputError(str(path), "a table of comma-separated values", error) from None
    features, outputs = _numbered(path, header)
    found: dict[tuple[int, int], list[float]] = {}
    for where, row in rows:
        if len(row) != len(header):
            raise InputError(where, f"{len(header)} values", len(row))
        site, values = _parsed(where, dict(zip(header, row, strict=True)), features + outputs)
        if site in found:
            raise InputError(
                where, "one row for every step and pattern", f"another of {_say(site)}"
            )
        found[site] = values
    table = _whole(path, found)
    return table[..., : len(features)], table[..., len(features) :]


def _numbered(path: Path, header: Sequence[str]) -> tuple[list[str], list[str]]:
    """Columns x1 to xD and y1 to yO."""
    features = [f"x{i + 1}" for i in range(sum(name.startswith("x") for name in header))]
    outputs = [f"y{i + 1}" for i in range(sum(name.startswith("y") for name in header))]
    wanted = ["step", "pattern", *(features or ["x1"]), *(outputs or ["y1"])]
    if sorted(wanted) != sorted(header):
        got = ", ".join(header) or "none"
        raise InputError(str(path), "columns step, pattern, x1 to xD, y1 to yO", got)
    return features, outputs


def _parsed(
    where: str, row: dict[str, str], columns: Sequence[str]
) -> tuple[tuple[int, int], list[float]]:
    """(step from 0, pattern) of a row, and its values."""
    step, pattern = _count(where, "step", row, 1), _count(where, "pattern", row, 0)
    values = list[float]()
    for name in columns:
        text = row[name].strip()
        try:
            values.append(float(text or "nan") if name.startswith("y") else float(text))
        except ValueError:
            raise InputError(f"{where}, {name}", "a number", repr(text)) from None
    return (step - 1, pattern), values


def _count(where: str, name: str, row: dict[str, str], first: int) -> int:
    text = row[name].strip()
    # Counts of more digits than that are none of a file's rows.
    if not text.isdecimal() or len(text) > 9 or int(text) < first:
        raise InputError(f"{where}, {name}", f"a whole number from {first} on", repr(text))
    return int(text)


def _whole(path: Path, found: dict[tuple[int, int], list[float]]) -> Floats:
    """All rows as (T, P, columns); no step and no pattern may lack one."""
    steps, patterns = (max((site[i] for site in found), default=0) + 1 for i in (0, 1))
    for t in range(steps):
        for a in range(patterns):
            if (t, a) not in found:
                raise InputError(
                    str(path), "one row for every step and pattern", f"none of {_say((t, a))}"
                )
    return np.array([[found[t, a] for a in range(patterns)] for t in range(steps)])


def _say(site: tuple[int, int]) -> str:
    return f"step {site[0] + 1}, pattern {site[1]}"
