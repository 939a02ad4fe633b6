"""What experts, a score and discriminators must be, checked on a few samples before experts compete.

Shape letters: n rows of the check.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mixdist.competition.discriminators import Discriminator
from mixdist.data import RankBatch, Samples, share
from mixdist.data.contracts import check_rows
from mixdist.experts import Expert
from mixdist.mixtures import Stage
from mixdist.mixtures.covered import is_packaged
from mixdist.mixtures.inspection import check_same, first_rows
from mixdist.mixtures.learning import check_learns, check_none_learn
from mixdist.mixtures.members import inspect_experts
from mixdist.mixtures.mixture import Outputs
from mixdist.mixtures.probe import Columns, Fault, Probe, check_column
from mixdist.mixtures.schedules import anneal
from mixdist.noise import Moment
from mixdist.parallel.agreement import agreed
from mixdist.terms import Batch

if TYPE_CHECKING:
    from mixdist.competition.entrant import Entrant
    from mixdist.competition.mixture import HardMixture

WRONG_WAY = -0.98
"""A correlation with minus the loss that a score below it has by a wrong sign alone."""


def inspect_entrants(
    mixture: HardMixture, entrants: Mapping[int, Entrant], dataset: Samples, stage: Stage, at: Moment
) -> None:
    """Check rows, experts, score and discriminators on the first samples that each rank can reach; every rank calls it.

    Args:
        mixture: what competes.
        entrants: this rank's experts, wherever they have been moved to.
        dataset: the samples.
        stage: how experts train.
        at: names the draws.

    Raises:
        Agreed: something breaks its contract; the same message on every rank.
    """
    mesh = mixture.context.mesh
    held = [share(len(dataset), rank, mesh.world_size) for rank in range(mesh.world_size)]
    taken = [torch.arange(one.start, min(one.stop, one.start + stage.batch_size)) for one in held]
    index = taken[mesh.rank]
    own = {name: column.to(mesh.device) for name, column in dataset.take(index).items()}
    agreed(lambda: check_rows(own, dataset.spec, dataset.ids[index]), mesh.world)
    batch = RankBatch(own, tuple(map(len, taken)))
    rows = first_rows(mixture, batch)
    experts = {e: entrant.expert for e, entrant in entrants.items()}
    discriminators = {e: entrant.discriminator for e, entrant in entrants.items()}

    def check() -> Outputs:
        for e, entrant in entrants.items():
            anneal(mixture.key_of(e), entrant.expert, entrant.step(1))
        return inspect_competitors(mixture, experts, discriminators, rows, batch, at, stage)

    check_same(agreed(check, mesh.world), mesh.world)


def inspect_competitors(
    mixture: HardMixture,
    experts: Mapping[int, Expert],
    discriminators: Mapping[int, Discriminator | None],
    rows: Batch,
    batch: RankBatch,
    at: Moment,
    stage: Stage | None,
) -> Outputs:
    """Check experts, the score, and discriminators, which may not have been made yet.

    Other arguments, and what it returns, are those of :meth:`mixdist.mixtures.Mixture.inspect`.

    Raises:
        Fault: something breaks its contract.
    """
    check_none_learn("mixture.score", mixture.score_rule, "an expert")
    losses, outputs = inspect_experts(mixture, experts, rows, batch.rows, at, stage)
    values = mixture.values(rows, mixture.fields)
    for e, expert in list(experts.items())[: 1 if mixture.alike else None]:
        discriminator = None
        if mixture.discriminating is not None:
            discriminator = discriminators.get(e) or mixture.make_discriminator(e)
            _check_discriminator(discriminator, values, mixture.dtype)
        column = _check_score(mixture, e, expert, discriminator, values, at)
        if e == next(iter(experts)):
            _check_way(mixture, column, losses)
        outputs[f"{_who(mixture)} (scores of expert {e})"] = column
    return outputs


def _check_score(
    mixture: HardMixture, e: int, expert: Expert, discriminator: Discriminator | None, values: Batch, at: Moment
) -> Tensor:
    score, remedy = mixture.score_rule, "return one number a row, in nats, higher for a better fit"

    def call(*given: Any) -> Any:
        one, other, rows = given if discriminator is not None else (given[0], None, given[1])
        real = next((column.dtype for column in rows.values() if column.is_floating_point()), mixture.dtype)
        return score.column(e, one, other, rows, at, real)

    def read(column: Any, num_rows: int) -> Columns:
        return {"scores": check_column("scores", column, (num_rows,), remedy)}

    modules: tuple[nn.Module, ...] = (expert,) if discriminator is None else (expert, discriminator)
    with torch.no_grad():
        column: Tensor = Probe(_who(mixture), call, modules, read, mixture.dtype)(values)
    return column


def _who(mixture: HardMixture) -> str:
    return f"mixture.score: {type(mixture.score_rule).__name__}.column"


def _check_way(mixture: HardMixture, column: Tensor, losses: Tensor) -> None:
    """Check that a score of one's own is not higher where the expert's loss is."""
    known = column.isfinite() & losses.isfinite()
    pair = torch.stack([column[known], -losses[known]]).double()
    if is_packaged(mixture.score_rule) or pair.shape[1] < 4 or not bool(pair.std(1).all()):
        return
    if float(torch.corrcoef(pair)[0, 1]) < WRONG_WAY:
        raise Fault(
            f"{_who(mixture)} returns scores that are higher where the expert's loss is higher, and a sample goes to "
            f"the expert with the highest: return minus them"
        )


def _check_discriminator(discriminator: Discriminator, values: Batch, dtype: torch.dtype) -> None:
    who, x = f"mixture.score: {type(discriminator).__name__}.forward", values[discriminator.fields[0]]

    def read(logits: Any, num_rows: int) -> Columns:
        return {"logits": check_column("logits", logits, (num_rows,), "its network must have one output for each row")}

    logits = Probe(who, lambda one, some: one(some), (discriminator,), read, dtype)(x)
    check_learns("mixture.score", who, "logits", discriminator, [logits], "experts")
