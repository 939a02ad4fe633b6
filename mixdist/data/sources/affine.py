"""Affine targets over any data set with classes."""

from __future__ import annotations

import torch

from mixdist.arguments import check_arguments
from mixdist.data.dataset import Dataset, Source, Splits
from mixdist.data.sources.synthetic import require_rows
from mixdist.noise import Draw, Purpose
from mixdist.terms import Field, label_classes, real_field


class AffineTargets(Source):
    """Another source with one more field, "target" float32 (outputs,): y = W_c x + b_c of a row of class c.

    W_c and b_c are standard normal, without noise on y (seed document 001, section 8.1): the regression task in which
    each expert should find one class. With ``per_class: false`` all classes share one map, as the text of that section
    has it; y is then linear in x, and one affine model suffices.

    Args:
        source: whose rows it reads, all in memory.
        outputs: numbers of y.
        per_class: a map for each class; otherwise one for all.
        label: the class; unset, the label of the data set.
        field: x.
        seed: of the maps.

    Raises:
        ValueError: no number of outputs.

    Examples:
        >>> from mixdist.data import AffineTargets, Spiral
        >>> train = AffineTargets(Spiral(rows=100, test_rows=20), outputs=2).load().train
        >>> train.rows["target"].shape, train.label
        (torch.Size([100, 2]), 'arm')
    """

    def __init__(
        self,
        source: Source,
        outputs: int = 1,
        per_class: bool = True,
        label: str | None = None,
        field: str = "x",
        seed: int = 0,
    ) -> None:
        check_arguments(AffineTargets.__init__, locals(), "AffineTargets' ")
        if not isinstance(source, Source):
            raise ValueError(f"source ({source!r}) must be a source of data: give one, such as Spiral()")
        if not isinstance(outputs, int):
            raise ValueError(f"outputs ({outputs!r}) must be a whole number: give how many numbers y has")
        require_rows(outputs=outputs)
        self.source, self.outputs, self.per_class = source, outputs, per_class
        self.label, self.field, self.seed = label, field, seed

    def load(self) -> Splits[Dataset]:
        """Read the source and compute the targets.

        Raises:
            ValueError: the source is not in memory, or has no such label or field, or a field "target".
        """
        splits = self.source.load()
        return Splits(*(None if part is None else self._with_targets(part) for part in splits))  # type: ignore[arg-type]

    def _with_targets(self, part: object) -> Dataset:
        kind = type(self.source).__name__
        if not isinstance(part, Dataset):
            raise ValueError(f"source ({kind}) does not hold its rows in memory: name one that does, such as Idx")
        if "target" in part.spec:
            raise ValueError(f"source ({kind}) has a field target already: choose another source")
        x_ND = self._inputs(part)
        label = self.label or part.label or ""
        num_maps = label_classes(part.spec, label, "AffineTargets") if self.per_class else 1
        draw, maps, size = Draw(self.seed, Purpose.DATA, step=2), torch.arange(num_maps), x_ND.shape[1]
        weight = draw.normal(maps, [0], (self.outputs, size), torch.float64)[0]
        bias = draw.normal(maps, [1], (self.outputs,), torch.float64)[0]
        class_N = part.rows[label].long() if self.per_class else torch.zeros(len(x_ND), dtype=torch.int64)
        target = torch.empty(len(x_ND), self.outputs, dtype=torch.float64)
        for c in range(num_maps):
            chosen = class_N == c
            target[chosen] = x_ND[chosen] @ weight[c].T + bias[c]
        return Dataset(
            {**part.rows, "target": target.float()},
            {**part.spec, "target": Field((self.outputs,), torch.float32)},
            part.label,
            part.class_names,
            part.log_density_N,
            part.attribute,
            part.attribute_names,
        )

    def _inputs(self, part: Dataset) -> torch.Tensor:
        """Return x of all rows as models see it, (N, D) float64."""
        field = real_field(part.spec, self.field, "AffineTargets")
        return field.values(part.rows[self.field], torch.float64).flatten(1)
