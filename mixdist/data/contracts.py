"""What a source and its rows must be."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixdist.data.dataset import Samples, Source, Splits, check_field
from mixdist.messages import PACKAGE, describe_failure, one_line
from mixdist.terms import Batch, Spec

SAID_BY_SAMPLES = ("spec", "label", "class_names", "log_density_N", "attribute", "attribute_names")


def load(source: Source) -> Splits:
    """Return what a source loads, once it is seen to be right; rows are not read.

    Raises:
        ValueError: it fails, or data sets, fields or ids are not what they must be.
    """
    who, own = f"data: {type(source).__name__}.load", is_own(source)
    try:
        found = source.load()
    except (ValueError, OSError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not own or not raised_in.is_relative_to(PACKAGE):
            raise  # its own words say where it comes from
        raise ValueError(f"{who}: {one_line(str(error))}") from error
    except Exception as error:
        raise ValueError(f"{who} fails ({describe_failure(error)}): fix it") from error
    if own:
        _check_splits(who, found)
    return Splits(*found)


def is_own(source: Source) -> bool:
    """Return whether a source is none of the package's."""
    return type(source).__module__.partition(".")[0] != "mixdist"


def _check_splits(who: str, found: Any) -> None:
    """Check the data sets of a source of one's own against each other."""
    splits = [*found[:2], *(one for one in found[2:] if one is not None)] if isinstance(found, (tuple, list)) else []
    told = len(splits) == 2 or isinstance(found, Splits)  # three without names could be train, valid, test
    if not (told and all(isinstance(one, Samples) for one in splits)):
        given = type(found).__name__
        inside = ", ".join(type(one).__name__ for one in found) if isinstance(found, (tuple, list)) else given
        raise ValueError(
            f"{who} returns {inside}, expected mixdist.data.Splits(train, test), or Splits(train, test, valid): return "
            f"that"
        )
    for one in splits:
        _check_samples(who, one)
    first = splits[0].spec
    for name in [name for one in splits for name in {**first, **one.spec} if one.spec.get(name) != first.get(name)]:
        raise ValueError(f"{who}: the field {name!r} differs between the data sets: give all the same spec")
    ids = torch.cat([one.ids for one in splits])
    values, counts = ids.unique(return_counts=True)
    if len(values) < len(ids):
        raise ValueError(
            f"{who} returns the id {values[counts > 1][0]} {int(counts[counts > 1][0])} times: an id names one sample "
            f"of all data sets together"
        )


def _check_samples(who: str, one: Samples) -> None:
    kind = type(one).__name__
    for name in SAID_BY_SAMPLES:
        if not hasattr(one, name):
            raise ValueError(f"{who}: {kind} has no {name}: set it, to None or () where it has none")
    for name, field in one.spec.items():
        check_field(name, field)
    ids = one.ids
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim != 1 or not len(ids):
        shown = f"{ids.dtype}, {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{who}: ids of {kind} ({shown}) must be int64 (N,), one for each sample, at least 1")


def check_first(source: Source, one: Samples) -> None:
    """Check the first row of a data set that a source has loaded.

    Raises:
        ValueError: it cannot be read, or is not what the spec says.
    """
    who, kind, first = f"data: {type(source).__name__}.load", type(one).__name__, torch.arange(1)
    try:
        rows = one.take(first)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{who}: {kind}.start fails ({describe_failure(error)}): fix it") from error
    check_rows(rows, one.spec, one.ids[first], f"{who}: {kind}.start")


def check_rows(rows: Batch, spec: Spec, ids: Tensor, who: str = "data: Samples.start") -> None:
    """Check stored rows against their spec and the ids that they must have.

    Args:
        rows: as stored.
        spec: of the fields.
        ids: of the samples that were asked for.
        who: names the method in messages.

    Raises:
        ValueError: a field is missing or of another shape or dtype, an id is another, a number is not finite, or a
            class is out of range.
    """
    if missing := [name for name in ("id", *spec) if name not in rows]:
        raise ValueError(f"{who} returns {', '.join(rows)}, and the field {missing[0]!r} is missing: return all fields")
    if not torch.equal(rows["id"].cpu(), ids.cpu()):
        raise ValueError(f"{who} returns other ids than those at the positions asked for: return rows in that order")
    for name, field in spec.items():
        column = rows[name]
        if column.shape != (len(ids), *field.shape) or column.dtype != field.dtype:
            raise ValueError(
                f"{who} returns the field {name!r} as {tuple(column.shape)} of {column.dtype}, expected "
                f"{(len(ids), *field.shape)} of {field.dtype}: fix its Field in the spec, or the rows"
            )
        if field.num_classes is not None:
            good, wanted = (column.long() >= 0) & (column.long() < field.num_classes), f"0 to {field.num_classes - 1}"
        elif column.is_floating_point():
            good, wanted = column.isfinite(), "a finite number"
        else:
            continue
        if not bool(good.all()):
            place = tuple(good.logical_not().nonzero()[0].tolist())
            raise ValueError(
                f"{who} returns the field {name!r} of sample {rows['id'][place[0]]} as {column[place].item()}, "
                f"expected {wanted}: fix or remove this sample"
            )
