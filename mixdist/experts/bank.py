"""The experts of one rank, run one after another or as one stack.

Shape letters: R rows routed here, E experts on this rank, M rows that one expert sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from mixdist.arguments import check_fields
from mixdist.experts.alike import are_alike
from mixdist.experts.expert import Expert
from mixdist.experts.seen import Seen
from mixdist.terms import Batch, ExpertTerms, Parts, places

Execution = Literal["loop", "stacked"]
Noise = Callable[..., Tensor]
"""Returns noise (experts, rows, *shape) for sample ids (rows,) or (experts, rows), global expert numbers, and the shape
of a row's noise; or (pairs, *shape) for pairs, given their ids and, as ``of_T``, the place of each one's expert in the
numbers. A pass asks once for each shape, for all that its experts see."""


@dataclass(frozen=True)
class Compute:
    """How an expert runs its rows. Memory and speed only: the first two change nothing beyond rounding.

    A stack runs all its rows at once: ``micro_batch``, ``recompute`` and ``compile`` are for a loop.

    Args:
        micro_batch: rows that an expert runs at once; unset, all that arrive. With recompute, or with one-way dispatch,
            it bounds the memory for activations.
        recompute: run the forward pass again in the backward pass instead of keeping its activations.
        bf16: run experts under bfloat16 autocast; parameters stay as they are.
        channels_last: lay images out with channels last, which suits convolutions on tensor cores.
        compile: run experts through torch.compile.

    Raises:
        ValueError: a micro-batch without rows.

    Examples:
        >>> from mixdist.experts import Compute
        >>> Compute(micro_batch=256, recompute=True).bf16
        False
    """

    micro_batch: int | None = None
    recompute: bool = False
    bf16: bool = False
    channels_last: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "compute.")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"compute.micro_batch ({self.micro_batch}) must be at least 1: give rows, or null for all")


class ExpertBank(nn.Module):
    """Experts of one rank by their global numbers.

    In stacked execution each kind of parameter of all experts lies in one tensor with a leading expert axis, and each
    expert's own parameter and gradient are views of it: checkpoints see one set for each expert, the forward pass one
    batched product. So move experts to their device and dtype before, zero gradients in place or let an engine do it,
    and freeze all experts or none.

    Args:
        experts: global expert number to expert, in ascending order.
        execution: loop or stacked.
        compute: how an expert runs its rows.

    Raises:
        ValueError: stacked execution of experts that cannot be stacked.

    Examples:
        >>> import torch
        >>> from mixdist.experts import Centroid, ExpertBank
        >>> from mixdist.terms import Field
        >>> bank = ExpertBank({e: Centroid({"x": Field((2,), torch.float32)}) for e in (4, 7)}, "stacked")
        >>> bank({"id": torch.arange(5), "x": torch.zeros(5, 2)}).loss_R.shape  # rows, experts
        torch.Size([5, 2])
    """

    def __init__(
        self, experts: Mapping[int, Expert], execution: Execution = "loop", compute: Compute | None = None
    ) -> None:
        super().__init__()
        assert experts
        assert list(experts) == sorted(experts)
        self.experts = nn.ModuleDict({str(e): expert for e, expert in experts.items()})
        self.execution: Execution = "loop"
        self.compute = compute or Compute()
        self.timed: dict[Execution, float] = {}  # seconds a pass, where the execution was chosen by the clock
        self.stack: dict[str, Tensor] = {}
        if self.compute.channels_last:
            for expert in self.experts.values():
                expert.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if execution == "stacked":
            self.stack_up()
        # Kept out of the module's own list: a compiled module shares its parameters with the expert.
        self._calls = {e: self._callable(expert) for e, expert in self.owned().items()}

    @property
    def ids(self) -> list[int]:
        """Global numbers of the experts here."""
        return [int(e) for e in self.experts]

    def owned(self) -> dict[int, Expert]:
        """The experts by their global numbers."""
        return {int(e): cast(Expert, expert) for e, expert in self.experts.items()}

    def parts(self, shared: dict[str, nn.Module]) -> Parts:
        """Return these experts and what a mixture shares, as an engine takes them."""
        compute = self.compute
        return Parts(shared, dict(self.owned()), self.stack, compute.micro_batch, compute.bf16)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that any expert here reads, each once."""
        return tuple(dict.fromkeys(name for expert in self.owned().values() for name in expert.fields))

    @property
    def can_stack(self) -> bool:
        """Whether these experts can run as one stack: of one class that allows it, with parameters of one shape.

        A stack runs through the first one, so the others must have its numbers and buffers.
        """
        first, *others = self.owned().values()
        shapes = [(type(e), {n: p.shape for n, p in e.named_parameters()}) for e in (first, *others)]
        same = all(shape == shapes[0] for shape in shapes)
        return first.stackable and same and all(are_alike(first, other) for other in others)

    def stack_up(self) -> None:
        """Go from a loop to stacked execution, before any optimiser is made.

        Raises:
            ValueError: these experts cannot be stacked.
        """
        if not self.can_stack:
            kinds = " and ".join(dict.fromkeys(type(expert).__name__ for expert in self.owned().values()))
            raise ValueError(
                f"mixture.execution (stacked) needs experts of one stackable class with parameters of the same shapes, "
                f"the same options and buffers, and {kinds} here cannot be stacked: set it to loop"
            )
        for name, _ in self._first.named_parameters():
            own = [expert.get_parameter(name) for expert in self.owned().values()]
            stacked = torch.stack([p.detach() for p in own]).requires_grad_()
            stacked.grad = torch.zeros_like(stacked)
            for i, p in enumerate(own):
                p.data, p.grad = stacked.detach()[i], stacked.grad[i]
            self.stack[name] = stacked
        self.execution = "stacked"

    @property
    def _first(self) -> Expert:
        return next(iter(self.owned().values()))

    def _callable(self, expert: Expert) -> Callable[[Batch, Tensor | None], ExpertTerms]:
        call = torch.compile(expert, dynamic=True) if self.compute.compile else expert
        return lambda rows, eps: self._cast(lambda: call(rows, eps), rows)

    def forward(
        self,
        rows: Batch,
        noise: Noise | None = None,
        mask_RE: Tensor | None = None,
        counts_E: Sequence[int] | None = None,
    ) -> ExpertTerms:
        """Return every expert's terms for its rows.

        Args:
            rows: R rows of real numbers.
            noise: draws for them, or None.
            mask_RE: True where the expert sees the row; None where every expert sees every row.
            counts_E: how many rows each expert sees, if known: the device need not be asked.

        Returns:
            terms with fields (R, E, ...), zero where the expert does not see the row. A field that some of these
            experts lack is NaN in their columns.
        """
        seen = None if mask_RE is None else Seen.of(mask_RE, counts_E)
        if self.execution == "stacked":
            return self._run_stack(rows, noise, seen)
        columns, drawn = [], self._draw(rows, noise, seen)
        for i, e in enumerate(self.ids):
            terms = [self._recomputed(e, taken, eps) for _, taken, eps in self._pieces(i, e, rows, drawn, seen)]
            column = _map(lambda *fields: torch.cat(fields), *terms) if len(terms) > 1 else terms[0]
            columns.append(_map(lambda field, i=i: _place(field, i, seen), column))
        return _map(lambda *fields: torch.stack(fields, dim=1), *columns)

    def backward(
        self,
        rows: Batch,
        noise: Noise | None,
        mask_RE: Tensor | None,
        grads: Callable[[], Tensor],
        counts_E: Sequence[int] | None = None,
    ) -> Tensor:
        """Run the experts and add the gradient of sum(grads * losses) to their parameters' ``grad``; return the losses.

        The gradients (R, E) may be on their way until the first losses are there. A micro-batch's activations are gone
        before the next begins.
        """
        seen = None if mask_RE is None else Seen.of(mask_RE, counts_E)
        if self.execution == "stacked":
            losses_RE = self._run_stack(rows, noise, seen).loss_R
            assert losses_RE is not None
            _differentiate(losses_RE, grads())
            return losses_RE.detach()
        grads_RE: Tensor | None = None
        kept: list[tuple[Tensor | slice, int, Tensor]] = []
        drawn = self._draw(rows, noise, seen)
        for i, e in enumerate(self.ids):
            for piece, taken, eps in self._pieces(i, e, rows, drawn, seen):
                losses = self._calls[e](taken, eps).loss_R
                assert losses is not None
                grads_RE = grads() if grads_RE is None else grads_RE
                _differentiate(losses, grads_RE[piece, i])
                kept.append((piece, i, losses.detach()))
        assert grads_RE is not None
        if grads_RE.shape[1] == 1 and isinstance(kept[0][0], slice) and len(kept) == 1:
            return kept[0][2][:, None]  # one expert that trains by itself: a small one's time goes by its calls
        losses_RE = torch.zeros_like(grads_RE)
        for piece, i, losses in kept:
            losses_RE[piece, i] = losses
        return losses_RE

    def _draw(self, rows: Batch, noise: Noise | None, seen: Seen | None) -> dict[int, Tensor]:
        """Return the noise of each expert that takes some, by its place: its rows', in one draw for each shape."""
        takers: dict[tuple[int, ...], list[int]] = {}
        for i, expert in enumerate(self.owned().values()):
            if noise is not None and expert.noise_shape is not None:
                takers.setdefault(expert.noise_shape, []).append(i)
        drawn: dict[int, Tensor] = {}
        for shape, some in takers.items():
            assert noise is not None
            if seen is None:
                eps = noise(rows["id"], [self.ids[i] for i in some], shape).unbind()
            else:
                row_T, of_T = seen.pairs_of(some)
                eps = noise(rows["id"][row_T], self.ids, shape, of_T).split([seen.counts[i] for i in some])
            drawn |= dict(zip(some, eps, strict=True))
        return drawn

    def _pieces(
        self, i: int, e: int, rows: Batch, drawn: dict[int, Tensor], seen: Seen | None
    ) -> Iterator[tuple[Tensor | slice, Batch, Tensor | None]]:
        """Cut an expert's rows into micro-batches, at least one: their places, the rows, their noise."""
        num_rows, expert = len(rows["id"]), cast(Expert, self.experts[str(e)])
        own = {name: rows[name] for name in ("id", *expert.fields)}
        count = num_rows if seen is None else seen.counts[i]
        size = self.compute.micro_batch or max(count, 1)
        for start in range(0, max(count, 1), size):
            within = slice(start, min(start + size, count))
            piece = within if seen is None else seen.rows[i][within]
            taken = own if count == num_rows and size >= count else {n: column[piece] for n, column in own.items()}
            if self.compute.channels_last:
                last = torch.channels_last
                taken = {n: x.contiguous(memory_format=last) if x.dim() == 4 else x for n, x in taken.items()}
            yield piece, taken, drawn[i][within] if i in drawn else None

    def _recomputed(self, e: int, rows: Batch, eps: Tensor | None) -> ExpertTerms:
        if self.compute.recompute and torch.is_grad_enabled():
            # Experts draw nothing themselves, so there is no generator to put back.
            return checkpoint(self._calls[e], rows, eps, use_reentrant=False, preserve_rng_state=False)
        return self._calls[e](rows, eps)

    def _run_stack(self, rows: Batch, noise: Noise | None, seen: Seen | None) -> ExpertTerms:
        for name, stacked in self.stack.items():
            stacked.requires_grad_(self._first.get_parameter(name).requires_grad)
        shape = self._first.noise_shape
        if seen is None:
            eps = None if noise is None or shape is None else noise(rows["id"], self.ids, shape)
            return _map(lambda field: field.transpose(0, 1), self._call_stack(self.stack, rows, eps))
        # Experts without rows do not run; the others get as many as the busiest, real ones: what they say of those that
        # fill up is not read.
        num_rows, most = len(rows["id"]), max(seen.counts)
        some = [i for i, count in enumerate(seen.counts) if count or not most]
        whole = len(some) == len(self.ids)
        mask_ER = seen.mask_RE.T if whole else seen.mask_RE.T[some]
        stack = self.stack if whole else {name: stacked[some] for name, stacked in self.stack.items()}
        order_EM = mask_ER.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
        taken = {name: column[order_EM] for name, column in rows.items()}
        eps = None if noise is None or shape is None else noise(taken["id"], [self.ids[i] for i in some], shape)
        seen_EM = torch.arange(most, device=order_EM.device) < mask_ER.sum(1)[:, None]
        place_T = places(seen_EM, sum(seen.counts))

        def place(field: Tensor) -> Tensor:
            full = field.new_zeros(num_rows, len(self.ids), *field.shape[2:])
            return full.index_put((seen.row_T, seen.expert_T), field.flatten(0, 1)[place_T])

        return _map(place, self._call_stack(stack, taken, eps))

    def _call_stack(self, stack: Mapping[str, Tensor], rows: Batch, eps: Tensor | None) -> ExpertTerms:
        return self._cast(lambda: functional_call(self._first, dict(stack), (rows, eps)), rows)

    def _cast(self, call: Callable[[], ExpertTerms], rows: Batch) -> ExpertTerms:
        if not self.compute.bf16:
            return call()
        with torch.autocast(rows["id"].device.type, torch.bfloat16):
            return _map(lambda field: field.float(), call())


def _differentiate(losses: Tensor, grads: Tensor) -> None:
    if losses.requires_grad:
        losses.backward(grads)


def _place(field: Tensor, i: int, seen: Seen | None) -> Tensor:
    """Put an expert's field (M, ...) to its rows: (R, ...)."""
    if seen is None:
        return field
    full = field.new_zeros(len(seen.mask_RE), *field.shape[1:])
    return full.index_put((seen.rows[i],), field)


def _map(change: Callable[..., Tensor], *terms: ExpertTerms) -> ExpertTerms:
    """Change each field that some of the terms have, given that field of all of them; NaN where one lacks it."""
    loss, log_px, kl = (_change(change, field) for field in zip(*(term[:3] for term in terms), strict=True))
    names = dict.fromkeys(name for term in terms for name in term.features)
    features = {name: _change(change, [term.features.get(name) for term in terms]) for name in names}
    return ExpertTerms(loss, log_px, kl, {name: field for name, field in features.items() if field is not None})


def _change(change: Callable[..., Tensor], fields: Sequence[Tensor | None]) -> Tensor | None:
    like = next((field for field in fields if field is not None), None)
    if like is None:
        return None
    return change(*(torch.full_like(like, math.nan) if field is None else field for field in fields))
