"""A mixture with one decoder: components send features, and a decoder that every rank has reads their weighted sum.

Shape letters: B rows on this rank, R rows routed here, N rows of the global batch, E all components, e components on
this rank, L latent, H features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mixdist.arguments import check_arguments
from mixdist.data import RankBatch, Samples
from mixdist.experts import Component, Compute
from mixdist.mixtures.context import Context
from mixdist.mixtures.dirichlet import NUM_UNIFORM, dirichlet_kl, log_weights
from mixdist.mixtures.ensemble import Execution, MakeExpert
from mixdist.mixtures.gateless import Gateless
from mixdist.mixtures.masks import Masks
from mixdist.mixtures.members import inspect_decoder
from mixdist.mixtures.mixture import Mixture, Outputs, Stage
from mixdist.mixtures.mvae_pictures import mvae_pictures
from mixdist.mixtures.mvae_shown import MVAEModel
from mixdist.mixtures.mvae_study import MVAEStudy
from mixdist.mixtures.objectives import Objective
from mixdist.mixtures.penalties import Penalty
from mixdist.mixtures.pictures import Picture
from mixdist.mixtures.study import Evaluation, Request, Study
from mixdist.nets import MLP
from mixdist.nets.likelihood import Likelihood, LikelihoodName, MeanName, check_levels
from mixdist.nets.mlp import flat
from mixdist.nets.network import Network
from mixdist.noise import Moment, Purpose
from mixdist.parallel.route import Route
from mixdist.terms import Batch, ExpertTerms, Outcome, Parts


class Latents(NamedTuple):
    """What comes back from the components for this rank's rows.

    Args:
        a_BE: Dirichlet parameters.
        kl_BE: KL(q(z_i|x) || N(0, I)), nats.
        z_BEL: draws.
        mean_BEL: of q(z_i|x).
        log_var_BEL: of q(z_i|x).
    """

    a_BE: Tensor
    kl_BE: Tensor
    z_BEL: Tensor
    mean_BEL: Tensor
    log_var_BEL: Tensor


class MVAE(Gateless):
    """MVAE of seed document 002: x from sum_i b_i s_i(z_i), w ~ Dir(a(x)), b the weights under dropout masks.

    Loss of a batch of N rows (equations 9, 10, 15, 18, 24), nats:

        1/N sum_n [-log p(x_n|s_n) + c sum_i KL(q(z_ni|x_n) || N(0, I)) + KL(Dir(a_n) || Dir(b, ..., b))]
        + weight r(z) + cost of the masks' rates,

    with c = kl_weight / E (``kl: mean``, the text of equations 9, 18 and 24; of the components that are on) or
    kl_weight (``sum``, as in equations 30 and 31; with kl_weight 1 and no penalty or masks only this is a bound of
    -log p(x), equation 8). All terms of a row are computed at the row's own rank from small numbers that come back;
    features are summed over experts on the way. A component that its masks have put off gets no rows and costs nothing.

    With one component and no masks it is a plain VAE, and the penalties make it InfoVAE, WAE and others: docs/mvae.md.

    Args:
        component: class of :class:`mixdist.experts.Component`, or your own with its ``features``.
        num_experts: E.
        decoder: network of the shared decoder, features to x; unset, an MLP with two hidden layers of 500.
        likelihood: p(x|s), as of :class:`mixdist.experts.VAE`.
        scale: of the likelihood, or "learned".
        mean: sigmoid when x lies in [0, 1], identity otherwise.
        masks: :class:`mixdist.mixtures.Masks`; unset, none.
        penalty: r, class of mixdist.mixtures.penalties; unset, none.
        kl: of the components, mean or sum.
        kl_weight: of the components' KL.
        prior: b of the Dirichlet prior; the text leaves it open, its authors' code has 1 / E.
        execution: as of :class:`mixdist.mixtures.Soft`.
        compute: how a component runs its rows.

    Raises:
        ValueError: options that cannot be combined, a number out of range.

    Examples:
        >>> from mixdist.mixtures import DHSIC, MVAE, Masks
        >>> MVAE(num_experts=4, masks=Masks, penalty=DHSIC(10.0)).num_experts
        4
    """

    shares_are, reads_features = "mean weights", True
    probes = ("logistic", "mlp", "svm", "knn")

    def __init__(
        self,
        component: MakeExpert = Component,
        num_experts: int = 4,
        decoder: Network | None = None,
        likelihood: LikelihoodName = "bernoulli",
        scale: float | Literal["learned"] = "learned",
        mean: MeanName = "sigmoid",
        masks: Callable[[int], Masks] | None = None,
        penalty: Penalty | None = None,
        kl: Literal["mean", "sum"] = "mean",
        kl_weight: float = 1.0,
        prior: float = 1.0,
        execution: Execution = "auto",
        compute: Compute = Compute(),  # noqa: B008 (frozen)
    ) -> None:
        check_arguments(MVAE.__init__, locals(), "mixture.")
        super().__init__(component, num_experts, execution, compute)
        for name, value in (("kl_weight", kl_weight), ("prior", prior)):
            if not (0 if name == "kl_weight" else 1e-300) <= value < math.inf:
                raise ValueError(f"mixture.{name} ({value}) must be a number from 0 (a prior above it): give 1")
        self.network = MLP([500, 500], "elu") if decoder is None else decoder
        self.likelihood_options = likelihood, scale, mean
        self.make_masks, self.penalty, self.prior = masks or no_masks, penalty, prior
        self.kl_weight, self.kl_mean = kl_weight, kl == "mean"

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.component = next(iter(self.bank.owned().values()))
        field, features = str(getattr(self.component, "field", "x")), getattr(self.component, "num_features", None)
        if not isinstance(features, int):
            kind = type(self.component).__name__
            raise ValueError(f"mixture.component ({kind}) must say how many features it has: set num_features")
        self.field, self.shape = field, context.spec[field].shape
        name, scale, mean = self.likelihood_options
        num_levels = check_levels(context.spec[field], field, "MVAE") if name == "logistic" else None

        def make() -> SharedDecoder:
            return SharedDecoder(self.network, features, self.shape, Likelihood(name, scale, mean, num_levels))

        self.decoder = context.make(make, Purpose.DECODER)
        self.masks = context.make(lambda: self.make_masks(self.num_experts), Purpose.DECODER, 1)

    @property
    def parts(self) -> Parts:
        learned = {"masks": self.masks} if any(True for _ in self.masks.parameters()) else {}
        shared = {"decoder": self.decoder, **learned}
        return self.bank.parts(shared)

    def key_of(self, e: int) -> str:
        return "mixture.component"

    # One step

    def backward(
        self, batch: RankBatch, objective: Objective, at: Moment, num_parts: int = 1, upcoming: RankBatch | None = None
    ) -> Outcome:
        self.masks.count(at)
        parts = batch.split(num_parts)
        slopes: list[tuple[Tensor, ...] | None] = [None] * num_parts
        penalty = torch.zeros((), dtype=torch.float64, device=batch.rows["id"].device)
        if self.penalty is not None and num_parts > 1:
            penalty, slopes = self._penalty_first(parts, batch, at)
        done = []
        for part, slope in zip(parts, slopes, strict=True):
            route = self.send(part)
            terms = self.expert_terms(route, at)
            latents = self.latents(terms, route)
            log_b_BE, loss_B, log_px_B = self.rows_of(part, route, terms, latents, at)
            loss = loss_B.sum() / batch.total
            total = loss
            if slope is not None:
                total = total + sum((a * b).sum() for a, b in zip(latents[2:], slope, strict=True))
            elif self.penalty is not None:
                found = self.dispatch.over_batch.share(self._penalty(latents[2:], batch.counts))
                penalty, total = found.detach().double(), total + found
            total.backward()
            done.append((loss.detach(), log_px_B.detach(), latents.kl_BE.detach(), log_b_BE.detach().exp()))
        named = {"rows": torch.stack([one[0] for one in done]).sum()}
        if self.penalty is not None:
            named["penalty"] = penalty
        if any(True for _ in self.masks.parameters()):
            cost = self.dispatch.over_batch.share(self.masks.cost())
            cost.backward()
            named["masks"] = cost.detach()
        log_px, kl, weight = (torch.cat([one[i] for one in done]).double().sum(0) for i in (1, 2, 3))
        sums = {"log_px": log_px, "kl": kl, "weight": weight}
        parts_of_loss = {name: value.double() for name, value in named.items()}
        return Outcome(torch.stack(list(parts_of_loss.values())).sum(), parts_of_loss, sums)

    def send(self, batch: RankBatch) -> Route:
        """Start sending this rank's rows to all components that are on."""
        on = self.masks.on()
        if all(on):
            return super().send(batch)
        return self.dispatch.send_to(batch.rows, self.fields_P, on, batch.counts)

    def inspect(self, rows: Batch, batch: RankBatch, at: Moment, stage: Stage | None = None) -> Outputs:
        """Check the components and the decoder."""
        found, size = super().inspect(rows, batch, at, stage), int(self.component.num_features)  # type: ignore[arg-type]
        call = lambda one, values, given: one.log_prob(values[self.field], given)  # noqa: E731
        inspect_decoder(self, self.decoder, call, size, rows, batch.rows, at)
        return found

    def latents(self, terms: ExpertTerms, route: Route) -> Latents:
        """Bring the small numbers of all components to the rows' own ranks, in one move."""
        told, size = terms.features, terms.features["z_RL"].shape[-1]
        assert terms.loss_R is not None
        small = torch.stack([told["a_R"], terms.loss_R], dim=-1)
        moved = self.dispatch.combine(torch.cat([small, *(told[n] for n in WIDE)], dim=-1), route)
        a, kl, *wide = moved.split([1, 1, size, size, size], dim=-1)
        return Latents(self.masks.only_on(a[..., 0], 1.0), kl[..., 0], *wide)  # any a that has a logarithm

    def rows_of(
        self, batch: RankBatch, route: Route, terms: ExpertTerms, latents: Latents, at: Moment
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log weights (B, E), loss and log p(x|s) of each row, (B,)."""
        log_b_BE = self.draw_weights(batch.rows["id"], latents.a_BE, at)
        summed_BH = self.dispatch.combine_sum(terms.features["feature_RH"], log_b_BE.exp(), route)
        log_px_B = self.decoder.log_prob(self.values(batch.rows, (self.field,))[self.field], summed_BH)
        each = self.kl_weight / sum(self.masks.on()) if self.kl_mean else self.kl_weight
        loss_B = each * latents.kl_BE.sum(-1) + self.prior_kl(latents.a_BE) - log_px_B
        return log_b_BE, loss_B, log_px_B

    def prior_kl(self, a_BE: Tensor) -> Tensor:
        """Return KL(Dir(a) || Dir(b, ..., b)) of the components that are on, (B,) nats.

        It is 0 for one, whose weight is always 1.
        """
        a_BE = self.of_on(a_BE)
        return dirichlet_kl(a_BE, self.prior) if a_BE.shape[1] > 1 else torch.zeros_like(a_BE[:, 0])

    def of_on(self, field_BE: Tensor) -> Tensor:
        """Return the part of a field (B, E, ...) that is of components that are on."""
        on = self.masks.on()
        if all(on):
            return field_BE
        return torch.stack([field_BE[:, e] for e, is_on in enumerate(on) if is_on], dim=1)  # an index would be sent

    def draw_weights(self, ids_B: Tensor, a_BE: Tensor, at: Moment) -> Tensor:
        """Return log b of rows, (B, E): Dirichlet draws under masks, keyed by row and component."""
        experts = range(self.num_experts)
        uniform_EBU = at.draw(Purpose.MIXING).uniform(ids_B, experts, (NUM_UNIFORM,), self.dtype)
        log_w_BE = log_weights(a_BE, uniform_EBU.transpose(0, 1))
        if self.masks.kind == "none":
            return torch.log_softmax(log_w_BE, dim=-1)
        uniform_EB = at.draw(Purpose.MASK).uniform(ids_B, experts, (), self.dtype)
        return torch.log_softmax(log_w_BE + self.masks.log_masks(uniform_EB.T), dim=-1)

    def mean_weights(self, a_BE: Tensor) -> Tensor:
        """Return the weights at their means, (B, E): E w under the masks' means."""
        weight_BE = a_BE * (self.masks.mean().to(a_BE))
        return weight_BE / weight_BE.sum(-1, keepdim=True)

    @torch.no_grad()
    def summed_at_means(self, route: Route, weight_BE: Tensor) -> Tensor:
        """Return the weighted sum of features at the means of q(z|x), (B, H)."""

        def silence(ids: Tensor, experts: Sequence[int], shape: Sequence[int], of_T: Tensor | None = None) -> Tensor:
            lead = (len(experts), ids.shape[-1]) if of_T is None else (len(ids),)
            return torch.zeros(*lead, *shape, dtype=self.dtype, device=ids.device)

        terms = self.bank(self.values(route.rows(), self.bank.fields), silence, route.mask_Re, route.seen_e)
        return self.dispatch.combine_sum(terms.features["feature_RH"], weight_BE, route)

    def _penalty(self, wide: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """Return the penalty of the global batch with its weight, the same on every rank."""
        assert self.penalty is not None
        on = [self.of_on(one) for one in wide]
        gathered = self.dispatch.over_batch.gather(torch.stack(on, dim=1), counts).unbind(1)
        return self.penalty.weight * self.penalty(*gathered)

    def _penalty_first(
        self, parts: Sequence[RankBatch], batch: RankBatch, at: Moment
    ) -> tuple[Tensor, list[tuple[Tensor, ...] | None]]:
        """Run the components once without a gradient; return the penalty, and its slopes by each part's latents."""
        with torch.no_grad():
            found = []
            for part in parts:
                route = self.send(part)
                found.append(self.latents(self.expert_terms(route, at), route)[2:])
        leaves = [torch.cat(each).requires_grad_() for each in zip(*found, strict=True)]
        penalty = self.dispatch.over_batch.share(self._penalty(leaves, batch.counts))
        slopes = torch.autograd.grad(penalty, leaves, allow_unused=True)
        whole = [torch.zeros_like(leaf) if s is None else s for leaf, s in zip(leaves, slopes, strict=True)]
        sizes = [part.size for part in parts]
        return penalty.detach().double(), list(zip(*(one.split(sizes) for one in whole), strict=True))

    def record(self, outcome: Outcome, num_rows: int) -> dict[str, Any]:
        """Return mean log p(x|s), the components' KL and weights, and what the masks select."""
        told: dict[str, Any] = Mixture.record(self, outcome, num_rows)
        rates, kept = self.masks.rates().detach(), self.masks.kept().detach()
        told |= {"drop_rate": rates.tolist(), "selected_components": float(kept.sum())}
        return told if self.masks.off_above is None else told | {"components_on": sum(self.masks.on())}

    # Results

    def embed(self, batch: RankBatch) -> dict[str, Tensor]:
        """Return the means of q(z_i|x) of the components that are on, by their numbers."""
        on = self.masks.on()
        return {name: mean_BL for name, mean_BL in super().embed(batch).items() if on[int(name)]}

    def study(self, dataset: Samples, request: Request) -> Study:
        return MVAEStudy(self, dataset, request)

    def pictures(self, dataset: Samples, evaluation: Evaluation, seed: int) -> list[Picture]:
        return mvae_pictures(self, dataset, evaluation, seed)

    def model(self, class_names: Sequence[str]) -> Any:
        return MVAEModel(self)

    def protocol(self, num_samples: int) -> dict[str, Any]:
        return {"likelihood": self.decoder.likelihood.is_a, "likelihood_of": self.field}


WIDE = ("z_RL", "mean_RL", "log_var_RL")


def no_masks(num_components: int) -> Masks:
    """Return masks that keep every component."""
    return Masks(num_components, "none")


class SharedDecoder(torch.nn.Module):
    """x from the weighted sum of features, on every rank alike.

    Args:
        network: features to x.
        num_features: H.
        shape: of x.
        likelihood: p(x|s).
    """

    def __init__(self, network: Network, num_features: int, shape: tuple[int, ...], likelihood: Likelihood) -> None:
        super().__init__()
        self.net, self.likelihood, self.shape = network.decoder(num_features, shape), likelihood, shape

    def log_prob(self, x: Tensor, summed_BH: Tensor) -> Tensor:
        """Return log p(x|s), (B,) nats."""
        rows = flat(x, self.shape)
        return self.likelihood.log_prob(rows, self.net(summed_BH).to(rows.dtype))

    def decode(self, summed_BH: Tensor) -> Tensor:
        """Return the mean of p(x|s), (B, *shape of x)."""
        return self.likelihood.mean(self.net(summed_BH)).reshape(-1, *self.shape)
