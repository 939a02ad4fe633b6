"""What a sweep starts, to end with it: ``python -m mixdist.sweep.child PARENT MODULE WORD ...``."""

from __future__ import annotations

import os
import runpy
import sys

from mixdist.parallel.launch import end_with_parent


def main() -> None:
    """Run a module as ``python -m`` does, and get SIGTERM when the process PARENT ends in any way."""
    parent, module, *words = sys.argv[1:]
    end_with_parent()
    if os.getppid() != int(parent):  # it ended before the line above
        sys.exit(1)
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
