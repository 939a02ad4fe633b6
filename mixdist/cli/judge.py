"""Rows of another run for classifiers that judge what is generated: runs on unlike rows are then judged alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from mixdist.config.build import Session, readable
from mixdist.config.options import parse
from mixdist.config.parsing import RESOLVED, make_config
from mixdist.data import Samples, Splits
from mixdist.data.sources.splits import load_splits
from mixdist.parallel.agreement import agreed


@contextmanager
def judge_rows(
    parser: ArgumentParser, judge: str | None, session: Session, evaluated: Samples
) -> Iterator[Samples | None]:
    """Yield the training rows of another run, and close them at the end; None where none is named. Every rank calls it.

    Args:
        parser: of ``mixdist evaluate``.
        judge: that run's directory.
        session: of the run that is judged.
        evaluated: the rows that it is judged on.

    Raises:
        Agreed: there is no such run, its rows do not suit, some are among those evaluated, or nothing is judged.
    """
    if judge is None:
        yield None
        return
    splits = agreed(lambda: _splits(parser, Path(judge), session, evaluated), session.mesh.world)
    rows = readable("train", splits.train, session.mesh)
    with closing(dataclasses.replace(session, train=rows, test=splits.test, valid=splits.valid)) as other:
        yield other.train


def _splits(parser: ArgumentParser, run: Path, session: Session, evaluated: Samples) -> Splits:
    """Return the data of a run whose training rows suit.

    Raises:
        ValueError: they do not, or there is no such run.
    """
    if not session.mixture.judged:
        kind = type(session.mixture).__name__
        raise ValueError(f"--judge ({run}) needs a mixture of modalities, and {kind} is none: leave it out")
    if not (run / RESOLVED).is_file():
        raise ValueError(f"--judge ({run}) holds no run ({RESOLVED} is missing): name one that mixdist train made")
    config = make_config(parser, parse(parser, ["--config", str(run / RESOLVED), str(run)]), trains=False)
    splits = load_splits(config.data, config.valid, tests=False)
    train = splits.train
    for name in {**evaluated.spec, **train.spec}:
        if train.spec.get(name) != evaluated.spec.get(name):
            raise ValueError(
                f"--judge ({run}) has another field {name!r} than the run that it judges: name another run"
            )
    if train.label is None or train.label != evaluated.label:
        told = f"--judge ({run}) has the label {train.label}, the run that it judges {evaluated.label}"
        raise ValueError(f"{told}: name a run of labelled rows of the same source")
    shared = torch.isin(evaluated.ids, train.ids)
    if bool(shared.any()):
        raise ValueError(
            f"--judge ({run}) has sample {evaluated.ids[shared][0]} among its training rows, which is evaluated here: "
            f"name a run that has not learnt from these rows"
        )
    return splits
