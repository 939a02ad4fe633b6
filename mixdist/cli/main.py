"""``mixdist COMMAND``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from mixdist.messages import INTERRUPTED, SingleRankError, fail, format_error
from mixdist.parallel.launch import Launch, follow_launcher, keep_large_blocks

COMMANDS = {
    "train": ("mixdist.cli.train", "train"),
    "evaluate": ("mixdist.cli.evaluate", "evaluate_run"),
    "sample": ("mixdist.cli.evaluate", "sample"),
    "prepare": ("mixdist.cli.prepare", "prepare"),
    "index": ("mixdist.cli.shards", "index"),
    "verify": ("mixdist.cli.shards", "verify"),
}
"""Where each command lives: only its own module is imported, so that what needs no torch starts at once."""
USAGE = """usage: mixdist COMMAND [options]

commands:
  train     train a mixture of experts, in one process or under torchrun, deepspeed or srun
  evaluate  likelihoods, reconstruction and clustering of a run on held-out rows, on any layout
  sample    draw from every expert of a run into a picture
  prepare   turn a data set, as it comes, into shards to train from
  index     make the index of tar shards that others wrote
  verify    hold shards against their index, and name what is damaged

mixdist COMMAND --help tells each command's options. A first run:
  torchrun --standalone --nproc-per-node 2 -m mixdist train --config configs/digits_moe.yaml"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; give the exit code: 0, or 2 for what a user can fix, told in one line by rank 0."""
    argv = list(sys.argv[1:] if argv is None else argv)
    keep_large_blocks()
    follow_launcher()
    sys.path.insert(0, os.getcwd())  # classes of one's own are found from the console script as with python -m
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise ValueError(f"unknown command {argv[0]!r}: expected {', '.join(COMMANDS)}; see mixdist --help")
        module, name = COMMANDS[argv[0]]
        getattr(import_module(module), name)(argv[1:])
        return 0
    except (ValueError, OSError) as error:
        return fail(format_error(error), Launch.read().rank, alone=isinstance(error, SingleRankError))
    except KeyboardInterrupt as interrupt:
        remedy = str(interrupt) or ("the same command goes on" if argv[0] == "prepare" else "start it again")
        if Launch.read().rank == 0:
            print(f"mixdist: interrupted: {remedy}", file=sys.stderr)
        return INTERRUPTED
