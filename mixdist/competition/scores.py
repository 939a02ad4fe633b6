"""How likely a sample is under an expert, as competing experts are compared: pure, a column of scores for an expert.

Shape letters: R rows, N samples of the training set, E experts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixdist.arguments import check_arguments
from mixdist.competition.discriminators import Discriminator
from mixdist.experts import Expert
from mixdist.experts.importance import importance
from mixdist.nets import Network
from mixdist.noise import Moment, Purpose
from mixdist.terms import Batch, Spec, label_classes


class Score(ABC):
    """Gives s_j(x), the score of rows for expert j, nats; a sample belongs to argmax_j of it, or of it plus log alpha_j
    where shares count.

    Attributes:
        normalized: whether log Z_j = logsumexp_i s_j(x_i) over the whole training set is taken off: the score then
            sums to 1 over the training set in exp, for each expert.
        keeps: whether samples stay where they are; scores are then for rows that have no place yet.
        by_shares: whether shares count when samples are given, where the competition's ``by_shares`` is unset.
        fields: the fields of a row that it reads beyond those of the experts.
    """

    normalized: bool = False
    keeps: bool = False
    by_shares: bool = False
    fields: tuple[str, ...] = ()

    def check(self, spec: Spec, num_experts: int, template: Expert) -> None:  # noqa: B027
        """Check the score against data and experts.

        Raises:
            ValueError: it cannot score them.
        """

    def describe(self) -> dict[str, Any]:
        """Return, as JSON, what must be the same for a checkpoint to be resumed, beside the class."""
        return {}

    @abstractmethod
    def column(
        self, e: int, expert: Expert, discriminator: Discriminator | None, rows: Batch, at: Moment, dtype: torch.dtype
    ) -> Tensor:
        """Return s_e(x), before normalisation, (R,) nats.

        Args:
            e: the expert's number.
            expert: the expert.
            discriminator: its discriminator, where the score trains them.
            rows: of real numbers.
            at: names the draws.
            dtype: of real numbers.
        """


class Discriminators(Score):
    """-l_j(x) - logsumexp_i -l_j(x_i), with l_j the logit of a discriminator of data against expert j's samples.

    At the optimum l_j = log dP_data / dP_j, so that exp(-l_j) is proportional to dP_j on the samples of the training
    set, where it is normalised (seed document 004, section 3, with (1 - D) / D = exp(-l)). All discriminators see all
    data, a batch of it against as many samples of their expert.

    Args:
        network: of each discriminator; unset, an MLP with two hidden layers of 500.
        epochs: passes over the data a round.
        batches: batches a round, in place of epochs: seed document 004 trains one on MNIST.
        fresh: new weights each round (its synthetic setting), or the ones of the round before, trained on (MNIST).
        batch_size: rows of data in a batch.
        optimizer: any torch optimiser that works element by element; unset, Adam at 1e-3.
        observe: draw samples from p(x|z) with its noise, as the density has it; otherwise they are its means.
        reads: the field that they read, which is the one that the experts sample.

    Raises:
        ValueError: a number below 1.

    Examples:
        >>> from mixdist.competition import Discriminators
        >>> from mixdist.nets import MLP
        >>> Discriminators(MLP([100]), batches=1, fresh=False).normalized
        True
    """

    normalized = True

    def __init__(
        self,
        network: Network | None = None,
        epochs: int = 2,
        batches: int | None = None,
        fresh: bool = True,
        batch_size: int = 100,
        optimizer: Callable[[Iterable[Tensor]], Optimizer] | None = None,
        observe: bool = True,
        reads: str = "x",
    ) -> None:
        check_arguments(Discriminators.__init__, locals(), "Discriminators' ")
        for name, value in (("epochs", epochs), ("batches", batches), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"Discriminators' {name} ({value}) must be at least 1: give 1 or more")
        self.network, self.epochs, self.batches, self.fresh = network, epochs, batches, fresh
        self.batch_size, self.observe, self.reads = batch_size, observe, reads
        self.optimizer = optimizer or torch.optim.Adam

    def describe(self) -> dict[str, Any]:
        """Return what decides which rows are in a batch: passes over the data go on through all rounds."""
        length = {"epochs": self.epochs} if self.batches is None else {"batches": self.batches}
        return {"batch_size": self.batch_size, **length}

    def discriminator(self, spec: Spec) -> Discriminator:
        """Return a new discriminator of one expert, its weights drawn from torch's generator."""
        return Discriminator(spec, self.network, self.reads)

    def check(self, spec: Spec, num_experts: int, template: Expert) -> None:
        wanted = "draw" if self.observe else "sample"
        if template.latent_shape is None or not template.can(wanted):
            raise ValueError(
                f"Discriminators need experts that {wanted}, and {type(template).__name__} does not: take another "
                f"expert, set observe to {str(not self.observe).lower()}, or take the score Elbo"
            )
        drawn = getattr(template, "field", "x")
        if self.reads != drawn:
            raise ValueError(
                f"Discriminators' reads ({self.reads}) must be the field that {type(template).__name__} samples: set "
                f"it to {drawn}"
            )

    def column(
        self, e: int, expert: Expert, discriminator: Discriminator | None, rows: Batch, at: Moment, dtype: torch.dtype
    ) -> Tensor:
        assert discriminator is not None
        return -discriminator(rows[discriminator.fields[0]])


