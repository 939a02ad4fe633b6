"""What the checks of contracts add to the first 200 steps of a run: the same run with and without, by turns, each in a
process of its own, so that what a first call costs counts once in both.

The difference lies in the first steps, where it is not lost in the noise of the others: it is taken there.

    python benchmarks/checks.py --turns 21
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS, FIRST = 200, 3
CONFIGS = Path(__file__).parent.parent / "configs"


def one_run(config: str, checked: bool) -> None:
    """Do the first steps of a config; print the ms of processor time up to the first ones and up to the last."""
    from mixdist.cli.train import train
    from mixdist.training import trainer

    if not checked:
        trainer.inspect = lambda *args, **options: None  # type: ignore[assignment]
    spent, steps, told = 0.0, 0, {}

    def timed(method: Any) -> Any:
        """Return a method that counts its processor time; the last step ends the process."""

        def call(self: Any) -> Any:
            nonlocal spent, steps
            start = time.process_time()
            result = method(self)
            spent += 1000 * (time.process_time() - start)
            if method is advance:
                steps += 1
                told[steps] = spent
            if steps == STEPS:
                print(json.dumps([told[FIRST], told[STEPS]]), flush=True)
                os._exit(0)
            return result

        return call

    advance = trainer.Trainer.advance
    trainer.Trainer.begin, trainer.Trainer.advance = timed(trainer.Trainer.begin), timed(advance)  # type: ignore
    with tempfile.TemporaryDirectory() as folder:
        train(["--config", str(CONFIGS / f"{config}.yaml"), "--out", f"{folder}/run"])


def turn(config: str, checked: bool) -> list[float]:
    """Return what ``one_run`` prints in a fresh process of one thread."""
    command = [sys.executable, __file__, config, "--one", "checked" if checked else "plain"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found: list[float] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))
    return found


def compare(config: str, turns: int) -> None:
    """Print the medians over turns, and the least and the most."""
    pairs = [[turn(config, checked) for checked in (True, False)] for _ in range(turns + 1)][1:]
    added = sorted(with_[0] - without[0] for with_, without in pairs)
    whole = statistics.median(without[1] for _, without in pairs)
    middle = statistics.median(added)
    error = 1.2533 * statistics.stdev(added) / turns**0.5  # of a median
    print(
        f"{config}: checks {middle:.2f} +- {error:.2f} ms ({added[0]:.2f} to {added[-1]:.2f}) of {whole:.0f} ms of "
        f"{STEPS} steps: {100 * middle / whole:.2f}%"
    )


def main() -> None:
    """Measure and print a line for each config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=["digits_moe", "parabolas_moe"], help="names in configs/")
    parser.add_argument("--turns", type=int, default=21, help="pairs of runs; one more before them does not count")
    parser.add_argument("--one", choices=["checked", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    for config in options.configs:
        if options.one:
            one_run(config, options.one == "checked")
        compare(config, max(options.turns, 2))


if __name__ == "__main__":
    main()
