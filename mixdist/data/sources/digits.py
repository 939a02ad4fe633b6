"""The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn: real data without a download."""

from __future__ import annotations

import torch

from mixdist.arguments import check_arguments
from mixdist.data.dataset import Dataset, Source, Splits
from mixdist.noise import Purpose, derive
from mixdist.noise.philox import philox
from mixdist.terms import Field


class Digits(Source):
    """Scikit-learn's digits: "x" uint8 (1, 8, 8) from 0 to 16 with scale 1/16, label "y" with 10 classes.

    The id of a sample is its place in scikit-learn's order. The test set is the samples with the smallest hashes of
    their ids: it does not depend on the run, and a smaller test set is part of a larger one.

    Args:
        test_fraction: the part of the samples that is held out, between 0 and 1.

    Raises:
        ValueError: if ``test_fraction`` is not between 0 and 1.

    Examples:
        >>> from mixdist.data import Digits
        >>> train, test, _ = Digits(test_fraction=0.1).load()
        >>> len(train), len(test), train.num_classes
        (1617, 180, 10)
        >>> test.rows["x"].shape, test.rows["x"].dtype
        (torch.Size([180, 1, 8, 8]), torch.uint8)
    """

    def __init__(self, test_fraction: float = 0.2) -> None:
        check_arguments(Digits.__init__, locals(), "Digits' ")
        if not 0.0 < test_fraction < 1.0:
            raise ValueError(f"test_fraction ({test_fraction}) must be between 0 and 1: set it to 0.2, for example.")
        self.test_fraction = test_fraction

    def load(self) -> Splits[Dataset]:
        """Read the digits: 1,438 for training and 359 for testing, unless ``test_fraction`` says otherwise.

        Raises:
            ValueError: if ``test_fraction`` leaves the training set or the test set without samples.
        """
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        rows = {
            "id": torch.arange(len(images)),
            "x": torch.from_numpy(images).to(torch.uint8).reshape(-1, 1, 8, 8),
            "y": torch.from_numpy(labels).to(torch.uint8),
        }
        spec = {"x": Field((1, 8, 8), torch.uint8, scale=1 / 16), "y": Field((), torch.uint8, num_classes=10)}
        # These words have named the split since the first version; nothing else is drawn for this data set.
        zero = torch.tensor(0)
        hashes = philox((zero, rows["id"], zero, zero), derive(0, Purpose.DATA))[0]
        split = round(self.test_fraction * len(images))
        by_hash = hashes.argsort(stable=True)
        parts = by_hash[split:].sort().values, by_hash[:split].sort().values
        names = tuple(str(digit) for digit in range(10))
        return Splits(*(Dataset({key: column[p] for key, column in rows.items()}, spec, "y", names) for p in parts))
