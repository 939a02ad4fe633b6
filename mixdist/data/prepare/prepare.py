"""Turns a source into shards and their index; an interrupted preparation resumes where it stopped."""

from __future__ import annotations

import errno
import fcntl
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixdist.data.formats import Listing
from mixdist.data.prepare.recipe import AsTheyAre, Recipe
from mixdist.data.prepare.writer import PREPARING, Made, SetAside, ShardWriter, Task
from mixdist.data.shards.index import HEAD, ShardIndex
from mixdist.data.shards.scan import assemble
from mixdist.data.workers import Workers
from mixdist.files import write_file

SHARD_SAMPLES = 1000
"""Samples a shard: 10 MB of CelebA at 64 x 64, 110 MB of ImageNet's files. Small enough that a block of a remote shard
and what an interruption costs stay small and many processes find work, large enough that ImageNet is 1,300 files."""

SET_ASIDE = "set_aside.jsonl"
_PLAN, _LOCK = "plan.json", "lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Prepared:
    """What lies in a prepared folder.

    Args:
        index: of its shards.
        set_aside: what is in none of them.
        before: whether it was finished before.
    """

    index: ShardIndex
    set_aside: list[SetAside]
    before: bool


def prepare(
    kind: str,
    listing: Listing,
    recipe: Recipe | AsTheyAre,
    out: Path,
    shard_samples: int = SHARD_SAMPLES,
    workers: int = 0,
    tell: Callable[[int, int], None] = lambda done, total: None,
    rows: dict[str, Any] | None = None,
) -> Prepared:
    """Write shards of a source, then their index; the bytes depend on the source and the recipe alone.

    Shard k of a split is made of samples k * shard_samples and on. However this ends, the same call resumes with the
    shards that are missing.

    Args:
        kind: of the source, a key of ``mixdist.data.formats.SOURCES``.
        listing: of the source.
        recipe: what is done to every image, or to rows.
        out: the folder of the shards: absent, empty, or started by the same call.
        shard_samples: samples of a shard, before some are set aside.
        workers: processes; with 0 or 1 this process does it.
        tell: is told how many samples of how many are done.
        rows: what the fields of rows are, as :func:`mixdist.data.prepare.rows.list_rows` has it; None for images.

    Raises:
        ValueError: the numbers make no sense, ``out`` has other things in it, a file of the source cannot be read, no
            image can be used, or the disk is full.
        OSError: ``out`` cannot be written.
    """
    if not 1 <= shard_samples <= 1_000_000:
        raise ValueError(f"--shard-samples ({shard_samples}) must be from 1 to 1000000")
    if not 0 <= workers <= 1024:
        raise ValueError(f"--workers ({workers}) must be from 0 to 1024: 0 makes the shards in this process")
    image = recipe.shape(listing.image)
    labels = any(part.label_N is not None for part in listing.parts)
    made = {"source": kind, **asdict(recipe), "labels": labels, "shard_samples": shard_samples}
    made["digest"] = listing.digest
    index = _finished(out, made)
    before = index is not None
    if index is None:
        _check_out(out, made)
        with _room(out), _held(out):
            write_file(out / PREPARING / _PLAN, json.dumps(made, indent=1).encode() + b"\n")
            writer = ShardWriter(out, listing.reader, recipe, listing.attribute_names)
            shards = _make(writer, listing, shard_samples, workers, tell)
            index = _finish(shards, listing, image, made, out, rows)
    if (out / PREPARING).is_dir():  # with an index, nothing in it is needed
        shutil.rmtree(out / PREPARING)
    lines = (out / SET_ASIDE).read_text().splitlines() if (out / SET_ASIDE).exists() else []
    return Prepared(index, [SetAside(**json.loads(line)) for line in lines], before)