class Elbo(Score):
    """The expert's ELBO from one posterior sample, log p(x|z) - KL, or its log p(x) where it has no latent variables.

    Shares count unless the competition's ``by_shares`` says otherwise. Without, with
    :class:`mixdist.experts.Centroid`, it is k-means: argmax_j -||x - mu_j||^2 / 2 (seed document 004, section 6).

    Args:
        normalized: compare as discriminators do, by each expert's part of the training set; shares then do not count.
        same_noise: all experts draw their sample of a row from the same noise. Where they share an encoder they then
            have the same z, and the spread of its draws, often larger than what experts differ by, decides nothing.

    Examples:
        >>> import torch
        >>> from mixdist.competition import Elbo
        >>> from mixdist.experts import Centroid
        >>> from mixdist.noise import Moment
        >>> from mixdist.terms import Field
        >>> centre = Centroid({"x": Field((2,), torch.float32)})
        >>> rows = {"id": torch.arange(2), "x": torch.stack([centre.mean[0], centre.mean[0] + 1]).detach()}
        >>> near, far = Elbo().column(0, centre, None, rows, Moment(0), torch.float32).tolist()
        >>> round(near - far, 4)
        1.0
    """

    def __init__(self, normalized: bool = False, same_noise: bool = False) -> None:
        self.normalized, self.same_noise, self.by_shares = normalized, same_noise, not normalized

    def describe(self) -> dict[str, Any]:
        return {"same_noise": True} if self.same_noise else {}

    def column(
        self, e: int, expert: Expert, discriminator: Discriminator | None, rows: Batch, at: Moment, dtype: torch.dtype
    ) -> Tensor:
        eps = None
        if expert.noise_shape is not None:
            number = 0 if self.same_noise else e
            eps = at.draw(Purpose.POSTERIOR).normal(rows["id"], [number], expert.noise_shape, dtype)[0]
        terms = expert(rows, eps)
        if terms.log_px_R is None:
            return -terms.loss_R
        return terms.log_px_R if terms.kl_R is None else terms.log_px_R - terms.kl_R


class Likelihood(Score):
    """log p_j(x), importance-sampled: with shares, which count by default, the table of highest likelihood.

    log alpha_j + log p_j(x) decides: hard EM, the C-step of classification EM (Celeux and Govaert 1992). With the
    competition's ``by_shares: false`` it is log p_j(x), the case of equal proportions.

    Args:
        num_samples: S for each sample and expert.
        normalized: compare as discriminators do, by each expert's part of the training set; shares then do not count.

    Raises:
        ValueError: no sample at all.

    Examples:
        >>> from mixdist.competition import Competition, Likelihood
        >>> from mixdist.experts import VAE
        >>> Competition(VAE, num_experts=3, score=Likelihood(num_samples=50)).rules.score.num_samples
        50
    """

    def __init__(self, num_samples: int = 20, normalized: bool = False) -> None:
        if num_samples < 1:
            raise ValueError(f"Likelihood's num_samples ({num_samples}) must be at least 1: give 20 or more")
        self.num_samples, self.normalized, self.by_shares = num_samples, normalized, not normalized

    def check(self, spec: Spec, num_experts: int, template: Expert) -> None:
        if template.latent_shape is None or not template.can("log_weights"):
            kind = type(template).__name__
            raise ValueError(f"the score Likelihood needs importance weights, which {kind} has not: take Elbo")

    def column(
        self, e: int, expert: Expert, discriminator: Discriminator | None, rows: Batch, at: Moment, dtype: torch.dtype
    ) -> Tensor:
        return importance(expert, rows, e, at, self.num_samples, dtype, expert.latent_shape).log_px.to(dtype)


class LabelOracle(Score):
    """0 for the expert of a row's class, -inf for the others: class c goes to expert c.

    Args:
        field: the label.

    Examples:
        >>> import torch
        >>> from mixdist.competition import LabelOracle
        >>> from mixdist.noise import Moment
        >>> rows = {"id": torch.arange(3), "y": torch.tensor([0, 1, 0])}
        >>> LabelOracle().column(0, None, None, rows, Moment(0), torch.float32)
        tensor([0., -inf, 0.])
    """

    def __init__(self, field: str = "y") -> None:
        self.field, self.fields = field, (field,)

    def check(self, spec: Spec, num_experts: int, template: Expert) -> None:
        label_classes(spec, self.field, "the score LabelOracle", num_experts)

    def column(
        self, e: int, expert: Expert, discriminator: Discriminator | None, rows: Batch, at: Moment, dtype: torch.dtype
    ) -> Tensor:
        zero = torch.zeros(len(rows["id"]), dtype=dtype, device=rows["id"].device)
        return zero.masked_fill(rows[self.field] != e, -math.inf)


class Random(Score):
    """log u with u uniform on (0, 1), drawn anew each round: experts that learn from no competition.

    Examples:
        >>> import torch
        >>> from mixdist.competition import Random
        >>> from mixdist.noise import Moment
        >>> scores = Random().column(0, None, None, {"id": torch.arange(3)}, Moment(0), torch.float32)
        >>> scores.shape, bool((scores < 0).all())
        (torch.Size([3]), True)
    """

    def column(
        self, e: int, expert: Expert, discriminator: Discriminator | None, rows: Batch, at: Moment, dtype: torch.dtype
    ) -> Tensor:
        return at.draw(Purpose.CHANCE).uniform(rows["id"], [e], (1,), dtype)[0, :, 0].log()


class Fixed(Elbo):
    """Samples stay in the split that they began in: a bag of experts, each on its own part of the data.

    Held-out rows, which have no place, go to the expert with the highest ELBO.

    Examples:
        >>> from mixdist.competition import Competition, Fixed
        >>> from mixdist.experts import VAE
        >>> bag = Competition(VAE, num_experts=3, start="split", score=Fixed())
    """

    keeps = True

    def __init__(self) -> None:
        super().__init__()
