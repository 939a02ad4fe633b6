"""One expert in a competition, with all that is its own: optimiser, step counts, discriminator.

Shape letters: R rows of a batch on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from mixdist.competition.discriminators import Discriminator, discriminator_loss
from mixdist.competition.mixture import HardMixture
from mixdist.data.loader import share
from mixdist.engines import Solo
from mixdist.engines.solo import SoloFactory
from mixdist.experts import Expert, ExpertBank, Noise
from mixdist.mixtures.schedules import anneal
from mixdist.noise import DISCRIMINATOR_PHASE, RESTART_PHASE, Moment, Purpose
from mixdist.stats import Step
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
        round: whose initial weights a new one gets; 0 before the first, else its draws are those of a restart.
        make: makes its engine and its discriminator's.
    """

    def __init__(
        self,
        number: int,
        mixture: HardMixture,
        phase: Phase,
        expert: Expert | None = None,
        round: int = 0,
        make: SoloFactory = Solo,
    ) -> None:
        self.number, self.round, self.mixture, self.context = number, round, mixture, mixture.context
        self.make = make
        self.expert = expert or mixture.make_expert(number, round)
        self.bank = ExpertBank({number: self.expert}, "loop", mixture.compute)
        self.discriminator: Discriminator | None = None
        self.discriminator_engine: Solo | None = None
        self.rows = 0  # trained on since the last record
        self.loss: float | None = None
        self.loss_rows = 0  # that ``loss`` is a mean over
        self.discriminator_losses: list[float] = []  # of the round's batches
        self._total, self._num_rows = 0.0, 0  # of the epoch so far
        self.enter(phase)

    def enter(self, phase: Phase) -> None:
        """Begin a phase: a new optimiser, steps from 0."""
        self._epochs_of_round = phase.epochs
        group, wire = self.context.mesh.replica_group, self.context.wire
        name, told = f"expert {self.number}", (phase.stepping, phase.schedule, phase.clip_norm)
        self.engine = self.make(name, self.expert, group, wire, *told, turn=self.number)

    def train(self, rows: Batch, batches: Iterable[tuple[Tensor, int]], phase: int, epoch_rows: int) -> None:
        """Train on batches of an epoch, which goes on until ``end_epoch``.

        Args:
            rows: stored rows.
            batches: for each batch the places in ``rows`` of this replica's part, and the size of the whole.
            phase: number of the phase, for the draws.
            epoch_rows: rows of the expert in the whole epoch, over all replicas.

        Raises:
            NotFinite: a loss or a gradient is not finite.
        """
        fields, batches = self.expert.fields, list(batches)
        noises = self._noise(rows["id"], [places_R for places_R, _ in batches], phase)
        for (places_R, size), noise in zip(batches, noises, strict=True):
            # index_select takes a tenth of the time of indexing for rows of bytes.
            stored = {name: rows[name].index_select(0, places_R) for name in ("id", *fields)}
            values = self.context.values(stored, fields)
            anneal("mixture.expert", self.expert, self.step(epoch_rows))
            self.engine.zero_grad()
            grads = partial(torch.full, (len(places_R), 1), 1 / size, dtype=self.context.dtype, device=places_R.device)
            losses_R1 = self.bank.backward(values, noise, None, grads)
            self._total += self.engine.step(losses_R1.sum() / size) * size
            self._num_rows += size

    def step(self, epoch_rows: int) -> Step:
        """Return the expert's next step in the phase, with its passes since it began.

        Args:
            epoch_rows: rows of the expert in the whole epoch.
        """
        before = max(self.round - 1, 0) * self._epochs_of_round  # of the expert in whose place it began
        return Step(self.engine.steps, self.engine.epochs - before + Fraction(self._num_rows, epoch_rows))

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
        # Its steps began again at 0: in the same phase they would repeat the draws of the expert before it.
        at = Moment(self.context.seed, RESTART_PHASE + self.round if self.round else phase)
        draw = at.draw(Purpose.POSTERIOR)
        together = max(1, NUMBERS_AT_ONCE // math.prod(shape) // max([1, *map(len, batches)]))
        for first in range(0, len(batches), together):
            some = batches[first : first + together]
            steps = [torch.full_like(places, step + first + i) for i, places in enumerate(some)]
            ids_R = ids_N[torch.cat(list(some))]
            eps = draw.normal(ids_R, [self.number], shape, self.context.dtype, torch.cat(steps))
            for part in eps.split([len(places) for places in some], dim=1):
                yield partial(_given, part.clone())  # memory of its own, aligned as any other

    def meet(self, round: int) -> None:
        """Get a discriminator for a round: a new one, or the one of the round before."""
        discriminating = self.mixture.discriminating
        assert discriminating is not None
        self.discriminator_losses = []
        if self.discriminator is None or discriminating.fresh:
            self.discriminator = self.mixture.make_discriminator(self.number, round if discriminating.fresh else 0)
            group, wire = self.context.mesh.replica_group, self.context.wire
            name, optimizer = f"discriminator {self.number}", discriminating.optimizer
            self.discriminator_engine = self.make(
                name, self.discriminator, group, wire, optimizer, turn=self.number + 1
            )

    def challenge(self, rows: Batch, batches: Iterable[tuple[Tensor, int]], round: int) -> None:
        """Train the discriminator on batches of a round, each against as many of the expert's samples.

        Arguments and errors as for ``train``; ``round`` is part of the samples' key, as is the batch's number.
        """
        discriminator, engine = self.discriminator, self.discriminator_engine
        assert discriminator is not None
        assert engine is not None
        for places_R, size in batches:
            own = share(size, self.context.mesh.replica, self.context.mesh.placement.num_replicas)
            ids = torch.arange(own.start, own.stop, device=places_R.device)
            name = discriminator.fields[0]
            x = self.context.spec[name].values(rows[name][places_R], self.context.dtype)
            samples = self.samples(ids, round, engine.steps)
            engine.zero_grad()
            # One call for both: a small network's time goes by its calls, and a row's logit depends on no other row.
            real_R, false_R = discriminator_loss(*discriminator(torch.cat([x, samples])).split([len(x), len(samples)]))
            loss = (real_R.sum() + false_R.sum()) / size
            loss.backward()
            self.discriminator_losses.append(engine.step(loss))

    @property
    def discriminator_loss_mean(self) -> float | None:
        """The discriminator's mean loss over the round's batches, nats; None before the first."""
        return sum(self.discriminator_losses) / len(self.discriminator_losses) if self.discriminator_losses else None

    @torch.no_grad()
    def samples(self, ids: Tensor, round: int, step: int) -> Tensor:
        """Draw from the expert, for its discriminator: with the noise of p(x|z), or its means."""
        context, expert, discriminating = self.context, self.expert, self.mixture.discriminating
        assert discriminating is not None
        assert expert.latent_shape is not None
        at = Moment(context.seed, DISCRIMINATOR_PHASE + round, step)
        eps = at.draw(Purpose.RIVAL).normal(ids, [self.number], expert.latent_shape, context.dtype)[0]
        if not discriminating.observe:
            return expert.sample(eps)
        assert self.discriminator is not None
        shape = context.spec[self.discriminator.fields[0]].shape
        return expert.draw(eps, at.draw(Purpose.OBSERVATION).uniform(ids, [self.number], shape, context.dtype)[0])

    def tensors(self) -> dict[str, Tensor]:
        """Return all that goes with it to another rank; of states that have owners, those that are here.

        Each replica moves by itself: where it goes, it has the same states, of the same replica.
        """
        found: dict[str, Tensor] = {"steps": torch.tensor(self.steps)}
        for kind, engine in self.engines.items():
            found |= {f"{kind}/model/{name}": tensor for name, tensor in engine.module.state_dict().items()}
            found |= {f"{kind}/optimizer/{name}": tensor for name, tensor in engine.state().items()}
        return {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in found.items()}

    def take(self, found: dict[str, Tensor], round: int) -> None:
        """Put back what ``tensors`` returned on another rank."""
        if any(name.startswith("discriminator/") for name in found):
            self.meet(round)
        for kind, engine in self.engines.items():
            engine.module.load_state_dict(under(f"{kind}/model/", found), strict=True)
            engine.load_state(under(f"{kind}/optimizer/", found))
        self.go_to(found["steps"].tolist())

    @property
    def engines(self) -> dict[str, Solo]:
        """The engines of its modules, by the kind of module."""
        discriminating = self.discriminator_engine
        return {"expert": self.engine} | ({} if discriminating is None else {"discriminator": discriminating})

    def owned(self) -> list[Owned]:
        """Return its modules as checkpoints have them."""
        return [Owned(f"{kind} {self.number}", one.module, self.number) for kind, one in self.engines.items()]

    @property
    def steps(self) -> list[int]:
        """Steps and epochs done of the expert in its phase, steps of its discriminator, and the round it began in."""
        discriminating = self.discriminator_engine
        return [self.engine.steps, self.engine.epochs, discriminating.steps if discriminating else 0, self.round]

    def go_to(self, steps: list[int]) -> None:
        """Set what ``steps`` returned."""
        self.engine.go_to(*steps[:2])
        self.round = steps[3]
        if self.discriminator_engine is not None:
            self.discriminator_engine.go_to(steps[2])


def _given(eps_1R: Tensor, ids: Tensor, experts: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Return noise that was drawn before, of one expert and all its rows."""
    return eps_1R


def under(prefix: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
