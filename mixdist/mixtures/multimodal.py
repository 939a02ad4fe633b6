"""Several modalities of a row, each with an expert of its own, and a latent that they share.

Shape letters: B rows on this rank, R rows routed here, M modalities (experts), e those of this rank, K proposals of a
row's latent, N those that an expert scores, S samples, L shared latent, P private latent.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from mixdist.data import RankBatch, Samples
from mixdist.experts import Modality
from mixdist.experts.location_scale import KINDS, PosteriorName, Prior
from mixdist.mixtures.bounds import Weights
from mixdist.mixtures.context import Context
from mixdist.mixtures.gateless import Gateless
from mixdist.mixtures.mixture import Stage
from mixdist.mixtures.multimodal_shown import MultimodalModel, multimodal_pictures
from mixdist.mixtures.multimodal_study import MultimodalStudy
from mixdist.mixtures.multimodal_views import captioned, latents_in_the_plane
from mixdist.mixtures.objectives import Objective
from mixdist.mixtures.pictures import Picture
from mixdist.mixtures.proposals import (
    PRESENT,
    PRESENT_FAULT,
    Here,
    Proposals,
    Seen,
    check_modality,
    check_own_fields,
    check_present,
    num_bad,
)
from mixdist.mixtures.study import Evaluation, Request, Study
from mixdist.noise import Moment, Purpose
from mixdist.parallel.agreement import agreed
from mixdist.terms import Outcome, Parts, Spec, constant

MakeModality = Callable[[Spec, int, PosteriorName], Modality]


class Multimodal(Gateless):
    """Base of mixtures with an expert for each modality: who proposes a row's latent, and what is minimised, is theirs.

    Args:
        expert: a :class:`mixdist.experts.Modality` for each modality, in a list.
        latent: L.
        posterior: of q(z|x_m) and p(z), laplace or normal.
        samples: S, of each proposal in training.
        rescale: multiplies log p(x_m|z) in training by the numbers of the largest modality over those of m.
        learn_prior: whether the scales of p(z) learn.

    Raises:
        ValueError: no expert, a number out of range.
    """

    shares_are = "parts of the rows that have the modality"
    probes = ("logistic",)
    judged = True
    pathwise = False
    detaches = False

    def __init__(
        self,
        expert: list[MakeModality],
        latent: int = 20,
        posterior: PosteriorName = "laplace",
        samples: int = 1,
        rescale: bool = True,
        learn_prior: bool = True,
    ) -> None:
        for name, value in (("latent", latent), ("samples", samples)):
            if value < 1:
                raise ValueError(f"mixture.{name} ({value}) must be at least 1: give a whole number from 1")
        if not isinstance(expert, Sequence) or not expert:
            raise ValueError(f"mixture.expert ({expert!r}) must be a list: give a Modality for each field")
        super().__init__([partial(_made, make, latent, posterior) for make in expert], execution="loop")
        self.latent, self.samples, self.rescale = latent, samples, rescale
        self.posterior, self.kind, self.learn_prior = posterior, KINDS[posterior], learn_prior

    def setup(self, context: Context) -> None:
        super().setup(context)
        field = context.spec.get(PRESENT)
        if field is not None and field.shape != (self.num_experts,):
            raise ValueError(
                f"mixture.expert lists {self.num_experts} modalities, but the field {PRESENT!r} has shape "
                f"{field.shape}: give one expert for each of its places"
            )
        for e, expert in self.bank.owned().items():
            check_modality(self.key_of(e), expert, self.latent, self.posterior)
        self.prior = context.make(lambda: Prior(self.posterior, self.latent, self.learn_prior), Purpose.DECODER)

    @property
    def modalities(self) -> dict[int, Modality]:
        """This rank's experts by number."""
        return cast(dict[int, Modality], self.bank.owned())

    @property
    def parts(self) -> Parts:
        return self.bank.parts({"prior": self.prior} if self.learn_prior else {})

    def check_data(self, splits: Mapping[str, Samples]) -> None:
        """Check the experts together, and where rows are in memory that each has a modality."""
        world = self.context.mesh.world
        told = self.facts  # ranks ask for it together
        agreed(lambda: check_own_fields(told, self.spec), world)
        for kind, rows in splits.items():
            agreed(partial(check_present, rows, f"{kind} "), world)

    def describe(self, stages: Sequence[Stage]) -> dict[str, Any]:
        told = {"modalities": ", ".join(self.names), "posterior": self.posterior}
        return super().describe(stages) | told

    @property
    def names(self) -> list[str]:
        """The field of each modality, M; every rank must ask for it together, the first time."""
        return [facts.fields[0] for facts in self.facts]

    @property
    def extra_fields(self) -> tuple[str, ...]:
        return (PRESENT,) if PRESENT in self.spec else ()

    def weights(self) -> list[float]:
        """Return what log p(x_m|z) is multiplied by: M numbers, 1 outside of training."""
        if not (self.rescale and next(iter(self.modalities.values())).training):
            return [1.0] * self.num_experts
        sizes = [self.spec[name].num_values for name in self.names]
        return [max(sizes) / size for size in sizes]

    # What proposes

    @abstractmethod
    def propose(self, seen: Seen, at: Moment, held_out: bool = False) -> Proposals:
        """Return the proposals for rows; every rank finds the same ones for a row.

        Args:
            seen: the rows.
            at: names the draws.
            held_out: for an evaluation: every expert scores every proposal, and nothing is random.
        """

    @property
    @abstractmethod
    def joint(self) -> list[int]:
        """The proposals of an evaluation whose mixture is q(z|x_1, ..., x_M)."""

    @property
    @abstractmethod
    def single(self) -> list[int]:
        """The proposal of an evaluation that is each modality's own, M."""

    @property
    @abstractmethod
    def loss_is(self) -> str:
        """What a row's loss is, with the options that make it another number."""

    @abstractmethod
    def losses(self, proposals: Proposals, z: Tensor, score_BMNS: Tensor, present_BM: Tensor) -> Tensor:
        """Return each row's loss, (B,) nats, of this rank's rows, z (B, K, S, L)."""

    # One step

    def see(self, batch: RankBatch) -> tuple[Seen, Here]:
        """Send rows, encode them, and show the parameters of the posteriors to all ranks."""
        route = self.send(batch)
        stored = route.rows()
        rows, own, private = self.values(stored, self.bank.fields), [], {}
        for e, expert in self.modalities.items():
            loc, scale = expert.encode(rows)
            own.append(torch.stack([loc[:, : self.latent], scale[:, : self.latent]], dim=1))
            private[e] = loc[:, self.latent :], scale[:, self.latent :]
        loc, scale = self.dispatch.exchange(torch.stack(own, dim=1), route).unbind(2)
        present = torch.ones_like(loc[..., 0], dtype=torch.bool)
        if PRESENT in stored:
            present = stored[PRESENT].bool()
        return Seen(stored["id"], present, loc, scale), Here(rows, private, route)

    def latents(self, proposals: Proposals, ids: Tensor, at: Moment, purpose: Purpose, samples: int) -> Tensor:
        """Return samples of each proposal, (R, K, S, L): noise is keyed by row and proposal."""
        eps = at.draw(purpose).normal(ids, proposals.keys, (samples, self.latent), self.dtype).transpose(0, 1)
        return proposals.loc_RKL[:, :, None] + proposals.scale_RKL[:, :, None] * self.kind.standard(eps)

    def scores(
        self, seen: Seen, here: Here, proposals: Proposals, z_RKSL: Tensor, at: Moment, factor_R: Tensor | None = None
    ) -> Tensor:
        """Return the experts' scores of the latents, at the rows' ranks: (B, M, N, S) nats, 0 for absent modalities.

        A score is log p(x_m|z, w), rescaled in training, and where the modality is a member of the proposal, with
        log p(w) - log q(w|x_m) of its private w.

        Args:
            seen: the rows.
            here: of this rank's experts.
            proposals: of the rows.
            z_RKSL: latents.
            at: names the draws of private latents.
            factor_R: what minus normalised weights are multiplied by in the gradient of scores, for gradients that need
                the weights.
        """
        own, scale_M = [], self.weights()
        for e, expert in self.modalities.items():
            z, weights = z_RKSL[:, proposals.slots(e)], Weights()
            if factor_R is not None:
                z = self.lift(seen, z, weights)
            w, log_ratio = self._private(e, here, seen.ids_R, proposals, z.shape[1:3], at, weights)
            whole = torch.cat([z, w], dim=-1).flatten(1, 2)
            log_px = expert.log_prob(here.rows, whole).unflatten(1, z.shape[1:3])
            score = scale_M[e] * log_px + log_ratio
            if factor_R is not None:
                weights.read_from(score, factor_R)
            own.append(torch.where(seen.present_RM[:, e, None, None], score, 0.0))
        return self.dispatch.combine(torch.stack(own, dim=1), here.route)

    def lift(self, seen: Seen, z: Tensor, weights: Weights) -> Tensor:
        """Return latents whose gradient is weighed; only where a gradient needs the weights."""
        raise AssertionError("this gradient needs no weights")

    def _private(
        self, e: int, here: Here, ids: Tensor, proposals: Proposals, num_NS: Sequence[int], at: Moment, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        """Return an expert's private latents (R, N, S, P), and log p(w) - log q(w|x) where they are its posterior's."""
        expert, (loc, scale) = self.modalities[e], (field[:, None, None] for field in here.private[e])
        if not expert.private:
            return loc.expand(-1, *num_NS, -1), loc.new_zeros(())
        eps = at.draw(Purpose.PRIVATE).normal(ids, [e], (*num_NS, expert.private), self.dtype)[0]
        posterior = loc + scale * self.kind.standard(eps)
        if self.pathwise and posterior.requires_grad:
            posterior.register_hook(lambda grad: grad * weights.value_BNS[..., None])
        if self.detaches:
            loc, scale = loc.detach(), scale.detach()
        log_ratio = expert.private_ratio(posterior, loc, scale)
        own = proposals.members_RKM[:, proposals.slots(e), e][..., None]
        drawn = torch.where(own[..., None], posterior, expert.draw_private(eps))
        return drawn, torch.where(own, log_ratio, 0.0)

    def backward(
        self, batch: RankBatch, objective: Objective, at: Moment, num_parts: int = 1, upcoming: RankBatch | None = None
    ) -> Outcome:
        done = [self._backward(part, batch.total, at) for part in batch.split(num_parts)]
        loss, log_px, present, bad = (torch.stack(each).sum(0) for each in zip(*done, strict=True))
        return Outcome(loss, {"rows": loss}, {"log_px": log_px, "present": present}, {PRESENT_FAULT: bad})

    def _backward(self, part: RankBatch, total: int, at: Moment) -> tuple[Tensor, ...]:
        seen, here = self.see(part)
        proposals = self.propose(seen, at)
        z = self.latents(proposals, seen.ids_R, at, Purpose.POSTERIOR, self.samples)
        factor_R = self.factor(seen, total) if self.pathwise else None
        score = self.scores(seen, here, proposals, z, at, factor_R)
        mine = seen.of(here.own)
        loss = self.differentiate(mine, proposals.of(here.own), z[here.own], score, total)
        weight_M = constant(tuple(self.weights()), score.dtype, score.device)
        log_px = (score.detach().mean((2, 3)) / weight_M).double().sum(0)
        return loss.double(), log_px, mine.present_RM.double().sum(0), num_bad(part.rows)

    def factor(self, seen: Seen, total: int) -> Tensor:
        """Return what minus the normalised weights of a row are multiplied by in the gradient of scores, (R,)."""
        raise AssertionError("this gradient needs no weights")

    def differentiate(self, seen: Seen, proposals: Proposals, z: Tensor, score: Tensor, total: int) -> Tensor:
        """Add the gradients of this rank's rows, and return their part of the loss."""
        loss = self.losses(proposals, z, score, seen.present_RM).sum() / total
        loss.backward()
        return loss.detach()

    # Inference

    def inferred(self, proposals: Proposals) -> Tensor:
        """Return which proposals of an evaluation a latent is drawn from, given what is present: (R, K) bool."""
        chosen = torch.zeros_like(proposals.valid_RK)
        chosen[:, self.joint] = proposals.valid_RK[:, self.joint]
        return chosen

    def infer(self, seen: Seen, at: Moment, drawn: bool = True) -> Tensor:
        """Return z given the modalities that rows are said to have, (R, L), from a proposal that is keyed by row.

        Args:
            seen: the rows; set present_RM to those that are given.
            at: names the draws.
            drawn: z ~ q; otherwise its location.
        """
        proposals, draw = self.propose(seen, at, held_out=True), at.draw(Purpose.SUBSET)
        uniform_RK = draw.uniform(seen.ids_R, range(len(proposals.keys)), (), torch.float64).T
        chosen_R = torch.where(self.inferred(proposals), uniform_RK, -1.0).argmax(1)
        index = chosen_R[:, None, None].expand(-1, 1, self.latent)
        loc, scale = (field.gather(1, index)[:, 0] for field in (proposals.loc_RKL, proposals.scale_RKL))
        if not drawn:
            return loc
        return loc + scale * self.kind.standard(draw.normal(seen.ids_R, [0], (self.latent,), self.dtype)[0])

    def alone(self, seen: Seen, at: Moment) -> Tensor:
        """Return the location of q(z|x_m) of each modality alone, (R, M, L); of what a row lacks it means nothing."""
        return self.propose(seen, at, held_out=True).loc_RKL[:, self.single]

    def decode(self, e: int, z_RL: Tensor, ids_R: Tensor, at: Moment) -> Tensor:
        """Return means of p(x_e|z, w), (R, *shape of x_e), of an expert here, w from its private prior."""
        expert = self.modalities[e]
        eps = at.draw(Purpose.PRIVATE).normal(ids_R, [e], (expert.private,), self.dtype)[0]
        return expert.decode(torch.cat([z_RL, expert.draw_private(eps)], dim=1))

    def record(self, outcome: Outcome, num_rows: int) -> dict[str, Any]:
        """Return the mean of log p(x_m|z) and of the term of private latents over rows with m, and the rows' part.

        The mean is None where no row of the step has m.
        """
        log_px, present = outcome.sums["log_px"].tolist(), outcome.sums["present"].tolist()
        means = [total / count if count else None for total, count in zip(log_px, present, strict=True)]
        return {"log_px": means, "present": [count / num_rows for count in present]}

    # Results

    @torch.no_grad()
    def embed(self, batch: RankBatch) -> dict[str, Tensor]:
        """Return the locations of q(z|x_m), by modality; NaN where a row lacks it."""
        seen, here = self.see(batch)
        mine = seen.of(here.own)
        loc_BML = mine.loc_RML.masked_fill(~mine.present_RM[..., None], torch.nan)
        return dict(zip(self.names, loc_BML.unbind(1), strict=True))

    def study(self, dataset: Samples, request: Request) -> Study:
        return MultimodalStudy(self, dataset, request)

    def pictures(self, dataset: Samples, evaluation: Evaluation, seed: int) -> list[Picture]:
        shown = [*multimodal_pictures(self, dataset, seed), *captioned(self, dataset, seed)]
        return [*shown, *latents_in_the_plane(self, dataset)]

    def model(self, class_names: Sequence[str]) -> Any:
        return MultimodalModel(self)

    def protocol(self, num_samples: int) -> dict[str, Any]:
        kinds = {facts.log_px_is for facts in self.facts}
        likelihood = kinds.pop() if len(kinds) == 1 else "unknown"
        of = {"likelihood": likelihood, "likelihood_of": ", ".join(self.names), "loss_is": self.loss_is}
        return MultimodalStudy.protocol(num_samples) | of


def _made(make: MakeModality, latent: int, posterior: PosteriorName, spec: Spec) -> Modality:
    return make(spec, latent, posterior)
