"""The spiral of seed document 001: arms in the plane that no Gaussian covers."""

from __future__ import annotations

import torch

from mixdist.arguments import check_arguments
from mixdist.data.dataset import Dataset, Source, Splits
from mixdist.data.sources.synthetic import require_number, require_rows, split_rows
from mixdist.noise import Draw, Purpose
from mixdist.terms import Field

ARMS = 5
FIRST, LAST, TURN = 2.5, 10.0, 1.25
"""Radius at the two ends of an arm; the angle that an arm takes, and where the next begins, radians."""


class Spiral(Source):
    """Five arms: "x" float32 (2,) = (r sin a, r cos a), label "arm".

    In arm j, r goes evenly from 2.5 to 10 and a from 1.25 j to 1.25 (j + 1), plus noise on the angle (seed document
    001, section 8.1). Row i is in arm i modulo 5, in the training set and in the test set.

    Args:
        rows: samples in the training set.
        test_rows: samples in the test set.
        noise: standard deviation of the noise on the angle, radians.
        seed: of the data, not of the run.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> from mixdist.data import Spiral
        >>> train, test, _ = Spiral(rows=100, test_rows=20).load()
        >>> train.rows["x"].shape, test.rows["arm"][:6].tolist()
        (torch.Size([100, 2]), [0, 1, 2, 3, 4, 0])
    """

    def __init__(self, rows: int = 25_000, test_rows: int = 5_000, noise: float = 0.05, seed: int = 0) -> None:
        check_arguments(Spiral.__init__, locals(), "Spiral's ")
        require_rows(rows=rows, test_rows=test_rows)
        require_number("noise", noise, 0.0, 1e6)
        self.rows, self.test_rows, self.noise, self.seed = rows, test_rows, noise, seed

    def load(self) -> Splits[Dataset]:
        """Draw the samples.

        Raises:
            ValueError: if the seed is not from 0 to 2**64 - 1.
        """
        ids = torch.arange(self.rows + self.test_rows)
        along = torch.cat([self._along(n) for n in (self.rows, self.test_rows)])
        arm = torch.cat([torch.arange(n) % ARMS for n in (self.rows, self.test_rows)])
        noise = Draw(self.seed, Purpose.DATA).normal(ids, [0], (), torch.float64)[0]
        radius, angle = FIRST + (LAST - FIRST) * along, TURN * (arm + along) + self.noise * noise
        x = torch.stack([radius * angle.sin(), radius * angle.cos()], dim=1)
        spec = {"x": Field((2,), torch.float32), "arm": Field((), torch.uint8, num_classes=ARMS)}
        return split_rows({"id": ids, "x": x.float(), "arm": arm.to(torch.uint8)}, spec, self.rows, "arm")

    @staticmethod
    def _along(num_rows: int) -> torch.Tensor:
        """Return how far along its arm each row of a set is, from 0 to 1."""
        return torch.arange(num_rows).double() // ARMS / max(-(-num_rows // ARMS) - 1, 1)
