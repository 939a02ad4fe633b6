"""``mixdist train``: train, evaluate on held-out rows, draw."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import IO

from jsonargparse import ArgumentParser, Namespace

from mixdist.cli.ending import report_errors_once
from mixdist.cli.evaluate import summary
from mixdist.competition.competition import Competition
from mixdist.competition.mixture import HardMixture
from mixdist.config.build import Session, build, build_context, build_mesh, describe, first_table
from mixdist.config.config import Config
from mixdist.config.options import parse, values_of
from mixdist.config.parsing import RESOLVED, config_parser, dump, make_config
from mixdist.evaluation.evaluate import evaluate
from mixdist.evaluation.evidence import duplicate_pairs
from mixdist.experts import ExpertBank
from mixdist.files import write_file
from mixdist.mixtures import Soft
from mixdist.parallel.agreement import agree, agreed, gather_json
from mixdist.parallel.mesh import Mesh
from mixdist.report.gallery import draw, targets
from mixdist.report.metrics import MetricsLog, Progress
from mixdist.training.checkpoint import CheckpointStore, checkpoints_in
from mixdist.training.loop import Recorder
from mixdist.training.trainer import Trainer


def train(argv: Sequence[str]) -> None:
    """``mixdist train``: train, evaluate on held-out rows, draw; print a table."""
    parser = train_parser()
    resumed = _resumed(argv)
    first = ["--config", str(resumed / RESOLVED)] if resumed else []
    parsed = parse(parser, [*first, *argv])
    config = make_config(parser, parsed)
    mesh = build_mesh(config)
    held: IO[str] | None = None
    try:
        with report_errors_once(mesh, "look at that rank's own messages, then go on with --resume"):
            session = build(config, mesh)
            with closing(session):
                trainer = agreed(lambda: _trainer(config, session, bool(resumed)), mesh)
                run = _run_directory(parsed, resumed, session)
                held = _hold(run, mesh)
                parsed.execution = session.mixture.bank.execution  # what auto took: the run goes on with it
                try:
                    _train(config, session, trainer, run, dump(parser, parsed), bool(resumed))
                except KeyboardInterrupt:
                    raise KeyboardInterrupt(_remedy(run, "mixdist train --resume")) from None
    finally:
        if held is not None:
            held.close()


def train_parser() -> ArgumentParser:
    """Make the parser of ``mixdist train``."""
    parser = config_parser(
        "mixdist train",
        "Train a mixture, in one process or, one process a rank, under torchrun, deepspeed or srun. Every key below is "
        "a key of the YAML file and, dotted, an option. A class is chosen by class_path, its arguments stand under "
        "init_args; a class of your own is named by its import path. "
        "Example: torchrun --standalone --nproc-per-node 2 -m mixdist train --config configs/digits_moe.yaml "
        "--train.epochs 5 --expert.init_args.latent 16",
    )
    parser.add_argument("--out", type=str | None, help="the run's directory; unset, a new one under runs/")
    parser.add_argument(
        "--resume", type=str | None, help="a run's directory: go on from its newest good checkpoint, on any layout"
    )
    return parser


def _resumed(argv: Sequence[str]) -> Path | None:
    """Find ``--resume RUN`` before parsing: the run's own config comes first, then what argv overrides."""
    given = values_of(argv, "--resume")
    if not given:
        return None
    run = Path(given[-1])
    if not (run / RESOLVED).is_file():
        raise ValueError(f"--resume {run} is no run ({RESOLVED} is missing): name a directory that mixdist train made")
    return run


def _run_directory(parsed: Namespace, resumed: Path | None, session: Session) -> Path:
    """Choose the run's directory on rank 0, and tell all ranks."""
    chosen, error = None, None
    if session.mesh.rank == 0:
        try:
            chosen = str(_choose_directory(parsed, resumed))
        except ValueError as mistake:
            error = str(mistake)
        except OSError as mistake:
            error = f"the run's directory cannot be made ({mistake}): name another with --out"
    error = gather_json(error, session.mesh.world)[0]
    agree(error, session.mesh.world)
    return Path(gather_json(chosen, session.mesh.world)[0])


def _hold(run: Path, mesh: Mesh) -> IO[str] | None:
    """Take the run for this process and those with it: two that write one record would destroy it."""
    held, error = None, None
    if mesh.rank == 0:
        held = open(run / ".lock", "a+")  # noqa: SIM115 (it is held as long as the run lasts)
        held.seek(0)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held.truncate(0)
            held.write(f"{os.getpid()} on {socket.gethostname()}\n")
            held.flush()
        except OSError:
            by = held.read().strip()
            held.close()
            error = f"{run} is being written by another process ({by}): wait for it, or end it"
    agree(gather_json(error, mesh.world)[0], mesh.world)
    return held


