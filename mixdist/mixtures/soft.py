"""The soft mixture: gate, send, experts, combine, objective.

Shape letters: B rows on this rank, R rows routed here, E all experts, e experts on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mixdist.arguments import check_arguments
from mixdist.data import RankBatch
from mixdist.experts import Compute
from mixdist.gates import Gate
from mixdist.mixtures.ensemble import Execution, MakeExpert
from mixdist.mixtures.expert_start import ExpertStart
from mixdist.mixtures.gated import Gated
from mixdist.mixtures.members import losses_of_all, may_be_none
from mixdist.mixtures.mixture import Outputs, Stage
from mixdist.mixtures.objective_contracts import check_objective
from mixdist.mixtures.objectives import Objective
from mixdist.mixtures.routing import RoutingPlan, TopK, admitted, demand, lay_out
from mixdist.mixtures.step_record import outcome_of, record_of
from mixdist.noise import Moment
from mixdist.parallel.route import Route
from mixdist.terms import Batch, Gating, Outcome, Parts, Spec, places


class Soft(Gated):
    """Gate and experts, each row seen by every expert or by its k most responsible ones; seed documents 000 and 001.

    The gate runs once on all of a rank's rows and the experts in micro-batches, each of which is sent, run, combined
    and differentiated down to its responsibilities; the balance term, a statistic of the whole batch, is then
    differentiated once, and both gradients together go through the gate. So accumulation is exact.

    One way: where the objective is linear in the experts' losses, L = 1/N sum w_ne l_ne, a loss's gradient w_ne / N is
    known before the loss and goes out ahead; the expert differentiates at once, and the losses that return teach only
    the gate. Otherwise losses return, the objective is taken of them, and their gradients go out.

    Args:
        gate: class of mixdist.gates, or your own Gate; replicated on every rank.
        expert: class of mixdist.experts, or your own Expert, for all of them; or a list with one for each expert.
        num_experts: how many experts; with a list, its length.
        routing: top-k; unset, every expert sees every row.
        one_way: send the gradients of the losses ahead with the rows; needs an objective linear in the experts' losses.
        prefetch: send the next step's rows while this step's experts run; needs dense routing.
        execution: how a rank runs its experts: one after another (loop), as one batched product (stacked), or the
            faster of the two here (auto: timed once; the run's config.yaml keeps which it took).
        compute: how an expert runs its rows.
        expert_start: how experts begin, from training rows; unset, as drawn.

    Raises:
        ValueError: options that cannot be combined.

    Examples:
        >>> from mixdist.experts import VAE
        >>> from mixdist.gates import Softmax
        >>> from mixdist.mixtures import Soft, TopK
        >>> Soft(Softmax, VAE, num_experts=10, routing=TopK(2)).num_experts
        10
    """

    def __init__(
        self,
        gate: Callable[[Spec, int], Gate],
        expert: MakeExpert | list[MakeExpert],
        num_experts: int | None = None,
        routing: TopK | None = None,
        one_way: bool = False,
        prefetch: bool = False,
        execution: Execution = "auto",
        compute: Compute = Compute(),  # noqa: B008 (frozen)
        expert_start: ExpertStart | None = None,
    ) -> None:
        check_arguments(Soft.__init__, locals(), "mixture.")
        super().__init__(gate, expert, num_experts, execution, compute)
        self.routing, self.one_way, self.prefetch = routing, one_way, prefetch
        self.expert_start = expert_start
        self._ahead: tuple[RankBatch, Route] | None = None
        if routing is not None and routing.k > self.num_experts:
            raise ValueError(
                f"mixture.routing.k ({routing.k}) must be at most mixture.num_experts ({self.num_experts}): lower it, "
                f"or leave routing out for every expert to see every row"
            )
        if prefetch and routing is not None:
            raise ValueError(
                "mixture.prefetch (true) needs dense routing: with top-k a row's way depends on the gate after the "
                "step before; set it to false, or leave routing out"
            )

    def check(self, stages: Mapping[str, Stage]) -> None:
        for name, stage in stages.items():
            if self.one_way and stage.objective.reads_losses and not stage.objective.linear:
                kind = type(stage.objective).__name__
                raise ValueError(
                    f"mixture.one_way (true) needs an objective linear in the experts' losses, and {name}.objective is "
                    f"{kind}: set it to false, or take WeightedLoss"
                )

    def inspect(self, rows: Batch, batch: RankBatch, at: Moment, stage: Stage | None = None) -> Outputs:
        """Check experts, gate and objective."""
        losses, gating, outputs = self.inspect_members(rows, batch, at, stage)
        if stage is not None and gating is not None:
            by_itself = gating.loss_B is not None and gating.loss_B.requires_grad
            learns = gating.log_resp_BE.requires_grad and not by_itself
            pair = gating.log_resp_BE, losses_of_all(losses, self.num_experts)
            trains = stage.trains if any(True for _ in self.bank.parameters()) else "gate"
            top_k = None if self.routing is None else self.routing.k
            rows_B = check_objective("objective", stage.objective, *pair, trains, learns, may_be_none(self), top_k)
            outputs[f"objective: {type(stage.objective).__name__}.rows"] = rows_B
        return outputs

    @property
    def part_of_rows(self) -> float:
        if self.routing is None:
            return 1.0
        return self.routing.k / self.num_experts * min(1.0, self.routing.capacity_factor or 1.0)

    @property
    def parts(self) -> Parts:
        """The gate is shared; the experts are this rank's own."""
        return self.bank.parts({"gate": self.gate})

    def backward(
        self, batch: RankBatch, objective: Objective, at: Moment, num_parts: int = 1, upcoming: RankBatch | None = None
    ) -> Outcome:
        if not objective.reads_losses:
            return self._backward_alone(batch, objective, at)
        batches = batch.split(num_parts)
        routes: Iterator[Route] = iter(())
        if self.routing is None:  # the first rows are under way while the gate runs
            routes = chain([self._first(batch, batches[0])], map(self.send, batches[1:]))
        gating = self.gating(batch.rows, at)
        learns = gating.log_resp_BE.requires_grad
        balance = self._start_balance(objective, gating.log_resp_BE, batch.total)
        sizes = [part.size for part in batches]
        leaves = [part.detach().requires_grad_(learns) for part in gating.log_resp_BE.split(sizes)]
        plan = None
        if self.routing is not None:
            plan = self._plan(self.routing, gating.log_resp_BE, batch)
            routes = self._sparse_routes(batches, plan)
        elif upcoming is not None:
            self._ahead = upcoming, self.send(upcoming.split(num_parts)[0])
        choices = [None] * num_parts if plan is None else list(plan.routed_BE.split(sizes))
        done = [
            self._backward_part(next(routes), leaf, routed, objective, at, batch.total)
            for leaf, routed in zip(leaves, choices, strict=True)
        ]
        log_resp_BE, losses_BE = torch.cat(leaves), torch.cat([losses for losses, _ in done])
        named = {"rows": torch.stack([loss for _, loss in done]).sum()}
        if balance is not None:
            named["balance"] = balance(log_resp_BE)
        named |= self._backward_gate(gating, leaves, batch.total)
        return outcome_of(named, log_resp_BE.detach(), losses_BE, self.routing, plan)

    def _backward_alone(self, batch: RankBatch, objective: Objective, at: Moment) -> Outcome:
        """Differentiate an objective that reads no losses: no row is sent and no expert runs."""
        gating = self.gating(batch.rows, at)
        leaf = gating.log_resp_BE.detach().requires_grad_(gating.log_resp_BE.requires_grad)
        balance = self._start_balance(objective, leaf, batch.total)
        loss = objective.rows(leaf, torch.zeros_like(leaf)).sum() / batch.total
        if loss.requires_grad:
            loss.backward()
        named = {"rows": loss.detach()} | ({} if balance is None else {"balance": balance(leaf)})
        named |= self._backward_gate(gating, [leaf], batch.total)
        return outcome_of(named, leaf.detach())

    def _start_balance(
        self, objective: Objective, log_resp_BE: Tensor, total: int
    ) -> Callable[[Tensor], Tensor] | None:
        """Start to sum responsibilities over the batch, under way while the experts run.

        The function returned differentiates the balance term down to the log responsibilities given, and returns this
        rank's share of it.
        """
        term, over_batch = objective.balance, self.dispatch.over_batch
        if term is None:
            return None
        # In float64: near balance the term is a small difference of large numbers.
        pending = over_batch.start_sum(log_resp_BE.detach().double().exp().sum(0))

        def finish(leaves_BE: Tensor) -> Tensor:
            resp_sum_E = pending.wait().requires_grad_(leaves_BE.requires_grad)
            balance = term(resp_sum_E, total)
            if balance.requires_grad:
                # Every rank has the whole term, hence its whole gradient: the adjoint of the sum needs no collective.
                leaves_BE.double().exp().sum(0).backward(torch.autograd.grad(balance, resp_sum_E)[0])
            return over_batch.share(balance.detach())

        return finish

    def _first(self, batch: RankBatch, part: RankBatch) -> Route:
        """Return the route of a step's first rows, which may have been sent in the step before."""
        ahead, self._ahead = self._ahead, None
        return ahead[1] if ahead is not None and ahead[0] is batch else self.send(part)

    def settle(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead[1].rows()

    def _sparse_routes(self, batches: list[RankBatch], plan: RoutingPlan) -> Iterator[Route]:
        routed = plan.routed_BE.split([part.size for part in batches])
        for part, part_routed, told in zip(batches, routed, self.dispatch.arrivals(routed), strict=True):
            yield self.dispatch.send_some(part.rows, self.fields_P, part_routed, told)

    def _plan(self, routing: TopK, log_resp_BE: Tensor, batch: RankBatch) -> RoutingPlan:
        """Decide over the global batch which experts see this rank's rows."""
        choices_BK = routing.choices(log_resp_BE)
        capacity = routing.capacity(batch.total, self.num_experts)
        demand_WKE = demand(choices_BK, self.num_experts)[None]
        if capacity is not None:
            demand_WKE = self.dispatch.over_batch.gather(demand_WKE, [1] * len(batch.counts))
        return lay_out(log_resp_BE, choices_BK, admitted(choices_BK, demand_WKE, self.context.mesh.rank, capacity))

    def _rows_loss(
        self, objective: Objective, route: Route, log_resp_BE: Tensor, routed_BE: Tensor | None, losses_BE: Tensor
    ) -> Tensor:
        """Sum the objective's rows; of a row that no expert saw, the gate's part only."""
        if self.routing is None or routed_BE is None or route.arrivals is None:
            return objective.rows(log_resp_BE, losses_BE).sum()
        log_weights_BE, num_seen = self.routing.log_weights(log_resp_BE, routed_BE), route.arrivals.seen
        if num_seen < len(routed_BE):
            seen = places(routed_BE.any(1), num_seen)
            log_weights_BE, losses_BE = log_weights_BE[seen], losses_BE[seen]
        return objective.expert_rows(log_weights_BE, losses_BE).sum() + objective.gate_rows(log_resp_BE).sum()

    def _backward_part(
        self, route: Route, log_resp_BE: Tensor, routed_BE: Tensor | None, objective: Objective, at: Moment, total: int
    ) -> tuple[Tensor, Tensor]:
        """Run a micro-batch down to the gradient of its responsibilities; return the experts' losses, and its own."""
        if self.one_way:
            losses_BE = self._backward_ahead(route, log_resp_BE, routed_BE, at, total)
        else:
            losses_R = self.expert_terms(route, at).loss_R
            assert losses_R is not None
            losses_BE = self.dispatch.combine(losses_R, route)
        loss = self._rows_loss(objective, route, log_resp_BE, routed_BE, losses_BE) / total
        if loss.requires_grad:
            loss.backward()
        return losses_BE.detach(), loss.detach()

    def _backward_ahead(
        self, route: Route, log_resp_BE: Tensor, routed_BE: Tensor | None, at: Moment, total: int
    ) -> Tensor:
        log_weights_BE = log_resp_BE.detach()
        if self.routing is not None and routed_BE is not None:
            log_weights_BE = self.routing.log_weights(log_weights_BE, routed_BE)
        rows = route.rows()  # before weights are spread: it is the rows that tell which weights are wanted
        grads = self.dispatch.start_spread(log_weights_BE.exp() / total, route)
        values = self.values(rows, self.bank.fields)
        losses_Re = self.bank.backward(values, self.noise(at), route.mask_Re, grads, route.seen_e)
        return self.dispatch.combine(losses_Re, route)

    def _backward_gate(self, gating: Gating, leaves: list[Tensor], total: int) -> dict[str, Tensor]:
        """Differentiate the gate, once; return its own loss by name."""
        outputs: list[Tensor] = []
        grads: list[Tensor | None] = []
        if gating.log_resp_BE.requires_grad:
            outputs.append(gating.log_resp_BE)
            grads.append(torch.cat([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]))
        if gating.loss_B is not None and gating.loss_B.requires_grad:
            outputs.append(gating.loss_B.sum() / total)
            grads.append(None)
        if outputs:
            torch.autograd.backward(outputs, grads)
        return {} if gating.loss_B is None else {"gate": gating.loss_B.detach().sum() / total}

    def weights(self, rows: Batch, at: Moment) -> Gating:
        gating = self.gating(rows, at)
        if self.routing is None:
            return gating
        return gating._replace(log_resp_BE=self.routing.untrained_log_weights(gating.log_resp_BE))

    def record(self, outcome: Outcome, num_rows: int) -> dict[str, Any]:
        return record_of(outcome, num_rows)
