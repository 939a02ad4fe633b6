"""p(x|z) of classes: labels, and texts whose padding counts for nothing.

Shape letters: R rows, T places of a row, V classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mixdist.nets.likelihood import Likelihood
from mixdist.terms import Field


class Categorical(Likelihood):
    """A probability of a class at each place of a row, independent given the output; nats a row.

    Rows are one-hot and flat, (R, T V), zero at a place that is padding: it counts for nothing.

    Args:
        num_classes: V.
        padding: the class that means padding; None for none.

    Examples:
        >>> import torch
        >>> from mixdist.nets.categorical import Categorical
        >>> text = Categorical(num_classes=4, padding=0)
        >>> x = text.one_hot(torch.tensor([[1, 3, 0]]), torch.float32)  # two words, one place of padding
        >>> text.log_prob(x, torch.zeros(1, 12))  # -2 log 4
        tensor([-2.7726])
    """

    def __init__(self, num_classes: int, padding: int | None = None) -> None:
        super().__init__("bernoulli", 1.0, "identity")
        self.name, self.is_a, self.levels = "categorical", "mass", None  # type: ignore[assignment]
        self.num_classes, self.padding = num_classes, padding

    @property
    def limits(self) -> tuple[float, float] | None:
        return (0.0, 1.0)

    def one_hot(self, classes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return classes (R, T) or (R,) as rows (R, T V)."""
        flat = (classes[:, None] if classes.dim() == 1 else classes).long()
        x = F.one_hot(flat, self.num_classes).to(dtype)
        if self.padding is not None:
            x = x * (flat != self.padding)[..., None]
        return x.flatten(1)

    def _places(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (-1, self.num_classes))

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        return (self._places(x) * torch.log_softmax(self._places(output), dim=-1)).sum((-1, -2))

    def mean(self, output: Tensor) -> Tensor:
        """Return the probabilities, of the output's shape."""
        return torch.softmax(self._places(output), dim=-1).flatten(-2)

    def draw(self, output: Tensor, uniform: Tensor) -> Tensor:
        """Return x ~ p(x | output), one-hot, (R, T V), from as many uniform numbers: the largest of output + Gumbel."""
        best = (self._places(output) - (-self._places(uniform).log()).log()).argmax(-1)
        return F.one_hot(best, self.num_classes).to(output.dtype).flatten(-2)

    def likeliest(self, output: Tensor) -> Tensor:
        """Return the likeliest class at each place that is none of padding, (R, T)."""
        return self._places(output).argmax(-1)


def class_field(field: Field, name: str, asked_by: str) -> int:
    """Return the number of classes of a field of labels or of texts.

    Raises:
        ValueError: it holds real numbers, or more than one axis of classes.
    """
    if field.num_classes is None or len(field.shape) > 1:
        raise ValueError(
            f"{asked_by}'s likelihood 'categorical' needs classes, () or (places,), but the field {name!r} has shape "
            f"{field.shape} and num_classes {field.num_classes}: choose gaussian or another"
        )
    return field.num_classes
