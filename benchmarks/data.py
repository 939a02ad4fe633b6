"""Samples a second out of tar shards: mixdist against webdataset's own pipeline, on the same shards, taking turns.

    mixdist prepare celeba data/celeba --out data/celeba-shards
    python benchmarks/data.py data/celeba-shards --workers 2

Decoded: one pass over the training split by both, with as many worker processes and the same decoder (Pillow): images
as batches of uint8 (channels, height, width), shuffled as each does it by default (mixdist by blocks, webdataset by
shards and a buffer of 1,000). The clock runs from the first batch to the last, so the start of processes is left out.
Raw: the bytes of every sample in the process itself, without decoding; mixdist reads at the places that the index has,
in random order, and holds each against its crc32; webdataset streams its shards. Memory: what this process and its
workers hold after each pass. Index: microseconds of processor time to scan a shard with all its checks and checksums,
and what they make of 1.28 million samples. Figures are medians of turns, ratios of neighbouring turns.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from turns import figures, plain, positive, ratio

from mixdist.data import Loader, Shards
from mixdist.data.shards.index import ShardIndex
from mixdist.data.shards.samples import ShardSamples
from mixdist.data.shards.scan import scan
from mixdist.report.metrics import table

IMAGENET = 1_281_167
IMAGES = "jpg;png;webp;jpeg"


def ours(samples: ShardSamples, batch: int) -> Callable[[], Iterator[int]]:
    """Return what makes a pass: the sizes of its batches."""
    loader = Loader(samples, batch, seed=0, epochs=10**6)
    passes = iter(range(10**6))

    def once() -> Iterator[int]:
        epoch = next(passes)
        for index in range(loader.num_batches):
            yield len(loader.batch(epoch, index).rows["x"])

    return once


def theirs(urls: Sequence[str], workers: int, batch: int) -> Callable[[], Iterator[int]]:
    """Return what makes a pass of webdataset's pipeline."""
    pipeline = (
        webdataset.WebDataset(list(urls), shardshuffle=len(urls), seed=0)
        .shuffle(1000)
        .decode("rgb8")
        .to_tuple(IMAGES)
        .map_tuple(_planes)
        .batched(batch)
    )
    loader = webdataset.WebLoader(pipeline, num_workers=workers, batch_size=None, persistent_workers=workers > 0)

    def once() -> Iterator[int]:
        for (images,) in loader:
            yield len(images)

    return once


def _planes(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def speed(once: Callable[[], Iterator[int]]) -> float:
    """Return the samples a second of a pass, from its first batch to its last."""
    sizes = once()
    next(sizes)
    begin = time.perf_counter()
    return sum(sizes) / (time.perf_counter() - begin)


def raw_ours(samples: ShardSamples) -> float:
    """Return the members read a second, in random order."""
    order = np.random.default_rng(0).permutation(len(samples))
    begin = time.perf_counter()
    wanted = samples.shelf.wanted(samples.places[order])
    for one in wanted:
        samples.shelf.pool.reading.storage.read(*one)
    return len(wanted) / (time.perf_counter() - begin)


def raw_theirs(urls: Sequence[str]) -> float:
    """Return the samples a second of webdataset's reader."""
    begin = time.perf_counter()
    count = sum(1 for _ in webdataset.WebDataset(list(urls), shardshuffle=False))
    return count / (time.perf_counter() - begin)


def memory() -> int:
    """Return the bytes resident in this process and all that it has started, shared ones counted once (PSS)."""
    total, seen = 0, [os.getpid()]
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
        except (OSError, IndexError):
            continue
    for pid in seen:
        seen += children.get(pid, [])
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue
    return total


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything."""
    root, index = Path(options.root), ShardIndex.read(Path(options.root))
    shards = [shard for shard in index.shards if shard.split == "train"]
    urls = [str(root / shard.name) for shard in shards]
    samples = Shards(options.root, workers=options.workers, holdout=options.holdout, label="none").load().train
    passes = {"mixdist": ours(samples, options.batch), "webdataset": theirs(urls, options.workers, options.batch)}
    rates: dict[str, list[float]] = {f"{what} {name}": [] for what in ("decoded", "raw") for name in passes}
    held = []
    for turn in range(-1, options.turns):
        for name in list(passes) if turn % 2 else list(passes)[::-1]:
            found = {f"decoded {name}": speed(passes[name])}
            found[f"raw {name}"] = raw_ours(samples) if name == "mixdist" else raw_theirs(urls)
            for what, rate in found.items() if turn >= 0 else ():
                rates[what].append(rate)
    before = list(passes)
    for _ in range(options.epochs):
        sum(passes[before[0]]())
        held.append(memory())
    # The processor's time: one core's, whatever else the machine does.
    begin, scanned = time.process_time(), sum(len(scan(Path(url)).keys) for url in urls)
    each = (time.process_time() - begin) / scanned
    samples.close()
    num_bytes = sum(shard.num_bytes for shard in shards) / scanned
    return {
        "samples": scanned,
        "rates": {what: figures(values) for what, values in rates.items()},
        "decoded_over_webdataset": ratio(rates["decoded mixdist"], rates["decoded webdataset"]),
        "raw_over_webdataset": ratio(rates["raw mixdist"], rates["raw webdataset"]),
        "held_bytes": held,
        "scan_us": 1e6 * each,
        "scan_bytes_a_sample": num_bytes,
        "scan_imagenet_s": IMAGENET * each,
    }


def tell(found: dict[str, Any]) -> None:
    """Print tables and a line of JSON."""
    lines = [[what, *(f"{rate[of]:.0f}" for of in ("median", "min", "max"))] for what, rate in found["rates"].items()]
    print(table(["samples a second", "median", "least", "most"], lines))
    print("decoded over webdataset", plain(found["decoded_over_webdataset"]))
    print("raw over webdataset", plain(found["raw_over_webdataset"]))
    print("held after each pass, MiB:", *(f"{held / 2**20:.0f}" for held in found["held_bytes"]))
    print(
        f"scan: {found['scan_us']:.1f} us a sample of {found['scan_bytes_a_sample']:.0f} bytes in the tar; "
        f"{IMAGENET} samples: {found['scan_imagenet_s']:.0f} s"
    )
    print(json.dumps(found))


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder of shards with their index")
    parser.add_argument("--workers", type=positive, default=2)
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--turns", type=positive, default=7)
    parser.add_argument("--epochs", type=positive, default=3, help="passes after which memory is looked at")
    parser.add_argument(
        "--holdout", type=float, default=0.0, help="for shards without a split of their own to hold out"
    )
    tell(measure(parser.parse_args(words)))


if __name__ == "__main__":
    main()