def _remedy(run: Path, go_on: str) -> str:
    """Say how a run that has ended goes on: from its checkpoint, or anew."""
    if checkpoints_in(run / "checkpoints"):
        return f"go on with {go_on} {run}"
    return f"it has no checkpoint yet, so remove {run} and start it again"


def _choose_directory(parsed: Namespace, resumed: Path | None) -> Path:
    if resumed:
        if parsed.out and Path(parsed.out).resolve() != resumed.resolve():
            raise ValueError(f"--out {parsed.out} differs from --resume {resumed}: a run goes on in its own directory")
        return resumed
    if parsed.out:
        run = Path(parsed.out)
        if any((run / name).exists() for name in (RESOLVED, "checkpoints", "metrics.jsonl")):
            again = _remedy(run, "--resume")
            raise ValueError(f"--out {run} holds a run already: {again}, or name another directory")
        run.mkdir(parents=True, exist_ok=True)
        return run
    stem = Path(str(parsed.config[-1])).stem if parsed.config else "run"
    number = 1
    while True:
        run = Path("runs") / f"{stem}-{number}"
        try:
            run.mkdir(parents=True)
            return run
        except FileExistsError:
            number += 1


def _trainer(config: Config, session: Session, resumed: bool) -> Trainer | Competition:
    """Make the trainer, before the run has a directory: what does not fit leaves nothing behind."""
    phases = [*config.pretrain, config.train]
    if config.competition is not None:
        assert isinstance(session.mixture, HardMixture)
        return Competition(
            session.mixture,
            session.train,
            phases,
            config.competition,
            build_context(config, session),
            None if resumed else first_table(config, session.train),  # its checkpoints have the table
            save_every=config.checkpoint.every,
            described=describe(config, session.train),
        )
    assert isinstance(session.mixture, Soft)
    return Trainer(
        session.mixture,
        session.train,
        phases,
        config.seed,
        session.mesh,
        session.wire,
        log_every=config.log_every,
        save_every=config.checkpoint.every,
        prefetch=config.dispatch.prefetch,
        duplicate_pairs=partial(duplicate_pairs, session.mixture),
        described=describe(config, session.train),
    )


def _train(
    config: Config, session: Session, trainer: Trainer | Competition, run: Path, resolved: str, resumed: bool
) -> None:
    mesh, rank0 = session.mesh, session.mesh.rank == 0
    trainer.store = CheckpointStore(run / "checkpoints", mesh, config.checkpoint.keep)
    if resumed:
        _resume(trainer, trainer.store)
    if rank0:
        write_file(run / RESOLVED, resolved.encode())
    recorders: list[Recorder] = []
    if rank0:
        log = MetricsLog(run, trainer.position.total if resumed else None)
        bar = Progress(trainer.total_steps, trainer.position.total, sys.stderr.isatty())
        recorders = [log, bar]
        if isinstance(trainer, Competition):
            trainer.history.tell = bar.tell
    if isinstance(trainer, Competition):
        trainer.history.recorders, trainer.history.tables = recorders, run / "assignments"
    else:
        trainer.recorders = recorders
    try:
        trainer.fit()
    finally:
        for recorder in recorders:
            recorder.close()
    _conclude(config, session, run)


def _execution(bank: ExpertBank) -> str:
    """Return what execution auto took, and why."""
    timed = ", ".join(f"{way} {1000 * seconds:.2f} ms" for way, seconds in bank.timed.items())
    return f"   execution: {bank.execution} ({timed} a pass)" if timed else ""


def _resume(trainer: Trainer | Competition, store: CheckpointStore) -> None:
    """Go to the newest good checkpoint, all ranks or none."""
    checkpoint, passed_over = store.choose()
    for sentence in passed_over if store.mesh.rank == 0 else ():
        print(f"mixdist: {sentence}; going back to {checkpoint.name}", file=sys.stderr, flush=True)
    agreed(lambda: trainer.resume(checkpoint), store.mesh)
    store.set_aside_after(checkpoint)


def _conclude(config: Config, session: Session, run: Path) -> None:
    """Evaluate on held-out rows, draw and print."""
    target = targets(session.mixture)
    evaluation = evaluate(session.mixture, session.test, config.test_batch_size, config.seed, target)
    picture = draw(session.mixture, session.test, evaluation, run, config.seed)
    if session.mesh.rank == 0:
        print(summary(evaluation, session.test))
        shown = f"   picture: {picture}" if picture else ""
        print(f"run: {run}{_execution(session.mixture.bank)}{shown}", flush=True)
