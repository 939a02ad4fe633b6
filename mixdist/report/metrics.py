"""The record of a run: ``metrics.jsonl``, TensorBoard events, the progress bar, and plain tables for terminals.

Only rank 0 uses it; nothing here knows of other ranks.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mixdist.files import write_file

FILE_NAME = "metrics.jsonl"
EVENTS_NAME = "tensorboard"

_NUMBER = re.compile(r"-?|[-+]?([\d,.]+(e[-+]?\d+)?|nan|inf)%?", re.IGNORECASE)

Record = dict[str, Any]
"""What is logged of one step: "step" (int) and any of numbers, strings, None, and lists or dicts of these."""


class MetricsLog:
    """Appends records to ``metrics.jsonl`` and their numbers to TensorBoard events.

    One line holds one record; floats come back exactly, and a line is flushed as soon as it is written. TensorBoard has
    each number under its path: ``{"load": [..]}`` becomes ``load/expert-00`` and so on, ``{"bytes": {"sent": 3}}``
    becomes ``bytes/sent``; strings and None are in the file only.

    Args:
        directory: of the run; made where it is not there.
        resume_step: the last step that is kept of an earlier record; later records and a torn last line are cut off,
            here and in TensorBoard. None begins a new record; -1 begins anew over an old one.

    Raises:
        ValueError: without ``resume_step``, where the directory has a record already; or where that record is damaged.
    """

    def __init__(self, directory: Path, resume_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # heavy, and needed by rank 0 alone

        path = Path(directory) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is not None:
            _cut(path, resume_step)
        elif path.exists() and path.stat().st_size:
            raise ValueError(
                f"directory ({path.parent}) has a record of a run already ({FILE_NAME}): expected none for a new run; "
                "resume that run or choose another directory."
            )
        self._file = path.open("a", encoding="utf-8")
        purge_step = None if resume_step is None else resume_step + 1
        self._events = SummaryWriter(str(path.parent / EVENTS_NAME), purge_step=purge_step)

    def write(self, record: Record) -> None:
        """Append one record.

        Raises:
            ValueError: for a number that is not finite, or a record without an int under "step"; nothing is written.
        """
        step = _step(record)
        scalars = dict(_scalars(record))
        for tag, value in scalars.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"{tag} ({value}) at step {step} cannot be logged: it must be finite; leave it out or log None."
                )
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        for tag, value in scalars.items():
            if tag != "step":
                self._events.add_scalar(tag, value, step)

    def close(self) -> None:
        """Close the file and the events; further calls do nothing."""
        self._file.close()
        self._events.close()


def read_metrics(directory: Path) -> list[Record]:
    """Return the records of a run in the order written; a torn last line is left out, no file gives no records.

    Raises:
        ValueError: for a damaged line before the last, with its number.
    """
    return [record for _, record in _lines(Path(directory) / FILE_NAME)]


def _lines(path: Path) -> Iterator[tuple[bytes, Record]]:
    """Yield each whole line as stored, without its newline, and its record."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line.decode("utf-8"))
            _step(record)
        except ValueError as error:
            if number == len(lines):
                return
            raise ValueError(
                f"{path} line {number} is damaged ({error}): expected one JSON object; delete the line."
            ) from error
        yield line, record


def _step(record: Record) -> int:
    step = record.get("step") if isinstance(record, dict) else None
    if not isinstance(step, int):
        raise ValueError(f"step ({step!r}) of a record must be an int; log every record under its step.")
    return step


def _cut(path: Path, last_step: int) -> None:
    """Drop the records after ``last_step`` and a torn last line; the old file stays until the new one is whole."""
    write_file(path, b"".join(line + b"\n" for line, record in _lines(path) if record["step"] <= last_step))


def _scalars(value: object, tag: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers in a record, each with its TensorBoard tag."""
    if isinstance(value, (int, float)):
        yield tag, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _scalars(inner, f"{tag}/{key}" if tag else str(key))
    elif isinstance(value, (list, tuple)):
        # The outermost list runs over experts; lists within it are the expert's own.
        name = "" if "/expert-" in tag else "expert-"
        for number, inner in enumerate(value):
            yield from _scalars(inner, f"{tag}/{name}{number:02d}")


class Progress:
    """A progress bar over steps on stderr, with the loss and the rate of the last logged step.

    Args:
        total: steps of the whole run.
        initial: steps done before, where the run resumes.
        shown: False makes every call do nothing; the caller decides (rank 0, stderr a terminal).
    """

    def __init__(self, total: int, initial: int, shown: bool) -> None:
        self._bar: tqdm[Any] = tqdm(
            total=total, initial=initial, disable=not shown, file=sys.stderr, unit="step", dynamic_ncols=True
        )

    def write(self, record: Record) -> None:
        """Move to the record's "step" and show its "loss" (nats a row) and "rows_per_s", where it has them."""
        formats = {"loss": ("loss", ".4g"), "rows_per_s": ("rows/s", ",.0f")}
        shown = {name: f"{record[key]:{form}}" for key, (name, form) in formats.items() if record.get(key) is not None}
        if shown:
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(record["step"] - self._bar.n)

    def tell(self, line: str) -> None:
        """Print a line on stdout, above the bar where both are on a terminal; at once, whatever stdout is."""
        self._bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar as it stands and end its line."""
        self._bar.close()


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return an aligned text table: a line of headers, a rule, a line for each row; no newline at the end.

    A column is set flush right where all its cells are numbers or read as such ("0.97", "1,024", "12%", "-" for none).

    Args:
        headers: one for each column.
        rows: their cells, one for each header; floats as strings, formatted as they shall appear.
    """
    columns = []
    for header, *cells in zip(headers, *rows, strict=True):
        texts = [str(cell) for cell in cells]
        width = max(map(len, [header, *texts]))
        side = ">" if texts and all(map(_NUMBER.fullmatch, texts)) else "<"
        columns.append([f"{text:{side}{width}}" for text in (header, "-" * width, *texts)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
