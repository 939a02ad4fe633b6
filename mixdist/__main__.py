"""``python -m mixdist``, which is also what torchrun starts."""

import sys

try:
    from mixdist.cli.main import main

    code = main()
except KeyboardInterrupt:  # while all that a command needs is still being imported
    code = 130
sys.exit(code)
