"""Writes one shard, which is complete or absent, and a record of it from which an interrupted run resumes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mixdist.data.formats import Reader, Sample
from mixdist.data.images import Unreadable
from mixdist.data.prepare.recipe import AsTheyAre, Recipe
from mixdist.data.shards.scan import Scan, scan
from mixdist.data.workers import stopping
from mixdist.files import write_file

PREPARING = ".preparing"


class SetAside(NamedTuple):
    """A sample that is in no shard, and why."""

    id: int
    name: str
    reason: str


class Task(NamedTuple):
    """A shard to make: its file name, its split and what goes into it, in order."""

    shard: str
    split: str
    samples: list[Sample]


@dataclass(frozen=True)
class Made:
    """A shard that was made.

    Args:
        shard: its file name.
        split: of its samples.
        num: of samples that it was made of.
        scan: what is in it; None where every sample was set aside, and there is no file.
        set_aside: what is not in it.
    """

    shard: str
    split: str
    num: int
    scan: Scan | None
    set_aside: list[SetAside]


class Stopped(Exception):
    """The other processes have given up."""


@dataclass(frozen=True)
class ShardWriter:
    """Makes shards; it is sent to worker processes.

    Args:
        out: the folder of the shards; its folder ``PREPARING`` is there.
        reader: of the source's images.
        recipe: what is done to them.
        attribute_names: of the samples' attributes.
    """

    out: Path
    reader: Reader
    recipe: Recipe | AsTheyAre
    attribute_names: tuple[str, ...] = ()

    def make(self, task: Task) -> Made:
        """Make a shard, or take the one that was made before.

        Raises:
            Stopped: the other processes have given up.
            ValueError: a file of the source cannot be read.
            OSError: the shard cannot be written; then nothing is left of it.
        """
        return self._before(task) or self._write(task)

    def _record(self, task: Task) -> Path:
        return self.out / PREPARING / f"{task.shard}.json"

    def _before(self, task: Task) -> Made | None:
        """Return what was made and recorded before, if the shard is unchanged."""
        try:
            record = json.loads(self._record(task).read_bytes())
            found = scan(self.out / task.shard) if record["sha256"] else None
            if found is not None and found.sha256 != record["sha256"]:
                return None
            set_aside = [SetAside(*one) for one in record["set_aside"]]
            return Made(task.shard, task.split, len(task.samples), found, set_aside)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write(self, task: Task) -> Made:
        from webdataset.writer import TarWriter  # imports torch: only where a shard is made

        # The process in the name: one whose parent was killed may still be at work on the same shard.
        aside = self.out / PREPARING / f"{task.shard}.{os.getpid()}.partial"
        set_aside: list[SetAside] = []
        try:
            with open(aside, "wb", buffering=0) as file:
                with TarWriter(_Sink(file), encoder=False, mtime=0) as tar:
                    for sample in task.samples:
                        if stopping():
                            raise Stopped
                        try:
                            tar.write(self._members(sample))
                        except Unreadable as error:
                            set_aside.append(SetAside(sample.id, sample.name, str(error)))
                os.fsync(file.fileno())
            if len(set_aside) < len(task.samples):
                os.replace(aside, self.out / task.shard)
        finally:
            aside.unlink(missing_ok=True)
        found = scan(self.out / task.shard) if len(set_aside) < len(task.samples) else None
        record = {"sha256": found.sha256 if found else None, "set_aside": set_aside}
        write_file(self._record(task), json.dumps(record).encode())
        return Made(task.shard, task.split, len(task.samples), found, set_aside)

    def _members(self, sample: Sample) -> dict[str, str | bytes]:
        try:
            raw = self.reader.read(sample)
        except OSError as error:
            raise ValueError(
                f"image {sample.id} ({sample.name!r}) cannot be read ({error.strerror}): fix it, then give the same "
                "command again: it resumes where it stopped"
            ) from None
        extension, image = self.recipe.apply(raw)
        about: dict[str, object] = {"name": sample.name}
        if sample.attributes:
            about["attributes"] = dict(zip(self.attribute_names, sample.attributes, strict=True))
        members: dict[str, str | bytes] = {"__key__": f"{sample.id:09d}", extension: image}
        members["json"] = json.dumps(about).encode()
        if sample.label is not None:
            members["cls"] = str(sample.label).encode()
        return members


class _Sink:
    """A file that takes everything or fails once: closing a tar whose disk is full must not fail anew."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.failed = file, False

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest and not self.failed:
            try:
                rest = rest[self.file.write(rest) :]
            except OSError:
                self.failed = True
                raise
        return len(data)
