"""``mixdist index`` and ``mixdist verify``: the index of shards that other tools wrote, and checks against it."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from jsonargparse import ArgumentParser
from tqdm import tqdm

from mixdist.cli.prepare import describe_splits
from mixdist.config.options import parse, plain_parser
from mixdist.data.shards.address import Missing, expand
from mixdist.data.shards.fetch import RemoteFolder
from mixdist.data.shards.index import HEAD, SAMPLES, ShardIndex, check_names, split_of
from mixdist.data.shards.scan import Scan, assemble, left_out, scan, scan_stream
from mixdist.data.shards.verify import Verdict, examine, missing
from mixdist.data.workers import MOST_WORKERS, Workers, default_workers
from mixdist.messages import counted

S = TypeVar("S")
T = TypeVar("T")

_BLOCK, _RETRIES, _TIMEOUT_S = 4_000_000, 5, 30.0
_LARGEST_NAMES, _SMALL = 16 << 20, 256 << 20


def index(argv: Sequence[str]) -> None:
    """``mixdist index SOURCE``: write the index of shards that other tools made."""
    options = parse(index_parser(), argv)
    _check_workers(options.workers)
    remote = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", options.source) and not Path(options.source).is_dir()
    if remote:
        if options.out is None:
            raise ValueError("--out is missing: name the folder for the index of shards at an address")
        out, (base, names) = Path(options.out), expand(options.source)
        size = sys.maxsize  # unknown, and slow to come
    else:
        if options.out is not None:
            raise ValueError(f"--out ({options.out!r}) is for addresses: the index of a folder lies in it")
        out, base, names = Path(options.source), None, _tars(Path(options.source))
        size = sum((out / name).stat().st_size for name in names)
    _refuse_present(out, options.force)
    class_names = _class_names(options.class_names)
    scans = list(_each(partial(_scan_one, str(out), base), names, size, options.workers))
    made = assemble(
        scans,
        [split_of(name) for name in names],
        class_names=class_names,
        source=f"shards that others wrote, at {base}" if base else "shards that others wrote",
        base=base,
    )
    out.mkdir(parents=True, exist_ok=True)
    made.write(out)
    print("\n".join(_summary(made, scans, out)), flush=True)


def index_parser() -> ArgumentParser:
    """Make the parser of ``mixdist index``."""
    parser = plain_parser(
        "mixdist index",
        "Make the index of webdataset tar shards that others wrote: where every member of every sample lies, with "
        "checksums. Every shard is read once. Refused are shards that are cut or damaged, links, unsafe names, "
        "pickles and other foreign members, and keys with dots, that come twice or are interleaved. The split is told "
        "from a shard's name (train, val, test). Shards that mixdist prepare made have an index. Addresses: https://; "
        "s3://, gs://, hf:// and az:// with the extra of that name (pip install 'mixdist[s3]'). Examples: mixdist "
        "index data/shards; mixdist index 'https://host/train-{000000..000146}.tar' --out data/shards",
    )
    parser.add_argument("source", type=str, help="a folder with files ending in .tar, or an address with braces")
    parser.add_argument("--out", type=str | None, help="the folder for the index, where the source is an address")
    parser.add_argument("--class_names", type=str | None, help="a text file with the name of a class in each line")
    parser.add_argument("--force", action="store_true", help="replace an index that is there, with its ids")
    parser.add_argument("--workers", type=int | None, help=_WORKERS)
    return parser


_WORKERS = f"processes that read shards; 0 or 1: this one; unset, one a core for large data, at most {MOST_WORKERS}"


def verify(argv: Sequence[str]) -> None:
    """``mixdist verify DIR``: hold shards against their index; a line for each thing that is wrong.

    Raises:
        ValueError: something is.
    """
    options = parse(verify_parser(), argv)
    _check_workers(options.workers)
    if "://" in options.folder and not Path(options.folder).is_dir():
        raise ValueError(
            f"{options.folder!r} is an address: name the folder that mixdist index ADDRESS --out FOLDER made"
        )
    folder = Path(options.folder)
    known = ShardIndex.read(folder)
    total = sum(shard.num_bytes for shard in known.shards)
    parts = [known.part(i) for i in range(len(known.shards))]
    strangers = _strangers(folder, known)
    bad, hurt, lines = 0, 0, len(strangers)
    for verdict in _each(partial(_verify_one, str(folder), options.decode), parts, total, options.workers):
        for line in verdict.lines:
            tqdm.write(line, file=sys.stdout)
        bad, hurt, lines = bad + bool(verdict.lines), hurt + verdict.num_hurt, lines + len(verdict.lines)
    for line in strangers:
        print(line)
    damaged = f"{counted(bad, 'shard')} and {counted(hurt, 'sample')} are damaged" if lines else "all is well"
    size = f"{total / 1e6:.1f} MB"
    print(f"{counted(len(parts), 'shard')}, {counted(len(known), 'sample')}, {size}: {damaged}", flush=True)
    if lines:
        raise ValueError(
            f"{str(folder)!r} is not what its index says ({bad} of {counted(len(parts), 'shard')}, "
            f"{counted(hurt, 'sample')}): fetch or make again what is named above, or the index with mixdist index "
            "--force; samples that never were whole are passed over with on_error skip"
        )


def verify_parser() -> ArgumentParser:
    """Make the parser of ``mixdist verify``."""
    parser = plain_parser(
        "mixdist verify",
        "Check shards against their index: sizes, sha256 of every shard and crc32 of every member; what differs is "
        "told by shard, offset and id. Every shard is read once; nothing is changed. Example: mixdist verify "
        "data/celeba64 --decode",
    )
    parser.add_argument("folder", type=str, help="the folder that mixdist prepare or mixdist index made")
    parser.add_argument("--decode", action="store_true", help="decode every image, too, and name those that cannot be")
    parser.add_argument("--workers", type=int | None, help=_WORKERS)
    return parser


def _tars(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is not a folder: name one that holds files ending in .tar, or an address")
    names = sorted(path.name for path in folder.glob("*.tar"))
    if not names:
        raise ValueError(f"{str(folder)!r} has no file that ends in .tar: name the folder of the shards")
    check_names(names)
    return names


def _refuse_present(out: Path, force: bool) -> None:
    there = [name for name in (HEAD, SAMPLES) if (out / name).exists()]
    if there and not force:
        raise ValueError(
            f"{str(out / there[0])!r} is there already: check it with mixdist verify, or replace it with --force"
        )


def _class_names(path: str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        with open(path, "rb") as file:
            text = file.read(_LARGEST_NAMES + 1)
        names = tuple(line.strip() for line in text.decode().splitlines())
    except OSError as error:
        raise ValueError(f"--class_names {path!r} cannot be read ({error.strerror}): name a text file") from None
    except UnicodeDecodeError:
        raise ValueError(f"--class_names {path!r} is not UTF-8: name a text file with a class in each line") from None
    if len(text) > _LARGEST_NAMES or not names or not all(name and name.isprintable() for name in names):
        raise ValueError(f"--class_names {path!r} must have the name of a class in each line, at most 16 MiB")
    return names


def _check_workers(workers: int | None) -> None:
    if workers is not None and not 0 <= workers <= 1024:
        raise ValueError(f"--workers ({workers}) must be from 0 to 1024: leave it out for one a core")


def _scan_one(folder: str, base: str | None, name: str) -> Scan:
    if base is None:
        return scan(Path(folder) / name)
    with RemoteFolder(base, _BLOCK, _RETRIES, _TIMEOUT_S).stream(name) as stream:
        return scan_stream(stream, name)


def _verify_one(folder: str, decode: bool, part: ShardIndex) -> Verdict:
    name = part.shards[0].name
    try:
        if part.base is not None:
            with RemoteFolder(part.base, _BLOCK, _RETRIES, _TIMEOUT_S).stream(name) as stream:
                return examine(stream, part, decode)
        path = Path(folder) / name
        if not path.is_file():  # opening a fifo would wait for ever
            return missing(part, "is no plain file" if path.exists() else "is missing")
        with path.open("rb", buffering=0) as file:
            return examine(file, part, decode)
    except Missing:
        return missing(part, f"is missing at {part.base}")
    except OSError as error:
        if part.base is not None:
            raise
        return missing(part, f"cannot be read ({error.strerror})")


def _strangers(folder: Path, known: ShardIndex) -> list[str]:
    """Tell of tar files beside the index that it does not know."""
    if known.base is not None:
        return []
    names = {shard.name for shard in known.shards}
    others = sorted(path.name for path in folder.glob("*.tar") if path.name not in names)
    return [f"shard {name!r} is in the folder, but not in its index" for name in others]


def _each(function: Callable[[S], T], shards: Sequence[S], num_bytes: int, workers: int | None) -> Iterable[T]:
    """Return a function's results for each shard, in order, with a progress bar on a terminal."""
    if workers is None:  # none where this process is done before others would have started
        workers = min(default_workers(), len(shards)) if num_bytes >= _SMALL else 0
    found = Workers(function, workers, "start again with fewer --workers").map(shards)
    return tqdm(found, total=len(shards), unit="shard", disable=not sys.stderr.isatty(), dynamic_ncols=True)


def _summary(made: ShardIndex, scans: Sequence[Scan], out: Path) -> list[str]:
    """Return what was found, and what to do next."""
    classes = "none" if made.label_N is None else f"{int(made.label_N.max()) + 1} classes"
    attributes = len(made.attribute_names) or "none"
    return [
        *describe_splits(made),
        f"members: {', '.join(made.extensions)}   labels: {classes}   attributes: {attributes}",
        *(f"left out: {line}" for line in left_out(scans)),
        f"index: {out / HEAD}   next: mixdist verify {shlex.quote(str(out))}",
    ]
