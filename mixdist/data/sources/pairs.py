"""Rows of several sources matched by a key.

Shape letters: N rows, M sources.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mixdist.arguments import check_arguments
from mixdist.data.dataset import Samples, Source, Splits
from mixdist.data.paired import PRESENT, Paired, check_label, present_field
from mixdist.terms import Spec


class Pairs(Source):
    """Rows of several sources side by side, matched by a key: one field of each, under the source's name here.

    A row is made of the rows of all sources that have one key. Keys are whole numbers, each once in a split of a
    source. The rows' ids are the keys; they are in the order of the first source. The label, where the first source has
    one and every row of all splits has something of that source, is its own, and validation rows are where all sources
    have some.

    Args:
        sources: by the name of the field that its rows become, two or more; in memory or in shards.
        key: the field that is matched, in all sources; id is the rows' own id.
        field: the field that is taken of each source.
        absent: keeps rows whose key some source does not have, with a field "present"; otherwise they are an error.

    Raises:
        ValueError: fewer than two sources, or a name that is taken.

    Examples:
        >>> from mixdist.data import Digits, Pairs, Textures
        >>> train = Pairs({"grey": Digits(), "coloured": Textures(Digits(), modalities=1)}, field="x").load().train
        Traceback (most recent call last):
        ...
        ValueError: Pairs: source coloured has no field 'x', it has ['x0', 'y']: set field to one that all sources have
        >>> train = Pairs({"left": Digits(), "right": Digits()}).load().train
        >>> sorted(train.spec), len(train)
        (['left', 'right', 'y'], 1438)
    """

    def __init__(self, sources: dict[str, Source], key: str = "id", field: str = "x", absent: bool = False) -> None:
        check_arguments(Pairs.__init__, locals(), "Pairs' ")
        if len(sources) < 2:
            raise ValueError(f"sources ({', '.join(sources) or 'none'}) must be two or more: give another, by its name")
        if bad := [name for name in sources if name in ("id", PRESENT, key)]:
            raise ValueError(f"sources: the name {bad[0]!r} is taken by a field of rows: choose another")
        self.sources, self.key, self.field, self.absent = sources, key, field, absent

    def load(self) -> Splits[Paired]:
        """Read the sources and match their rows.

        Raises:
            ValueError: a source does not have the field or the key, a key comes twice, or one does not match.
        """
        loaded = {name: source.load() for name, source in self.sources.items()}
        kinds = ["train", "test", *(["valid"] if all(one.valid is not None for one in loaded.values()) else [])]
        splits = [self._paired(kind, {n: getattr(one, kind) for n, one in loaded.items()}) for kind in kinds]
        values, counts = torch.cat([one.ids for one in splits]).unique(return_counts=True)
        if bool((counts > 1).any()):
            raise ValueError(
                f"Pairs: key {self.key} {int(values[counts > 1][0])} is in two of the splits {', '.join(kinds)}: a key "
                f"names one row of all together"
            )
        if len({one.label for one in splits}) > 1:  # a class of training rows alone would judge nothing
            splits = [_unlabelled(one) for one in splits]
        return Splits(*splits)

    def _paired(self, kind: str, part_of: dict[str, Samples]) -> Paired:
        keys = {name: self._keys(kind, name, part) for name, part in part_of.items()}
        id_N = self._matched(kind, keys)
        index_NM = torch.stack([_places(key_N, id_N) for key_N in keys.values()], dim=1)
        columns: dict[str, Tensor] = {"id": id_N}
        spec: dict[str, Any] = {}
        first = next(iter(part_of.values()))
        label = first.label if bool((index_NM[:, 0] >= 0).all()) else None
        if label is not None:
            check_label(label, part_of, "Pairs: sources")
            spec[label] = first.spec[label]
            columns[label] = first.take(index_NM[:, 0], fields=[label])[label]
        if self.absent:
            spec[PRESENT] = present_field(len(part_of))
            columns[PRESENT] = (index_NM >= 0).byte()
        names = tuple({name: self.field} for name in part_of)
        class_names = first.class_names if label is not None else ()
        return Paired(tuple(part_of.values()), names, index_NM, columns, spec, label, class_names)

    def _keys(self, kind: str, name: str, part: Samples) -> Tensor:
        """Return the key of each row of a source, int64 (N,)."""
        spec: Spec = part.spec
        for wanted, what in ((self.field, "field"), (self.key, "key")):
            if wanted not in spec and not (what == "key" and wanted == "id"):
                raise ValueError(
                    f"Pairs: source {name} has no field {wanted!r}, it has {sorted(spec)}: set {what} to one that all "
                    f"sources have"
                )
        key_N = part.ids if self.key == "id" else part.take(torch.arange(len(part)), fields=[self.key])[self.key]
        if key_N.ndim != 1 or key_N.is_floating_point():
            raise ValueError(
                f"Pairs: key {self.key!r} of source {name} is {tuple(key_N.shape[1:])} of {key_N.dtype}, expected one "
                f"whole number a row: name another"
            )
        values, counts = key_N.long().unique(return_counts=True)
        if bool((counts > 1).any()):
            raise ValueError(
                f"Pairs: key {self.key} {int(values[counts > 1][0])} comes {int(counts.max())} times in the {kind} "
                f"rows of source {name}: a key names one row"
            )
        return key_N.long()

    def _matched(self, kind: str, keys: dict[str, Tensor]) -> Tensor:
        """Return the keys of all rows, in the first source's order, those it does not have after them."""
        every = torch.cat(list(keys.values())).unique()
        if not self.absent:
            for name, key_N in keys.items():
                lone = every[~torch.isin(every, key_N)]
                if len(lone):
                    holder = next(n for n, other in keys.items() if bool((other == lone[0]).any()))
                    raise ValueError(
                        f"Pairs: key {self.key} {int(lone[0])} is in the {kind} rows of source {holder} and not in "
                        f"those of source {name} ({len(lone)} such keys): add these rows, or set absent to true"
                    )
        first_N = next(iter(keys.values()))
        return torch.cat([first_N, every[~torch.isin(every, first_N)]])


def _unlabelled(part: Paired) -> Paired:
    """Return a split without its label."""
    columns = {name: column for name, column in part.columns.items() if name != part.label}
    spec = {name: field for name, field in part.column_spec.items() if name != part.label}
    return replace(part, columns=columns, column_spec=spec, label=None, class_names=())


def _places(key_N: Tensor, wanted_N: Tensor) -> Tensor:
    """Return where each wanted key stands among keys, -1 where it does not."""
    sorted_N, order_N = key_N.sort()
    at_N = torch.searchsorted(sorted_N, wanted_N).clamp(max=len(key_N) - 1)
    found: Tensor = torch.where(sorted_N[at_N] == wanted_N, order_N[at_N], -1)
    return found
