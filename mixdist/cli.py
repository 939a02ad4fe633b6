"""The commands: ``mixdist train`` and ``mixdist sample``."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TypeVar, cast

import numpy as np
from jsonargparse import ArgumentParser, Namespace

from mixdist.build import Session, build, build_mesh, describe, keep_large_blocks
from mixdist.checkpoint import CheckpointStore, write_file
from mixdist.config import Config
from mixdist.engines import NotFinite
from mixdist.evaluate import Evaluation, evaluate, expert_rows
from mixdist.gallery import draw, targets
from mixdist.mesh import Launch, Mesh
from mixdist.metrics import MetricsLog, Progress, table
from mixdist.model import load
from mixdist.parsing import RESOLVED, config_parser, dump, make_config, one_line, parse, plain_parser, values_of
from mixdist.pictures import sample_picture, scatter_picture, to_uint8
from mixdist.trainer import Recorder, Trainer
from mixdist.wire import Agreed, LostRank, agree, gather_json

T = TypeVar("T")

USER_ERROR, INTERRUPTED = 2, 130
LINGER_S = 10.0
"""Seconds that other ranks wait before they leave with an error, so that rank 0's message is out before a launcher,
which ends all processes when one fails, ends rank 0."""

USAGE = """usage: mixdist COMMAND [options]

commands:
  train    train a mixture of experts, in one process or under torchrun, deepspeed or srun
  sample   draw from every expert of a run into a picture

mixdist COMMAND --help tells each command's options. A first run:
  torchrun --standalone --nproc-per-node 2 -m mixdist train --config configs/digits_moe.yaml"""


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; give the exit code: 0, or 2 for what a user can mend, told in one line by rank 0."""
    words = list(sys.argv[1:] if words is None else words)
    keep_large_blocks()
    sys.path.insert(0, os.getcwd())  # classes of one's own are found from the console script as with python -m
    commands = {"train": train, "sample": sample}
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        if words[0] not in commands:
            raise ValueError(f"unknown command {words[0]!r}: expected {' or '.join(commands)}; see mixdist --help")
        commands[words[0]](words[1:])
        return 0
    except (ValueError, OSError) as error:
        return _fail(_told(error), Launch.read().rank, alone=isinstance(error, Alone))
    except KeyboardInterrupt:
        print("mixdist: interrupted: go on with mixdist train --resume RUN", file=sys.stderr)
        return INTERRUPTED


def _leave(mesh: Mesh, lost: LostRank) -> None:
    """Name the ranks that do not answer, once, and end this one; a launcher may end all first and tell by itself."""
    missing, speaks = mesh.missing()
    if speaks:
        who = f"rank {', '.join(map(str, missing))} does not answer" if missing else "a collective failed on every rank"
        limit = f"mesh.timeout_s is {mesh.timeout.total_seconds():g}"
        remedy = "look at that rank's own messages, then go on with --resume"
        print(f"mixdist: {who} ({one_line(str(lost))}; {limit}): {remedy}", file=sys.stderr, flush=True)
    os._exit(1)  # groups that lost a member cannot be ended in good order


class Alone(ValueError):
    """A mistake that this rank met by itself; the others may wait for it in a collective."""


def _told(error: Exception) -> str:
    return one_line(str(error)) + (": mend it and try again" if isinstance(error, OSError) else "")


