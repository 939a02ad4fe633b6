"""The entry point of the command line: ``mixdist COMMAND``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from mixdist.messages import INTERRUPTED, USER_ERROR, format_error, own_failure, report
from mixdist.parallel.launch import Launch, follow_launcher, keep_large_blocks, quiet_torch

COMMANDS = {
    "train": ("mixdist.cli.train", "train"),
    "evaluate": ("mixdist.cli.evaluate", "evaluate_run"),
    "compare": ("mixdist.cli.compare", "compare_runs"),
    "baseline": ("mixdist.cli.baseline", "baseline"),
    "sample": ("mixdist.cli.sample", "sample"),
    "sweep": ("mixdist.cli.sweep", "sweep"),
    "prepare": ("mixdist.cli.prepare", "prepare"),
    "index": ("mixdist.cli.shards", "index"),
    "verify": ("mixdist.cli.shards", "verify"),
}
"""Module and function of each command: only its own module is imported, so a command without torch starts at once."""
ALONE = "compare", "sample", "sweep", "prepare", "index", "verify"
"""Commands whose ranks, if there are several, do not meet."""
USAGE = """usage: mixdist COMMAND [options]

commands:
  train     train a mixture of experts, in one process or under torchrun, srun or the deepspeed launcher
  evaluate  likelihoods, reconstruction and clustering of a run on held-out rows, on any layout
  compare   figures of runs side by side, with paired differences and their standard errors
  baseline  fit what a mixture is compared with: ppca, gmm, kmeans, or one vae
  sample    draw from every expert of a run into a picture
  sweep     many configs, settings and seeds in parallel, and one table; goes on after any interruption
  prepare   convert a data set from its original files into shards
  index     write an index for tar shards made by other tools
  verify    check shards against their index and list the damage

mixdist COMMAND --help lists the options of a command. A first run:
  torchrun --standalone --nproc-per-node 2 -m mixdist train --config configs/digits_moe.yaml"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 0, or 2 for an error that a user can fix, printed in one line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].startswith("--local_rank="):
        del argv[0]  # of the deepspeed launcher, which says it in the environment, too
    keep_large_blocks()
    quiet_torch()
    follow_launcher()
    sys.path.insert(0, os.getcwd())  # finds your own classes from the console script, as python -m does
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise ValueError(f"unknown command {argv[0]!r}: expected {', '.join(COMMANDS)}; see mixdist --help")
        module, name = COMMANDS[argv[0]]
        getattr(import_module(module), name)(argv[1:])
        return 0
    except Exception as error:
        launch = _launch()
        if launch is None or launch.world_size > 1:
            from mixdist.cli.ending import end_rank  # which needs torch

            return end_rank(error, launch, meets=argv[0] not in ALONE)
        told = format_error(error) if isinstance(error, (ValueError, OSError)) else own_failure(error)
        if not told:
            raise
        report(told)
        return USER_ERROR
    except KeyboardInterrupt as interrupt:
        remedy = str(interrupt) or ("run the same command to continue" if argv[0] == "prepare" else "start it again")
        launch = _launch()
        if launch is None or launch.rank == 0:
            print(f"mixdist: interrupted: {remedy}", file=sys.stderr)
        if "mixdist.parallel.meeting" in sys.modules:
            sys.modules["mixdist.parallel.meeting"].interrupt()
        return INTERRUPTED


def _launch() -> Launch | None:
    """Return the rank of this process; None where its environment is wrong."""
    try:
        return Launch.read()
    except ValueError:
        return None
