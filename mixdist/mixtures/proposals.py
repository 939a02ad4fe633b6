"""What is known of rows with several modalities, and the posteriors that their latents are drawn from.

Shape letters: R rows, M modalities, K proposals, N those that an expert scores, L shared latent, P private latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixdist.data import Samples
from mixdist.data.paired import PRESENT
from mixdist.experts import Expert, Modality
from mixdist.experts.location_scale import KINDS, PosteriorName
from mixdist.mixtures.facts import Facts
from mixdist.parallel.route import Route
from mixdist.terms import Batch, Spec


class Seen(NamedTuple):
    """What every rank of an EP group knows of rows.

    Args:
        ids_R: ids.
        present_RM: which modalities a row has.
        loc_RML: locations of q(z|x_m).
        scale_RML: scales.
    """

    ids_R: Tensor
    present_RM: Tensor
    loc_RML: Tensor
    scale_RML: Tensor

    def of(self, rows: slice) -> Seen:
        """Return the same of some rows."""
        return Seen(*(field[rows] for field in self))


class Here(NamedTuple):
    """What this rank's experts alone know of the rows that arrive.

    Args:
        rows: their fields as numbers.
        private: location and scale of each expert's private posterior, (R, P).
        route: of the rows.
    """

    rows: Batch
    private: dict[int, tuple[Tensor, Tensor]]
    route: Route

    @property
    def own(self) -> slice:
        """This rank's rows among those that arrive."""
        first = sum(self.route.counts[: self.route.me])
        return slice(first, first + self.route.num_own)


class Proposals(NamedTuple):
    """The posteriors that latents of a row are drawn from.

    Args:
        members_RKM: the modalities of each, none where the row does not have them.
        loc_RKL: locations.
        scale_RKL: scales.
        keys: their numbers in the draws' keys, K.
        slots_MN: the proposals that each expert scores; None for all.
    """

    members_RKM: Tensor
    loc_RKL: Tensor
    scale_RKL: Tensor
    keys: list[int]
    slots_MN: Tensor | None = None

    @property
    def valid_RK(self) -> Tensor:
        """Whether a row has the proposal."""
        return self.members_RKM.any(-1)

    def slots(self, e: int) -> Tensor | slice:
        """Return an index of the proposals that an expert scores."""
        return slice(None) if self.slots_MN is None else self.slots_MN[e]

    def of(self, rows: slice) -> Proposals:
        """Return those of some rows."""
        return self._replace(
            members_RKM=self.members_RKM[rows], loc_RKL=self.loc_RKL[rows], scale_RKL=self.scale_RKL[rows]
        )


def check_modality(key: str, expert: Expert, latent: int, posterior: PosteriorName) -> None:
    """Check the class of an expert, and that it has the mixture's latent.

    Raises:
        ValueError: it is no modality, or has another latent.
    """
    kind = type(expert).__name__
    if not isinstance(expert, Modality):
        raise ValueError(f"{key}: {kind} is no modality: subclass mixdist.experts.Modality")
    if expert.latent != latent or expert.kind is not KINDS[posterior]:
        raise ValueError(
            f"{key}: {kind} has latent {expert.latent} and a {type(expert.kind).__name__} posterior, expected "
            f"mixture.latent ({latent}) and mixture.posterior ({posterior}): leave both out of its init_args"
        )


def check_own_fields(facts: Sequence[Facts], spec: Spec) -> None:
    """Check that every modality has one expert.

    Raises:
        ValueError: two have the same field.
    """
    owners: dict[str, int] = {}
    for e, one in enumerate(facts):
        name = one.fields[0]
        if name in owners:
            raise ValueError(
                f"mixture.expert[{e}] models the field {name!r}, and so does mixture.expert[{owners[name]}]: give each "
                f"modality one expert, of {', '.join(spec)}"
            )
        owners[name] = e


PRESENT_FAULT = "q(z|x), with no modality or a number other than 0 and 1 in 'present',"
"""What a step and an evaluation say of rows that are not in memory, which :func:`check_present` has not seen."""


def num_bad(rows: Batch) -> Tensor:
    """Return how many rows have no modality, or another number than 0 and 1 in "present", float64 ()."""
    if PRESENT not in rows:
        return rows["id"].new_zeros((), dtype=torch.float64)
    known = ((rows[PRESENT] == 0) | (rows[PRESENT] == 1)).all(1)
    return (~(known & (rows[PRESENT] == 1).any(1))).double().sum()


def check_present(dataset: Samples, kind: str = "") -> None:
    """Check that each row in memory has a modality, and that "present" holds 0 and 1 alone.

    Args:
        dataset: the rows.
        kind: what they are called, with a space after it.

    Raises:
        ValueError: one has none, or another number.
    """
    if PRESENT not in dataset.spec or not dataset.in_memory:
        return
    rows = dataset.take(torch.arange(len(dataset)), fields=(PRESENT,))
    other = ((rows[PRESENT] != 0) & (rows[PRESENT] != 1)).nonzero()
    if len(other):
        row, m = other[0].tolist()
        raise ValueError(
            f"field {PRESENT!r} of {kind}sample {int(rows['id'][row])} holds {rows[PRESENT][row, m].item():g}, "
            f"expected 1 for a modality that the row has and 0 for one that it has not: mend this row"
        )
    none = (rows[PRESENT] == 0).all(1)
    if bool(none.any()):
        sample = int(rows["id"][none][0])
        raise ValueError(
            f"{kind}sample {sample} has none of its modalities, as {PRESENT!r} says ({int(none.sum())} such rows of "
            f"{len(dataset)}): leave such rows out"
        )
