"""The synthetic data of seed 004, section 8.1: modes in the plane shaped like bananas, with their exact density.

Shape letters: N rows, C components (single bananas), G points of a grid; 2 is the plane.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from mixdist.arguments import check_arguments
from mixdist.data.dataset import Dataset, Source, Splits
from mixdist.data.sources.synthetic import require_number, require_rows
from mixdist.noise import Draw, Purpose
from mixdist.terms import Batch, Field

Modes = Literal[3, 5, 9]

CURVE = 0.04
VARIANCES = (100.0, 1.0)
"""Of a banana before it is bent, along its length and across; original units."""

# The modes' centres, in units of the separation: no two are closer than 1, and their mean is 0.
PLACES: dict[int, tuple[tuple[float, float], ...]] = {
    3: ((-0.5, -math.sqrt(3) / 6), (0.5, -math.sqrt(3) / 6), (0.0, math.sqrt(3) / 3)),
    5: (
        *((-math.sqrt(0.5), -math.sqrt(0.5)), (math.sqrt(0.5), -math.sqrt(0.5)), (0.0, 0.0)),
        *((-math.sqrt(0.5), math.sqrt(0.5)), (math.sqrt(0.5), math.sqrt(0.5))),
    ),
    9: tuple((float(column), float(row)) for row in (-1, 0, 1) for column in (-1, 0, 1)),
}
TWIN, TWIN_GAP = 2, 1 / 8
"""Of five modes, the one made of two bananas, and how far one lies above the other, in units of the separation."""


class Bananas(Source):
    """Bananas in the plane: "x" float32 (2,), label "y"; their density and entropy are known.

    A banana is x1 ~ N(0, 100), x2 ~ N(0, 1), then x2 <- x2 + 0.04 x1^2 - 100 * 0.04 (seed 004, section 8.1), moved to
    its centre. All bananas are equally probable: sample i belongs to component i modulo their number, and the ids of
    the test set go on from those of the training set. The seed does not say where its modes lie. These places are
    ours, with ``separation`` between the nearest two:

    - 3 modes: the corners of an equilateral triangle;
    - 5 modes: the corners of a square and its middle. The middle is two bananas, one separation / 8 above the other,
      under one label: six components, and a third of the rows in this mode;
    - 9 modes: a grid of 3 x 3.

    There are two units. Rows are stored in the original ones, those of the formula above. Values, which models see, are
    standardised alike in both directions: stored / ``unit``, so that their mean is 0 and their mean square, over both
    axes, is 1. Densities and entropies are those of values, in nats: log p(values) = log p(original) + 2 log(unit), and
    an entropy of values is that of original units less 2 log(unit).

    Args:
        modes: how many.
        rows: samples in the training set, of all modes together.
        test_rows: samples in the test set.
        separation: distance between the nearest modes, original units. A banana is about 60 wide (6 standard
            deviations) and 40 high; from 70 on, modes overlap by less than 1e-3 nats.
        seed: of the data, not of the run.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> from mixdist.data import Bananas
        >>> source = Bananas(modes=9, rows=900, test_rows=90)
        >>> train = source.load().train
        >>> train.rows["x"].shape, train.log_density_N.shape, train.num_classes
        (torch.Size([900, 2]), torch.Size([900]), 9)
        >>> round(source.entropy(), 3)  # nats, of standardised values
        -1.036
    """

    def __init__(
        self, modes: Modes = 3, rows: int = 64000, test_rows: int = 6400, separation: float = 80.0, seed: int = 0
    ) -> None:
        check_arguments(Bananas.__init__, locals(), "Bananas' ")
        if modes not in get_args(Modes):
            raise ValueError(f"modes ({modes}) must be 3, 5 or 9: choose one of the seed's three layouts.")
        require_rows(rows=rows, test_rows=test_rows)
        require_number("separation", separation, 0.0, 1e4)
        self.modes, self.rows, self.test_rows, self.separation, self.seed = modes, rows, test_rows, separation, seed

    def load(self) -> Splits[Dataset]:
        """Draw the samples.

        Raises:
            ValueError: if the seed is not from 0 to 2**64 - 1.
        """
        ids = torch.arange(self.rows + self.test_rows)
        centres_C2, label_C = self.components()
        component_N = ids % len(centres_C2)
        noise_N2 = Draw(self.seed, Purpose.DATA).normal(ids, [0], (2,), torch.float64)[0]
        rows = {"id": ids, "x": (bend(noise_N2) + centres_C2[component_N]).float()}
        rows["y"] = label_C[component_N].to(torch.uint8)
        parts = slice(0, self.rows), slice(self.rows, None)
        return Splits(*(self._dataset({name: column[part] for name, column in rows.items()}) for part in parts))

    def components(self) -> tuple[Tensor, Tensor]:
        """Return the bananas' centres, float64 (C, 2) in original units, and the mode of each, int64 (C,)."""
        centres, labels = list(PLACES[self.modes]), list(range(self.modes))
        if self.modes == 5:
            (x1, x2), half = centres[TWIN], TWIN_GAP / 2
            centres[TWIN : TWIN + 1] = [(x1, x2 - half), (x1, x2 + half)]
            labels.insert(TWIN, TWIN)
        return self.separation * torch.tensor(centres, dtype=torch.float64), torch.tensor(labels)

    @property
    def unit(self) -> float:
        """Original units in one of values: sqrt((mean_c |m_c|^2 + 100 + 1 + 2 * (0.04 * 100)^2) / 2), m_c the centres.

        The last term is the variance of 0.04 x1^2; together they are the variances of both axes.
        """
        long, across = VARIANCES
        spread = self.components()[0].square().sum(1).mean().item() + long + across + 2 * (CURVE * long) ** 2
        return math.sqrt(spread / 2)

    def log_density(self, x_N2: Tensor) -> Tensor:
        """Return the exact log p(x) of values, float64 (N,), nats.

        With (u, v) = x * unit - m_c, bending moves points along v only and keeps volumes, so
        p(x) = unit^2 * mean_c N(u; 0, 100) N(v - 0.04 u^2 + 4; 0, 1).

        Args:
            x_N2: values, any real dtype.
        """
        original_N2, centres_C2 = x_N2.double() * self.unit, self.components()[0].to(x_N2.device)
        log_p_CN = torch.stack([_log_banana(original_N2 - centre) for centre in centres_C2])
        return log_p_CN.logsumexp(0) - math.log(len(centres_C2)) + 2 * math.log(self.unit)

    def entropy(self) -> float:
        """Return the entropy of values, -E[log p(x)], nats; not an estimate from rows.

        It is the trapezoid rule over the unbent noise of each component, 721 x 721 points from -9 to 9 standard
        deviations: half the points change it by less than 1e-6. Where modes do not overlap it is
        log(C) + log(2 pi e sqrt(100 * 1)) - 2 log(unit).
        """
        axis_G = torch.linspace(-9.0, 9.0, 721, dtype=torch.float64)
        noise_G2, weight_G = torch.cartesian_prod(axis_G, axis_G), torch.exp(-axis_G.square() / 2)
        weight_G = torch.outer(weight_G, weight_G).flatten()
        means = [
            (weight_G * self.log_density((bend(noise_G2) + centre) / self.unit)).sum() / weight_G.sum()
            for centre in self.components()[0]
        ]
        return -torch.stack(means).mean().item()

    def _dataset(self, rows: Batch) -> Dataset:
        spec = {
            "x": Field((2,), torch.float32, scale=1 / self.unit),
            "y": Field((), torch.uint8, num_classes=self.modes),
        }
        log_density_N = self.log_density(spec["x"].values(rows["x"], torch.float64))
        return Dataset(rows, spec, "y", log_density_N=log_density_N)


def bend(noise_N2: Tensor) -> Tensor:
    """Turn standard normal noise into a banana around 0: u = 10 e1, v = e2 + 0.04 u^2 - 4 (seed 004, section 8.1)."""
    long, across = VARIANCES
    u_N, v_N = math.sqrt(long) * noise_N2[:, 0], math.sqrt(across) * noise_N2[:, 1]
    return torch.stack([u_N, v_N + CURVE * u_N.square() - CURVE * long], dim=1)


def _log_banana(x_N2: Tensor) -> Tensor:
    """log p of a banana around 0, original units, nats (N,)."""
    long, across = VARIANCES
    u_N = x_N2[:, 0]
    v_N = x_N2[:, 1] - CURVE * u_N.square() + CURVE * long
    return -0.5 * (u_N.square() / long + v_N.square() / across) - math.log(2 * math.pi * math.sqrt(long * across))
