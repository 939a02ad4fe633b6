"""Bytes as pure functions: the minimum of a step, from counts of rows and experts alone, and what a rank holds.

The minimum for rows is each row once to each other member of the EP group that has an expert for it, with the fields
that the experts there read and the row's id; for a field of a (row, expert) it is the numbers that go to another member
and, where it is differentiated, as many numbers of its gradient back.

Shape letters: P members of an EP group; lists with that suffix have an entry a member.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mixdist.terms import Field

ID_BYTES = 8


class Numbers(NamedTuple):
    """Numbers that a rank sends to other members.

    Args:
        out: of a field.
        back: of the field's gradient, the other way.
    """

    out: int
    back: int

    def num_bytes(self, itemsize: int, differentiated: bool) -> int:
        """Return the bytes of the field and, where it is differentiated, of its gradient."""
        return (self.out + self.back * differentiated) * itemsize


def row_bytes(fields: Iterable[Field]) -> int:
    """Return the bytes of a row on the wire: its stored fields and its id."""
    return ID_BYTES + sum(field.num_bytes for field in fields)


def rows(sent_P: Sequence[int], row_bytes_P: Sequence[int], me: int) -> int:
    """Return the bytes of the rows that go to other members.

    Args:
        sent_P: rows for each member.
        row_bytes_P: bytes of a row for each member.
        me: this member.
    """
    return sum(n * width for p, (n, width) in enumerate(zip(sent_P, row_bytes_P, strict=True)) if p != me)


def combine(counts_P: Sequence[int], experts_P: Sequence[int], me: int, width: int = 1) -> Numbers:
    """Return the numbers of a field (R, e, width) that goes back to the rows' own members, dense.

    Args:
        counts_P: rows of each member.
        experts_P: experts of each member.
        me: this member.
        width: numbers for a (row, expert).
    """
    others = sum(counts_P) - counts_P[me]
    return Numbers(others * experts_P[me] * width, counts_P[me] * (sum(experts_P) - experts_P[me]) * width)


def spread(counts_P: Sequence[int], experts_P: Sequence[int], me: int, width: int = 1) -> Numbers:
    """Return the numbers of a field (B, E, width) that goes from rows to experts, dense: the transpose of combine."""
    out, back = combine(counts_P, experts_P, me, width)
    return Numbers(back, out)


def exchange(counts_P: Sequence[int], experts_P: Sequence[int], me: int, width: int = 1) -> Numbers:
    """Return the numbers of a field (R, e, width) that goes to all members."""
    num_rows, others = sum(counts_P), len(counts_P) - 1
    return Numbers(num_rows * experts_P[me] * others * width, num_rows * (sum(experts_P) - experts_P[me]) * width)


def combine_sum(counts_P: Sequence[int], me: int, width: int = 1) -> Numbers:
    """Return the numbers of a field (R, width), summed over a member's experts, that goes back to the rows' members."""
    return Numbers((sum(counts_P) - counts_P[me]) * width, counts_P[me] * (len(counts_P) - 1) * width)


def pairs(sent_P: Sequence[int], received_P: Sequence[int], me: int, width: int = 1) -> Numbers:
    """Return the numbers of a field of pairs of row and expert (T, width), where rows go to some experts only.

    Args:
        sent_P: pairs sent to each member.
        received_P: pairs received from each.
        me: this member.
        width: numbers for a pair.
    """
    sent, received = (sum(n for p, n in enumerate(list_P) if p != me) for list_P in (sent_P, received_P))
    return Numbers(sent * width, received * width)


def soft_step(
    counts_P: Sequence[int], experts_P: Sequence[int], row_bytes_P: Sequence[int], me: int, itemsize: int
) -> int:
    """Return the bytes that a member sends in a step of a dense soft mixture: rows, losses, and their gradients."""
    sent = rows([counts_P[me]] * len(counts_P), row_bytes_P, me)
    return sent + combine(counts_P, experts_P, me).num_bytes(itemsize, differentiated=True)


def part_rows(num_rows: int, members: int, me: int) -> int:
    """Return how many rows of a tensor a member holds, as ``torch.chunk`` cuts it: the last may hold fewer, or none.

    Examples:
        >>> [part_rows(5, 4, p) for p in range(4)]
        [2, 2, 1, 0]
    """
    each = -(-num_rows // members)
    return max(0, min(each, num_rows - me * each))


def part_numbers(shapes: Iterable[Sequence[int]], members: int, me: int) -> int:
    """Return how many numbers of a module's parameters a member holds that are cut by rows.

    A parameter without rows is whole, and no part of the sum.
    """
    return sum(part_rows(shape[0], members, me) * math.prod(shape[1:]) for shape in shapes if shape)


def cut_step(shapes: Iterable[Sequence[int]], members: int, itemsize: int, passes: int = 1) -> int:
    """Return the bytes that each member sends in a step for parameters that are cut by rows.

    In each pass values come together twice, before the forward and before the backward pass, and gradients go where
    they are summed once; every part has as many rows as the largest.

    Args:
        shapes: of the parameters.
        members: of the group.
        itemsize: bytes of a number.
        passes: how often the module runs in a step.
    """
    return 3 * passes * (members - 1) * part_numbers(shapes, members, 0) * itemsize


def modalities_step(
    counts_P: Sequence[int],
    experts_P: Sequence[int],
    row_bytes_P: Sequence[int],
    me: int,
    itemsize: int,
    latent: int,
    scores: int,
) -> int:
    """Return the bytes that a member sends in a step of a mixture of modalities.

    They are rows, each with the fields of the experts there; location and scale of each posterior of ``latent``
    dimensions to all members, and ``scores`` numbers of each (row, expert) back; and the gradients of both.
    """
    sent = rows([counts_P[me]] * len(counts_P), row_bytes_P, me)
    shown = exchange(counts_P, experts_P, me, 2 * latent).num_bytes(itemsize, differentiated=True)
    return sent + shown + combine(counts_P, experts_P, me, scores).num_bytes(itemsize, differentiated=True)


def reduction(num_bytes: int, ranks: int) -> int:
    """Return the bytes that a rank sends where ``ranks`` sum a tensor for all of them: as a ring does."""
    return 2 * (ranks - 1) * num_bytes // ranks


def balanced(bytes_T: Sequence[int], load_P: Sequence[int], turn: int = 0) -> list[int]:
    """Choose an owner for each tensor, largest first, where least is so far; equal members by turns.

    Args:
        bytes_T: of each tensor.
        load_P: what each member has before.
        turn: the member that comes first of equal ones, modulo their number; those after it follow.

    Examples:
        >>> balanced([10, 40, 20, 10], [0, 0])
        [1, 0, 1, 1]
        >>> balanced([8, 8], [8, 0]), balanced([8, 4], [0, 0], turn=1)
        ([1, 0], [1, 0])
    """
    owners_T, load_P = [0] * len(bytes_T), list(load_P)
    for t in sorted(range(len(bytes_T)), key=lambda t: (-bytes_T[t], t)):
        owners_T[t] = min(range(len(load_P)), key=lambda p: (load_P[p], (p - turn) % len(load_P)))
        load_P[owners_T[t]] += bytes_T[t]
    return owners_T


def owned_bytes(bytes_T: Sequence[int], load_P: Sequence[int], turn: int = 0) -> list[int]:
    """Return the bytes of parameters that each member steps where each parameter has one owner, (P,).

    The optimiser's states there are as many times that as it keeps numbers of each number: 2 for Adam. Under
    ``shard: optimizer`` experts come first, each over its replicas, then what is shared over all ranks, with the bytes
    that each rank owns of experts as ``load_P``. In a competition each expert and each discriminator goes by itself.

    Args:
        bytes_T: of each parameter.
        load_P: what each member owns before; zeros if nothing.
        turn: as for :func:`balanced`; in a competition the expert's number.

    Examples:
        >>> owned_bytes([400, 40, 300, 30], [0, 0])
        [400, 370]
    """
    owners_T = balanced(bytes_T, load_P, turn)
    return [sum(n for n, owner in zip(bytes_T, owners_T, strict=True) if owner == p) for p in range(len(load_P))]


def owned_step(bytes_T: Sequence[int], members: int, me: int, turn: int = 0) -> int:
    """Return the bytes that a member sends in a step of a module that trains by itself, its parameters with owners.

    Gradients go to their owners, the loss and the squared norm are summed in float64, new values go to all others.

    Args:
        bytes_T: of each parameter.
        members: of the group.
        me: this member.
        turn: as for :func:`owned_bytes`.
    """
    own = owned_bytes(bytes_T, [0] * members, turn)[me]
    return sum(bytes_T) - own + (members - 1) * own + reduction(2 * 8, members)


def partition(numbers: int, ranks: int) -> int:
    """Return how many numbers of a group's parameters each of its ranks steps under ZeRO 1 and 2: an even count.

    Examples:
        >>> partition(11, 2), partition(11, 1)
        (6, 12)
    """
    return 2 * -(-numbers // (2 * ranks))


def zero_bytes(groups: Iterable[tuple[int, int]], zero: int, states: int) -> int:
    """Return the bytes of DeepSpeed's optimiser on a rank, in float32: states and, from ZeRO 1 on, master weights.

    Args:
        groups: numbers in the parameters that a group of ranks holds, and how many ranks it has.
        zero: the stage.
        states: numbers that the optimiser keeps of each parameter's number: 2 for Adam.
    """
    if not zero:
        return 4 * states * sum(numbers for numbers, _ in groups)
    return 4 * (states + 1) * sum(partition(numbers, ranks) for numbers, ranks in groups)
