"""``mixdist prepare``: a data set in its original files, converted to shards."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from tqdm import tqdm

from mixdist.config.options import parse, plain_parser
from mixdist.data.formats import SOURCES, Listing, open_listing
from mixdist.data.prepare.prepare import SET_ASIDE, SHARD_SAMPLES, Prepared, count_reasons
from mixdist.data.prepare.prepare import prepare as make_shards
from mixdist.data.prepare.recipe import AsTheyAre, Encoding, Recipe
from mixdist.data.shards.index import ShardIndex
from mixdist.data.workers import MOST_WORKERS, default_workers
from mixdist.messages import counted

ROWS = "rows"
"""The kind of source that is the data of a config."""


def prepare(argv: Sequence[str]) -> None:
    """``mixdist prepare SOURCE FOLDER --out DIR``: a data set as shards and their index."""
    options = parse(prepare_parser(), argv)
    if not options.out:
        raise ValueError("prepare needs a folder for the shards: name a new or an empty one, as --out data/shards")
    out = Path(options.out)
    rows: dict[str, Any] | None = None
    recipe: Recipe | AsTheyAre = AsTheyAre()
    workers = default_workers() if options.workers is None else options.workers
    if options.source == ROWS:
        listing, rows = _rows(options)
        workers = 0  # this process has the source
    else:
        listing = open_listing(options.source, Path(options.folder), options.labels == "source")
        channels = options.channels or listing.channels
        recipe = Recipe(channels, options.size, options.crop, options.encode, options.min_side)
    total = sum(part.num for part in listing.parts)
    with tqdm(total=total, unit="image", disable=not sys.stderr.isatty(), smoothing=0) as bar:
        prepared = make_shards(
            options.source,
            listing,
            recipe,
            out,
            options.shard_samples,
            workers,
            lambda done, total: bar.update(done - bar.n) and None,
            rows,
        )
    print(_summary(prepared, out, listing.passed_over), flush=True)


def _rows(options: Namespace) -> tuple[Listing, dict[str, Any]]:
    """Return the rows of the data of a config as samples of shards, and what their fields are."""
    free = {"channels": None, "size": None, "crop": None, "encode": "png", "labels": "source", "min_side": 8}
    if given := [name for name, unset in free.items() if options[name] != unset]:
        name = given[0].replace("_", "-")
        raise ValueError(f"--{name} ({options[given[0]]}) is for images, and rows are kept as they are: leave it out")
    if not Path(options.folder).is_file():
        raise ValueError(
            f"prepare rows needs a config, whose data it takes, and {options.folder!r} is no file: name one"
        )
    # Other sources need no torch.
    from mixdist.config.parsing import read_config
    from mixdist.data.prepare.rows import list_rows
    from mixdist.data.sources.splits import load_splits

    data = read_config(Path(options.folder)).data
    return list_rows(load_splits(data, None), type(data).__name__)


def prepare_parser() -> ArgumentParser:
    """Make the parser of ``mixdist prepare``."""
    parser = plain_parser(
        "mixdist prepare",
        "Turn a data set, as it comes, into webdataset's tar shards and an index of them. An image keeps its bytes if "
        "it is a JPEG, PNG or WebP in grey or RGB, upright, and neither --size nor --crop is given; others are "
        "converted. What cannot be used is set aside and listed in DIR/set_aside.jsonl. The same source and options "
        "give the same bytes, whatever --workers; whatever ends this command, the same command goes on. Sources: "
        "celeba (img_align_celeba, list_attr_celeba.txt, list_eval_partition.txt), imagenet (train/WNID, val/WNID), "
        "cifar10 and cifar100 (binary versions), svhn (train_32x32.mat, test_32x32.mat), idx (MNIST's four files and "
        "its relatives'), parquet (train-00000-of-00002.parquet and so on, from the Hugging Face hub), folder (any "
        "tree of images: folders train, valid and test are splits, the folders in them, or at the top, classes). The "
        "source rows takes a config as its FOLDER: rows of its data, of any source, are kept with all fields, "
        "as several modalities and which of them are present. "
        "Example: mixdist prepare celeba data/celeba --out data/celeba64 --crop 148 --size 64",
    )
    parser.add_argument("source", type=Literal[(*SOURCES, ROWS)], help="the kind of source")
    parser.add_argument("folder", type=str, help="where the source lies; for rows, a config")
    parser.add_argument(
        "--out", type=str | None, help="the folder of the shards, always needed: new, empty, or to go on with"
    )
    parser.add_argument("--size", type=int | None, help="bring images to a square of so many pixels a side")
    parser.add_argument(
        "--crop",
        type=int | None,
        help="keep only the square of so many pixels a side in the middle, before --size; unset, --size keeps the "
        "largest",
    )
    parser.add_argument(
        "--channels", type=Literal[1, 3] | None, help="1 for grey, 3 for RGB; unset, 1 for idx and 3 for others"
    )
    parser.add_argument(
        "--encode",
        type=Encoding,
        default="png",
        help="how images are written that are converted: png (lossless), jpg or webp (quality 95)",
    )
    parser.add_argument(
        "--labels", type=Literal["source", "none"], default="source", help="classes: as the source has them, or none"
    )
    parser.add_argument(
        "--min-side", type=int, default=8, help="set aside images with fewer pixels on their shorter side"
    )
    parser.add_argument("--shard-samples", type=int, default=SHARD_SAMPLES, help="samples a shard")
    parser.add_argument(
        "--workers",
        type=int | None,
        help=f"processes that make shards; 0 or 1: this one; unset, one a core, at most {MOST_WORKERS}",
    )
    return parser


def _summary(prepared: Prepared, out: Path, passed_over: int) -> str:
    """Return what lies in the folder, and what to do next."""
    lines = [f"{out} was finished before; nothing was changed"] if prepared.before else []
    lines += describe_splits(prepared.index)
    if prepared.set_aside:
        lines.append(f"set aside: {len(prepared.set_aside)} images, listed in {out / SET_ASIDE}")
        lines += [f"  {number}: {reason}" for reason, number in count_reasons(prepared.set_aside)]
    if passed_over:
        lines.append(f"passed over: {passed_over} files that are no images by their names")
    lines.append(f"shards: {out}   next: mixdist verify {shlex.quote(str(out))}")
    return "\n".join(lines)


def describe_splits(index: ShardIndex) -> list[str]:
    """Return a line about the shards of each split."""
    lines = []
    for split in index.splits:
        shards = [shard for shard in index.shards if shard.split == split]
        samples, size = sum(shard.num_samples for shard in shards), sum(shard.num_bytes for shard in shards)
        lines.append(f"{split}: {counted(samples, 'sample')}, {size / 1e6:.1f} MB, {counted(len(shards), 'shard')}")
    return lines
