"""``mixdist sample``: a picture of samples of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixdist.config.options import parse, plain_parser
from mixdist.model import load
from mixdist.report.gallery import samples_picture


def sample(argv: Sequence[str]) -> None:
    """``mixdist sample RUN``: a picture with a row of samples for each expert, or of the whole mixture."""
    parser = plain_parser(
        "mixdist sample",
        "Draw from the prior of every expert of a run into a picture: a row of images each (means of p(x|z)), or "
        "points in the plane (with the noise of p(x|z)); in one process, without the data. Example: mixdist sample "
        "runs/digits_moe-1 --num_samples 16",
    )
    parser.add_argument("run", type=str, help="the run's directory")
    parser.add_argument("--out", type=str | None, help="the picture, a PNG file; unset, RUN/images/samples.png")
    parser.add_argument("--num_samples", type=int, default=8, help="samples of each expert, 1 to 1000")
    parser.add_argument("--seed", type=int, default=0, help="of the draws: the same seed, the same samples")
    options = parse(parser, argv)
    if not 1 <= options.num_samples <= 1000:
        raise ValueError(f"--num_samples ({options.num_samples}) must be from 1 to 1000")
    path = Path(options.out or Path(options.run) / "images" / "samples.png")
    samples_picture(path, load(options.run).rows_of_samples(options.num_samples, options.seed))
    print(path)
