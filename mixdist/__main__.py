"""``python -m mixdist``, which is also what torchrun starts."""

import sys

from mixdist.cli import main

sys.exit(main())