def _fail(message: str, rank: int, alone: bool) -> int:
    """Tell what all ranks know once, from rank 0, and what one knows alone from that rank."""
    if rank == 0 or alone:
        print(f"mixdist: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(LINGER_S)
    return USER_ERROR


def train(words: Sequence[str]) -> None:
    """``mixdist train``: train, evaluate on held-out rows, draw; print a table."""
    parser = train_parser()
    resumed = _resumed(words)
    first = ["--config", str(resumed / RESOLVED)] if resumed else []
    parsed = parse(parser, [*first, *words])
    config = make_config(parser, parsed)
    mesh = build_mesh(config)
    held: IO[str] | None = None
    try:
        session = build(config, mesh)
        trainer = _agreed(lambda: _trainer(config, session), mesh)
        run = _run_directory(parsed, resumed, session)
        held = _hold(run, mesh)
        parsed.execution = session.mixture.bank.execution  # what auto took: the run goes on with it
        _train(config, session, trainer, run, dump(parser, parsed), bool(resumed))
    except LostRank as lost:
        _leave(mesh, lost)
    except (Agreed, NotFinite):
        raise
    except (ValueError, OSError) as error:
        raise Alone(f"rank {mesh.rank}: {_told(error)}" if mesh.world_size > 1 else _told(error)) from error
    finally:
        mesh.close()
        if held is not None:
            held.close()


def _agreed(make: Callable[[], T], mesh: Mesh) -> T:
    """Do something on every rank, or fail on every rank with one message."""
    made, error = None, None
    try:
        made = make()
    except (ValueError, OSError) as mistake:
        error = _told(mistake)
    agree(error, mesh.world)
    return cast(T, made)


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


def _resumed(words: Sequence[str]) -> Path | None:
    """Find ``--resume RUN`` before parsing: the run's own config comes first, then what the words override."""
    given = values_of(words, "--resume")
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
        held = open(run / ".lock", "w")  # noqa: SIM115 (it is held as long as the run lasts)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            held.close()
            error = f"{run} is being written by another process: wait for it, or end it"
    agree(gather_json(error, mesh.world)[0], mesh.world)
    return held


def _choose_directory(parsed: Namespace, resumed: Path | None) -> Path:
    if resumed:
        if parsed.out and Path(parsed.out).resolve() != resumed.resolve():
            raise ValueError(f"--out {parsed.out} differs from --resume {resumed}: a run goes on in its own directory")
        return resumed
    if parsed.out:
        run = Path(parsed.out)
        if any((run / name).exists() for name in (RESOLVED, "checkpoints", "metrics.jsonl")):
            raise ValueError(f"--out {run} holds a run already: go on with --resume {run}, or name another directory")
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


def _trainer(config: Config, session: Session) -> Trainer:
    """Make the trainer, before the run has a directory: what does not fit leaves nothing behind."""
    return Trainer(
        session.mixture,
        session.train,
        [*config.pretrain, config.train],
        config.seed,
        session.mesh,
        session.wire,
        log_every=config.log_every,
        save_every=config.checkpoint.every,
        prefetch=config.dispatch.prefetch,
        described=describe(config, session.train),
    )


def _train(config: Config, session: Session, trainer: Trainer, run: Path, resolved: str, resumed: bool) -> None:
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
    trainer.recorders = recorders
    try:
        trainer.fit()
    finally:
        for recorder in recorders:
            recorder.close()
    _conclude(config, session, run)


def _resume(trainer: Trainer, store: CheckpointStore) -> None:
    """Go to the newest good checkpoint, all ranks or none."""
    checkpoint, passed_over = store.choose()
    for sentence in passed_over if store.mesh.rank == 0 else ():
        print(f"mixdist: {sentence}; going back to {checkpoint.name}", file=sys.stderr, flush=True)
    _agreed(lambda: trainer.resume(checkpoint), store.mesh)
    store.set_aside_after(checkpoint)


def _conclude(config: Config, session: Session, run: Path) -> None:
    """Evaluate on held-out rows, draw and print."""
    target = targets(session.mixture)
    evaluation = evaluate(session.mixture, session.test, config.test_batch_size, config.seed, target)
    picture = draw(session.mixture, session.test, evaluation, run, config.seed)
    if session.mesh.rank == 0:
        print(summary(evaluation, session.test.class_names, session.test.label, len(session.test)))
        print(f"run: {run}" + (f"   picture: {picture}" if picture else ""), flush=True)


def summary(evaluation: Evaluation, class_names: tuple[str, ...], label: str | None, num_rows: int) -> str:
    """Give the table that ends a run: a line for each expert, then the figures, on held-out rows."""
    headers = ["expert", "rows", "mean loss", *([f"took {label}"] if label else [])]
    figures = "   ".join(f"{name} {value:.4f}" for name, value in evaluation.figures.items())
    return f"{table(headers, expert_rows(evaluation, class_names))}\n{num_rows} held-out rows: {figures}"


def sample(words: Sequence[str]) -> None:
    """``mixdist sample RUN``: a picture with a row of samples for each expert."""
    parser = plain_parser(
        "mixdist sample",
        "Draw from the prior of every expert of a run, one row of images each, into a picture; in one process, without "
        "the data. Example: mixdist sample runs/digits_moe-1 --num_samples 16",
    )
    parser.add_argument("run", type=str, help="the run's directory")
    parser.add_argument("--out", type=str | None, help="the picture, a PNG file; unset, RUN/images/samples.png")
    parser.add_argument("--num_samples", type=int, default=8, help="samples of each expert, 1 to 1000")
    parser.add_argument("--seed", type=int, default=0, help="of the draws: the same seed, the same samples")
    options = parse(parser, words)
    if not 1 <= options.num_samples <= 1000:
        raise ValueError(f"--num_samples ({options.num_samples}) must be from 1 to 1000")
    model = load(options.run)
    samples = [model.sample(options.num_samples, e, options.seed).numpy() for e in model.experts]
    path = Path(options.out or Path(options.run) / "images" / "samples.png")
    if samples[0].shape[1:] == (2,):
        experts = np.repeat(np.arange(len(samples)), options.num_samples)
        scatter_picture(path, np.concatenate(samples), experts, [])
    else:
        sample_picture(path, [to_uint8(images) for images in samples], [f"expert {e}" for e in model.experts])
    print(path)
