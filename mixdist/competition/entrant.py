"""One expert in a competition, with all that is its own: optimiser, step counts, discriminator.

Shape letters: R rows of a batch on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from mixdist.competition.discriminators import Discriminator, discriminator_loss
from mixdist.competition.mixture import HardMixture
from mixdist.data.loader import share
from mixdist.engines import Solo
from mixdist.experts import Expert, ExpertBank, Noise
from mixdist.noise import Draw, Moment, Purpose
from mixdist.terms import Batch, Owned
from mixdist.training.phases import Phase

NUMBERS_AT_ONCE = 1 << 15
"""Of noise, drawn ahead for one expert: a quarter of a MB at most, and some MB while they are drawn."""


class Entrant:
    """An expert that trains by itself; no collective but the reduction over its replicas.

    Args:
        number: of the expert.
        mixture: makes experts and discriminators, and says how they run.
        phase: how it trains.
        expert: made before; None for a new one.
        round: whose initial weights a new one gets.
    """

    def __init__(
        self, number: int, mixture: HardMixture, phase: Phase, expert: Expert | None = None, round: int = 0
    ) -> None:
        self.number, self.mixture, self.context = number, mixture, mixture.context
        self.expert = expert or mixture.make_expert(number, round)
        self.bank = ExpertBank({number: self.expert}, "loop", mixture.compute)
        self.discriminator: Discriminator | None = None
        self.discriminator_engine: Solo | None = None
        self.rows = 0  # trained on, since somebody asked
        self.loss: float | None = None
        self.loss_rows = 0  # that ``loss`` is a mean over
        self.discriminator_losses: list[float] = []  # of the round's batches
        self._total, self._num_rows = 0.0, 0  # of the epoch so far
        self.enter(phase)

    def enter(self, phase: Phase) -> None:
        """Begin a phase: a new optimiser, steps from 0."""
        group, wire = self.context.mesh.replica_group, self.context.wire
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
            values = self.context.values(stored, fields)
            self.expert.anneal(self.engine.steps)
            self.engine.zero_grad()
            grads = partial(torch.full, (len(places_R), 1), 1 / size, dtype=self.context.dtype, device=places_R.device)
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
        draw = Moment(self.context.seed, phase).draw(Purpose.POSTERIOR)
        together = max(1, NUMBERS_AT_ONCE // math.prod(shape) // max([1, *map(len, batches)]))
        for first in range(0, len(batches), together):
            some = batches[first : first + together]
            sizes = torch.tensor([len(places) for places in some], device=ids_N.device)
            steps = torch.arange(step + first, step + first + len(some), device=ids_N.device)
            steps_R, ids_R = steps.repeat_interleave(sizes), ids_N[torch.cat(list(some))]
            eps = draw.normal(ids_R, [self.number], shape, self.context.dtype, steps_R)
            for part in eps.split([len(places) for places in some], dim=1):
                yield Drawn(part.clone())  # memory of its own, aligned as any other

    def meet(self, round: int) -> None:
        """Get a discriminator for a round: a new one, or the one of the round before."""
        mixture, context = self.mixture, self.context
        discriminating = mixture.discriminating
        assert discriminating is not None
        self.discriminator_losses = []
        if self.discriminator is None or discriminating.fresh:
            self.discriminator = mixture.make_discriminator(self.number, round if discriminating.fresh else 0)
            self.discriminator_engine = Solo(
                f"discriminator {self.number}",
                self.discriminator,
                context.mesh.replica_group,
                context.wire,
                discriminating.optimizer,
            )

    def challenge(self, rows: Batch, batches: Iterable[tuple[Tensor, int]], round: int) -> None:
        """Train the discriminator on batches of a round, each against as many of the expert's samples.

        Arguments and errors as for ``train``; ``round`` is part of the samples' key, as is the batch's number.
        """
        discriminator, engine = self.discriminator, self.discriminator_engine
        assert discriminator is not None
        assert engine is not None
        for places_R, size in batches:
            ids = torch.arange(size, device=places_R.device)[self._mine(size)]
            name = discriminator.fields[0]
            x = self.context.spec[name].values(rows[name][places_R], self.context.dtype)
            samples = self.samples(ids, round, engine.steps)
            engine.zero_grad()
            # One call for both: a small network's time goes by its calls, and a row's logit depends on no other row.
            real_R, false_R = discriminator_loss(*discriminator(torch.cat([x, samples])).split([len(x), len(samples)]))
            loss = (real_R.sum() + false_R.sum()) / size
            loss.backward()
            self.discriminator_losses.append(engine.step(loss))

    def _mine(self, size: int) -> slice:
        """Return this replica's part of a batch of ``size``."""
        mesh = self.context.mesh
        part = share(size, mesh.replica, mesh.placement.num_replicas)
        return slice(part.start, part.stop)

    @property
    def discriminator_loss_mean(self) -> float | None:
        """The discriminator's mean loss over the round's batches, nats; None before the first."""
        return sum(self.discriminator_losses) / len(self.discriminator_losses) if self.discriminator_losses else None

    @torch.no_grad()
    def samples(self, ids: Tensor, round: int, step: int) -> Tensor:
        """Draw from the expert, for its discriminator: with the noise of p(x|z), or its means."""
        context, expert, discriminating = self.context, self.expert, self.mixture.discriminating
        assert discriminating is not None
        assert expert.noise_shape is not None
        draw = Draw(context.seed, Purpose.RIVAL, round, step)
        eps = draw.normal(ids, [self.number], expert.noise_shape, context.dtype)[0]
        if not discriminating.observe:
            return expert.sample(eps)
        assert self.discriminator is not None
        shape = context.spec[self.discriminator.fields[0]].shape
        seen = Draw(context.seed, Purpose.OBSERVATION, round, step)
        return expert.draw(eps, seen.uniform(ids, [self.number], shape, context.dtype)[0])

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
        if self.discriminator is not None:
            modules.append(Owned(f"discriminator {self.number}", self.discriminator, self.number))
        return modules

    def engine_of(self, owned: Owned) -> Solo:
        """The engine of one of its modules."""
        engine = self.engine if owned.module is self.expert else self.discriminator_engine
        assert engine is not None
        return engine

    @property
    def steps(self) -> list[int]:
        """Steps and epochs done of the expert in its phase, and steps of its discriminator."""
        return [
            self.engine.steps,
            self.engine.epochs,
            self.discriminator_engine.steps if self.discriminator_engine else 0,
        ]

    def go_to(self, steps: list[int]) -> None:
        """Set how many steps were done before."""
        self.engine.go_to(*steps[:2])
        if self.discriminator_engine is not None:
            self.discriminator_engine.go_to(steps[2])


class Drawn:
    """Noise of a batch that was drawn before, handed out in order where a micro-batch asks for its own.

    Args:
        eps_1R: of one expert and all rows.
    """

    def __init__(self, eps_1R: Tensor) -> None:
        self.eps_1R, self.given = eps_1R, 0

    def __call__(self, ids: Tensor, experts: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        first, self.given = self.given, self.given + len(ids)
        return self.eps_1R[:, first : self.given]


def _under(prefix: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
