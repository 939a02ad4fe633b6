"""Data whose truth is known: Gaussian blobs, and the two parabolas that k-means cannot tell apart."""

from __future__ import annotations

import torch
from torch import Tensor

from mixdist.arguments import check_arguments
from mixdist.data.dataset import Dataset, Source, Splits
from mixdist.noise import Draw, Purpose
from mixdist.terms import Batch, Field, Spec


class Blobs(Source):
    """Gaussian blobs: "x" float32 (D,) = centre of the class + spread * N(0, I), label "y".

    The centres are drawn from a normal distribution and scaled until the two nearest are ``separation`` apart. Sample
    i has class i modulo ``num_classes``; the ids of the test set go on from those of the training set.

    Args:
        num_classes: number of blobs, up to 256.
        num_features: D. With few features and many classes the farthest centres are very far apart.
        rows: samples in the training set.
        test_rows: samples in the test set.
        spread: standard deviation of a blob along each axis.
        separation: distance between the two nearest centres.
        seed: of the data, not of the run.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> from mixdist.data import Blobs
        >>> train, test, _ = Blobs(num_classes=3, num_features=2, rows=90, test_rows=30).load()
        >>> train.rows["x"].shape, test.rows["id"][0].item()
        (torch.Size([90, 2]), 90)
        >>> train.rows["y"][:5].tolist()
        [0, 1, 2, 0, 1]
    """

    def __init__(
        self,
        num_classes: int = 3,
        num_features: int = 2,
        rows: int = 1000,
        test_rows: int = 200,
        spread: float = 0.1,
        separation: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_arguments(Blobs.__init__, locals(), "Blobs' ")
        if not 1 <= num_classes <= 256:
            raise ValueError(f"num_classes ({num_classes}) must be from 1 to 256: labels are single bytes.")
        require_rows(num_features=num_features, rows=rows, test_rows=test_rows)
        require_number("spread", spread, 0.0, 1e6)
        require_number("separation", separation, 0.0, 1e6)
        self.num_classes, self.num_features, self.rows, self.test_rows = num_classes, num_features, rows, test_rows
        self.spread, self.separation, self.seed = spread, separation, seed

    def load(self) -> Splits[Dataset]:
        """Draw the samples.

        Raises:
            ValueError: if the seed is not from 0 to 2**64 - 1.
        """
        ids = torch.arange(self.rows + self.test_rows)
        y = ids % self.num_classes
        noise = Draw(self.seed, Purpose.DATA, step=1).normal(ids, [0], (self.num_features,), torch.float64)[0]
        x = (self.centres()[y] + self.spread * noise).float()
        spec = {
            "x": Field((self.num_features,), torch.float32),
            "y": Field((), torch.uint8, num_classes=self.num_classes),
        }
        return split_rows({"id": ids, "x": x, "y": y.to(torch.uint8)}, spec, self.rows, "y")

    def centres(self) -> Tensor:
        """Return the centres (classes, D), float64."""
        classes = torch.arange(self.num_classes)
        centres = Draw(self.seed, Purpose.DATA).normal(classes, [0], (self.num_features,), torch.float64)[0]
        if self.num_classes == 1:
            return centres
        return centres * (self.separation / torch.pdist(centres).min())


class Parabolas(Source):
    """The two parabolas by which the seed text explains a mixture of experts: fields "x" (1,) and "y" (1,), float32.

    x is uniform on [-1, 1]; y = x^2 - 1 for x < x' and y = 1 - x^2 for x >= x', plus noise. The label "branch" is 0 on
    the left of x' and 1 on the right. The branches meet nowhere inside the interval, so which one a point lies on is
    plain. The split x' is off centre: two-means on a uniform x cuts it in the middle, at 0, and one of its clusters
    holds parts of both parabolas. Only a gate that learns together with its experts finds x'.

    Args:
        rows: samples in the training set.
        test_rows: samples in the test set.
        split: the point x', between -1 and 1; near 0, k-means would find it.
        noise: standard deviation of the noise on y.
        seed: of the data, not of the run.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> from mixdist.data import Parabolas
        >>> train = Parabolas(rows=100, split=0.4).load().train
        >>> bool(((train.rows["x"][:, 0] >= 0.4) == train.rows["branch"]).all())
        True
        >>> train.class_names
        ('left', 'right')
    """

    def __init__(
        self, rows: int = 1000, test_rows: int = 200, split: float = 0.4, noise: float = 0.02, seed: int = 0
    ) -> None:
        check_arguments(Parabolas.__init__, locals(), "Parabolas' ")
        require_rows(rows=rows, test_rows=test_rows)
        if not -1.0 < split < 1.0:
            raise ValueError(f"split ({split}) must be between -1 and 1: set it to 0.4, for example.")
        require_number("noise", noise, 0.0, 1e6)
        self.rows, self.test_rows, self.split, self.noise, self.seed = rows, test_rows, split, noise, seed

    def load(self) -> Splits[Dataset]:
        """Draw the samples.

        Raises:
            ValueError: if the seed is not from 0 to 2**64 - 1.
        """
        ids = torch.arange(self.rows + self.test_rows)
        # The branch and y follow from x as it is stored, so rounding cannot put a point on the wrong side.
        x = (Draw(self.seed, Purpose.DATA).uniform(ids, [0], (1,), torch.float64)[0] * 2.0 - 1.0).float()
        right = x.double() >= self.split
        parabola = x.double().square() - 1.0
        noise = Draw(self.seed, Purpose.DATA, step=1).normal(ids, [0], (1,), torch.float64)[0]
        y = torch.where(right, -parabola, parabola) + self.noise * noise
        spec = {
            "x": Field((1,), torch.float32),
            "y": Field((1,), torch.float32),
            "branch": Field((), torch.uint8, num_classes=2),
        }
        rows = {"id": ids, "x": x, "y": y.float(), "branch": right[:, 0].to(torch.uint8)}
        return split_rows(rows, spec, self.rows, "branch", ("left", "right"))


def split_rows(
    rows: Batch, spec: Spec, num_train: int, label: str, class_names: tuple[str, ...] = ()
) -> Splits[Dataset]:
    """Return splits: the first ``num_train`` rows for training, the rest for testing."""
    train = {name: column[:num_train] for name, column in rows.items()}
    test = {name: column[num_train:] for name, column in rows.items()}
    return Splits(Dataset(train, spec, label, class_names), Dataset(test, spec, label, class_names))


def require_rows(**counts: int) -> None:
    """Check numbers of rows, by the names of their arguments."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} ({count}) must be at least 1: raise {name}.")


def require_number(name: str, value: float, low: float, high: float) -> None:
    """Check an argument against its range, both ends included."""
    if not low <= value <= high:
        raise ValueError(f"{name} ({value}) must be a number from {low:g} to {high:g}: set {name} within it.")
