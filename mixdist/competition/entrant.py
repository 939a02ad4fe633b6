"""One expert in a competition, with all that is its own: optimiser, step counts, discriminator.

Shape letters: R rows of a batch on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from mixdist.competition.discriminators import Discriminator, discriminator_loss
from mixdist.competition.scores import Discriminators
from mixdist.data.loader import share
from mixdist.engines import Solo
from mixdist.experts import Compute, Expert, ExpertBank, Noise
from mixdist.noise import Draw, Moment, Purpose
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Wire
from mixdist.terms import Batch, Owned, Spec
from mixdist.training.phases import Phase

MakeExpert = Callable[[int, int], Expert]
"""Makes an expert by its number, with the initial weights of a round, on its device."""

NUMBERS_AT_ONCE = 1 << 15
"""Of noise, drawn ahead for one expert: a quarter of a MB at most, and some MB while they are drawn."""


@dataclass(frozen=True)
class EntrantContext:
    """What all entrants on a rank share.

    Args:
        seed: of the run.
        spec: the fields of stored rows.
        dtype: of real numbers.
        mesh: this rank's place; replicas of an expert share its batches.
        wire: the counted collectives.
        compute: how an expert runs its rows.
        make_expert: makes experts.
        make_judge: makes discriminators; None where the score needs none.
        judging: how discriminators train; None where the score needs none.
    """

    seed: int
    spec: Spec
    dtype: torch.dtype
    mesh: Mesh
    wire: Wire
    compute: Compute
    make_expert: MakeExpert
    make_judge: Callable[[int, int], Discriminator] | None = None
    judging: Discriminators | None = None

    def values(self, rows: Batch, fields: Iterable[str]) -> Batch:
        """Turn the named stored fields into numbers; the id stays."""
        return {"id": rows["id"], **{name: self.spec[name].values(rows[name], self.dtype) for name in fields}}

    def mine(self, size: int) -> slice:
        """This replica's part of a batch of ``size``."""
        part = share(size, self.mesh.replica, self.mesh.placement.num_replicas)
        return slice(part.start, part.stop)