def _make(
    writer: ShardWriter, listing: Listing, shard_samples: int, workers: int, tell: Callable[[int, int], None]
) -> list[Made]:
    """Make all shards, in order."""
    for left in (writer.out / PREPARING).glob("*.partial"):
        left.unlink(missing_ok=True)
    total = sum(part.num for part in listing.parts)
    tasks = [
        (f"{split}-{k:06d}.tar", split, k * shard_samples)
        for split in listing.splits
        for k in range(-(-listing.count(split) // shard_samples))
    ]
    # Samples are listed when a shard's turn comes: those of a million images would fill the memory.
    todo = (Task(name, split, listing.samples(split, first, first + shard_samples)) for name, split, first in tasks)
    remedy = "give the same command again with fewer --workers: it resumes where it stopped"
    making = Workers(writer.make, min(workers, len(tasks)), remedy)
    shards: list[Made] = []
    tell(0, total)
    with closing(making.map(todo)) as made:
        for one in made:
            shards.append(one)
            tell(sum(shard.num for shard in shards), total)
    return shards


def _finish(
    shards: list[Made],
    listing: Listing,
    image: tuple[int, int, int] | None,
    made: dict[str, Any],
    out: Path,
    rows: dict[str, Any] | None,
) -> ShardIndex:
    """Write the list of what was set aside, then the index, which makes the folder complete."""
    set_aside = [one for shard in shards for one in shard.set_aside]
    full = [(shard.scan, shard.split) for shard in shards if shard.scan is not None]
    if not full:
        why = "; ".join(f"{number} times {reason}" for reason, number in count_reasons(set_aside))
        raise ValueError(f"none of the {len(set_aside)} images can be used: {why}: fix the source, and empty {out}")
    if set_aside:
        write_file(out / SET_ASIDE, "".join(json.dumps(one._asdict()) + "\n" for one in set_aside).encode())
    scans = [scan for scan, _ in full]
    shape = [f"{key} {made[key]}" for key in ("channels", "size", "crop") if made.get(key) is not None]
    by = f"mixdist prepare ({', '.join(shape)})" if shape else "mixdist prepare"
    index = assemble(
        scans,
        [split for _, split in full],
        ids=[np.array([int(key) for key in scan.keys], dtype=np.int64) for scan in scans],
        class_names=listing.class_names,
        source=f"{made['source']} by {by}",
        image=image,
        made=made,
        rows=rows,
    )
    index.write(out)
    return index


def count_reasons(set_aside: Sequence[SetAside]) -> list[tuple[str, int]]:
    """Count why samples were set aside, the most frequent first; reasons that differ in numbers are one."""
    kinds = Counter(re.sub(r"\d+ x \d+", "W x H", one.reason.partition(" (")[0]) for one in set_aside)
    return kinds.most_common()


def _finished(out: Path, made: dict[str, Any]) -> ShardIndex | None:
    """Return the index of a folder that the same call finished, else None.

    Raises:
        ValueError: it is the index of something else, or a shard is missing.
    """
    if not (out / HEAD).exists():
        return None
    index = ShardIndex.read(out)
    if not index.made:
        raise ValueError(f"--out {out} holds the index of shards that others made: name another folder")
    _compare(out, index.made, made)
    for shard in index.shards:
        path = out / shard.name
        if not path.is_file() or path.stat().st_size != shard.num_bytes:
            raise ValueError(f"--out {out} was finished, but {shard.name} is missing or cut: empty it and prepare anew")
    return index


def _check_out(out: Path, made: dict[str, Any]) -> None:
    """Refuse a folder that holds anything but what the same call wrote."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is no folder: name a new or an empty one")
    plan, started = out / PREPARING / _PLAN, None
    if plan.exists():
        with suppress(OSError, ValueError):
            started = json.loads(plan.read_bytes())
        _compare(out, started if isinstance(started, dict) else {}, made)
    elif out.exists() and any(path.name != PREPARING for path in out.iterdir()):
        raise ValueError(f"--out {out} is not empty, and mixdist prepare did not make it: name a new or an empty one")


def _compare(out: Path, before: dict[str, Any], made: dict[str, Any]) -> None:
    """Refuse to resume with other settings, naming the first one that differs."""
    for key in made:
        if key in before and before[key] == made[key]:
            continue
        if key == "digest":
            what = "of files that are not those of the source now"
        else:
            was, now = ("unset" if value is None else value for value in (before.get(key, "unknown"), made[key]))
            what = f"with {key.replace('_', '-')} {was}, asked for is {now}"
        raise ValueError(f"--out {out} was started {what}: give what it was started with, or name another folder")


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Lock the folder: two processes must not write it at once."""
    (out / PREPARING).mkdir(parents=True, exist_ok=True)
    with open(out / PREPARING / _LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"--out {out} is being prepared by another process: wait for it, or end it") from None
        yield


@contextmanager
def _room(out: Path) -> Iterator[None]:
    """Report a full disk in one line; what was being written is removed, and the rest is complete."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise ValueError(
            f"the disk of --out {out} is full ({error.strerror}): make room, then give the same command again: it "
            "resumes where it stopped"
        ) from None