class Entrant:
    """An expert that trains by itself; no collective but the reduction over its replicas.

    Args:
        number: of the expert.
        ring: what entrants share.
        phase: how it trains.
        expert: made before; None for a new one.
        round: whose initial weights a new one gets.
    """

    def __init__(
        self, number: int, ring: EntrantContext, phase: Phase, expert: Expert | None = None, round: int = 0
    ) -> None:
        self.number, self.ring = number, ring
        self.expert = expert or ring.make_expert(number, round)
        self.bank = ExpertBank({number: self.expert}, "loop", ring.compute)
        self.judge: Discriminator | None = None
        self.judge_engine: Solo | None = None
        self.rows = 0  # trained on, since somebody asked
        self.loss: float | None = None
        self.loss_rows = 0  # that ``loss`` is a mean over
        self.judge_losses: list[float] = []  # of the round's batches
        self._total, self._num_rows = 0.0, 0  # of the epoch so far
        self.enter(phase)

    def enter(self, phase: Phase) -> None:
        """Begin a phase: a new optimiser, steps from 0."""
        group, wire = self.ring.mesh.replica_group, self.ring.wire
        self.engine = Solo(
            f"expert {self.number}", self.expert, group, wire, phase.optimizer, phase.schedule, phase.clip_norm
        )

    def train(self, rows: Batch, batches: Iterable[tuple[Tensor, int]], phase: int) -> None:
        """Train on batches of an epoch, which goes on until ``end_epoch``.

        Args:
            rows: stored rows.
            batches: for each batch the places in ``rows`` of this replica's part, and the size of the whole.
            phase: number of the phase, for the draws.

        Raises:
            NotFinite: a loss or a gradient is not finite.
        """
        fields, batches = self.expert.fields, list(batches)
        noises = self._noise(rows["id"], [places_R for places_R, _ in batches], phase)
        for (places_R, size), noise in zip(batches, noises, strict=True):
            # index_select takes a tenth of the time of indexing for rows of bytes.
            stored = {name: rows[name].index_select(0, places_R) for name in ("id", *fields)}
            values = self.ring.values(stored, fields)
            self.expert.anneal(self.engine.steps)
            self.engine.zero_grad()
            grads = partial(torch.full, (len(places_R), 1), 1 / size, dtype=self.ring.dtype, device=places_R.device)
            losses_R1 = self.bank.backward(values, noise, None, grads)
            self._total += self.engine.step(losses_R1.sum() / size) * size
            self._num_rows += size

    def end_epoch(self) -> None:
        """End an epoch; ``loss`` is then the mean over its rows, nats."""
        self.engine.end_epoch()
        total, num_rows = self._total, self._num_rows
        self._total, self._num_rows = 0.0, 0
        self.rows += num_rows
        self.loss, self.loss_rows = (total / num_rows if num_rows else None), num_rows

    def _noise(self, ids_N: Tensor, batches: Sequence[Tensor], phase: int) -> Iterator[Noise | None]:
        """Return each batch's noise; that of several batches is drawn at once, which changes none of its numbers.

        A draw of a few rows costs nearly as much as one of a thousand: 0.13 ms, a twentieth of a small expert's step.

        Args:
            ids_N: of the stored rows.
            batches: for each batch its places there; the first is the engine's next step.
            phase: number of the phase.
        """
        shape, step = self.expert.noise_shape, self.engine.steps
        if shape is None:
            yield from repeat(None, len(batches))
            return
        draw = Moment(self.ring.seed, phase).draw(Purpose.POSTERIOR)
        together = max(1, NUMBERS_AT_ONCE // math.prod(shape) // max([1, *map(len, batches)]))
        for first in range(0, len(batches), together):
            some = batches[first : first + together]
            sizes = torch.tensor([len(places) for places in some], device=ids_N.device)
            steps = torch.arange(step + first, step + first + len(some), device=ids_N.device)
            steps_R, ids_R = steps.repeat_interleave(sizes), ids_N[torch.cat(list(some))]
            eps = draw.normal(ids_R, [self.number], shape, self.ring.dtype, steps_R)
            for part in eps.split([len(places) for places in some], dim=1):
                yield Drawn(part.clone())  # memory of its own, aligned as any other

    def meet(self, round: int) -> None:
        """Get a discriminator for a round: a new one, or the one of the round before."""
        ring, judging = self.ring, self.ring.judging
        assert judging is not None
        assert ring.make_judge is not None
        self.judge_losses = []
        if self.judge is None or judging.fresh:
            self.judge = ring.make_judge(self.number, round if judging.fresh else 0)
            self.judge_engine = Solo(
                f"discriminator {self.number}", self.judge, ring.mesh.replica_group, ring.wire, judging.optimizer
            )

    def challenge(self, rows: Batch, batches: Iterable[tuple[Tensor, int]], round: int) -> None:
        """Train the discriminator on batches of a round, each against as many of the expert's samples.

        Arguments and errors as for ``train``; ``round`` is part of the samples' key, as is the batch's number.
        """
        judge, engine = self.judge, self.judge_engine
        assert judge is not None
        assert engine is not None
        for places_R, size in batches:
            ids = torch.arange(size, device=places_R.device)[self.ring.mine(size)]
            name = judge.fields[0]
            x = self.ring.spec[name].values(rows[name][places_R], self.ring.dtype)
            samples = self.samples(ids, round, engine.steps)
            engine.zero_grad()
            # One call for both: a small network's time goes by its calls, and a row's logit depends on no other row.
            real_R, false_R = discriminator_loss(*judge(torch.cat([x, samples])).split([len(x), len(samples)]))
            loss = (real_R.sum() + false_R.sum()) / size
            loss.backward()
            self.judge_losses.append(engine.step(loss))

    @property
    def judge_loss(self) -> float | None:
        """The discriminator's mean loss over the round's batches, nats; None before the first."""
        return sum(self.judge_losses) / len(self.judge_losses) if self.judge_losses else None

    @torch.no_grad()
    def samples(self, ids: Tensor, round: int, step: int) -> Tensor:
        """Draw from the expert, for its discriminator: with the noise of p(x|z), or its means."""
        ring, expert, judging = self.ring, self.expert, self.ring.judging
        assert judging is not None
        assert expert.noise_shape is not None
        eps = Draw(ring.seed, Purpose.RIVAL, round, step).normal(ids, [self.number], expert.noise_shape, ring.dtype)[0]
        if not judging.observe:
            return expert.sample(eps)
        assert self.judge is not None
        shape = ring.spec[self.judge.fields[0]].shape
        seen = Draw(ring.seed, Purpose.OBSERVATION, round, step)
        return expert.draw(eps, seen.uniform(ids, [self.number], shape, ring.dtype)[0])

    def tensors(self) -> dict[str, Tensor]:
        """Return all that goes with it to another rank."""
        found: dict[str, Tensor] = {"steps": torch.tensor(self.steps)}
        for owned in self.owned():
            kind = owned.name.split()[0]
            found |= {f"{kind}/model/{name}": tensor for name, tensor in owned.module.state_dict().items()}
            found |= {f"{kind}/optimizer/{name}": tensor for name, tensor in self.engine_of(owned).state().items()}
        return {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in found.items()}

    def take(self, found: dict[str, Tensor], round: int) -> None:
        """Put back what ``tensors`` gave on another rank."""
        if any(name.startswith("discriminator/") for name in found):
            self.meet(round)
        for owned in self.owned():
            kind = owned.name.split()[0]
            model, optimizer = (_under(f"{kind}/{part}/", found) for part in ("model", "optimizer"))
            owned.module.load_state_dict(model, strict=True)
            self.engine_of(owned).load_state(optimizer)
        self.go_to(found["steps"].tolist())

    @property
    def num_bytes(self) -> int:
        """What moving it to another rank takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def owned(self) -> list[Owned]:
        """Its modules as checkpoints have them."""
        modules = [Owned(f"expert {self.number}", self.expert, self.number)]
        if self.judge is not None:
            modules.append(Owned(f"discriminator {self.number}", self.judge, self.number))
        return modules

    def engine_of(self, owned: Owned) -> Solo:
        """The engine of one of its modules."""
        engine = self.engine if owned.module is self.expert else self.judge_engine
        assert engine is not None
        return engine

    @property
    def steps(self) -> list[int]:
        """Steps and epochs done of the expert in its phase, and steps of its discriminator."""
        return [self.engine.steps, self.engine.epochs, self.judge_engine.steps if self.judge_engine else 0]

    def go_to(self, steps: list[int]) -> None:
        """Set how many steps were done before."""
        self.engine.go_to(*steps[:2])
        if self.judge_engine is not None:
            self.judge_engine.go_to(steps[2])


class Drawn:
    """Noise of a batch that was drawn before, handed out in order where a micro-batch asks for its own.

    Args:
        eps_1R: of one expert and all rows.
    """

    def __init__(self, eps_1R: Tensor) -> None:
        self.eps_1R, self.given = eps_1R, 0

    def __call__(self, ids: Tensor, experts: Sequence[int]) -> Tensor:
        first, self.given = self.given, self.given + len(ids)
        return self.eps_1R[:, first : self.given]


def _under(prefix: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
