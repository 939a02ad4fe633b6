"""The commands: ``mixdist train`` and ``mixdist sample``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from mixdist.build import Session, build, describe
from mixdist.checkpoint import CheckpointStore, write_file
from mixdist.config import Config
from mixdist.evaluate import Evaluation, evaluate, expert_rows
from mixdist.gallery import draw, targets
from mixdist.mesh import Launch
from mixdist.metrics import MetricsLog, Progress, table
from mixdist.model import load
from mixdist.parsing import RESOLVED, config_parser, dump, make_config, one_line, parse
from mixdist.pictures import sample_picture, to_uint8
from mixdist.trainer import Recorder, Trainer
from mixdist.wire import agree, gather_json

USER_ERROR = 2
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
    except ValueError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130


def _fail(message: str) -> int:
    launch = Launch.read()
    if launch.rank == 0:
        print(f"mixdist: {one_line(message)}", file=sys.stderr, flush=True)
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
    session = build(config)
    run = _run_directory(parsed, resumed, session)
    try:
        _train(config, session, run, dump(parser, parsed), bool(resumed))
    finally:
        session.mesh.close()


def train_parser() -> ArgumentParser:
    """Make the parser of ``mixdist train``."""
    parser = config_parser(
        "mixdist train",
        "Train a mixture, in one process or, one process a rank, under torchrun, deepspeed or srun. "
        "Example: torchrun --nproc-per-node 2 -m mixdist train --config configs/digits_moe.yaml --train.epochs 5",
    )
    parser.add_argument("--out", type=str | None, help="the run's directory; unset, a new one under runs/")
    parser.add_argument("--resume", type=str | None, help="a run's directory: go on from its newest good checkpoint")
    return parser


def _resumed(words: Sequence[str]) -> Path | None:
    """Find ``--resume RUN`` before parsing: the run's own config comes first, then what the words override."""
    pairs = zip(words, [*words[1:], ""], strict=True)
    given = [word.partition("=")[2] or after for word, after in pairs if word.partition("=")[0] == "--resume"]
    if not given:
        return None
    run = Path(given[-1])
    if not (run / RESOLVED).is_file():
        raise ValueError(f"--resume {run}: no checkpoint is there, nor a run ({RESOLVED}): name a run's directory")
    return run


def _run_directory(parsed: Namespace, resumed: Path | None, session: Session) -> Path:
    """Choose the run's directory on rank 0, and tell all ranks."""
    chosen, error = None, None
    if session.mesh.rank == 0:
        try:
            chosen = str(_choose_directory(parsed, resumed))
        except (ValueError, OSError) as mistake:
            error = str(mistake)
    error = gather_json(error, session.mesh.world)[0]
    agree(error, session.mesh.world)
    return Path(gather_json(chosen, session.mesh.world)[0])


def _choose_directory(parsed: Namespace, resumed: Path | None) -> Path:
    if resumed:
        if parsed.out and Path(parsed.out).resolve() != resumed.resolve():
            raise ValueError(f"--out {parsed.out} differs from --resume {resumed}: a run goes on in its own directory")
        return resumed
    if parsed.out:
        run = Path(parsed.out)
        if (run / RESOLVED).exists() or (run / "checkpoints").exists():
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


def _train(config: Config, session: Session, run: Path, resolved: str, resumed: bool) -> None:
    mesh, rank0 = session.mesh, session.mesh.rank == 0
    store = CheckpointStore(run / "checkpoints", mesh, config.checkpoint.keep)
    trainer = Trainer(
        session.mixture,
        session.train,
        [*config.pretrain, config.train],
        config.seed,
        mesh,
        session.wire,
        store,
        log_every=config.log_every,
        save_every=config.checkpoint.every,
        described=describe(config, session.train),
    )
    if resumed:
        checkpoint, passed_over = store.choose()
        for sentence in passed_over if rank0 else ():
            print(f"mixdist: {sentence}; going back to {checkpoint.name}", file=sys.stderr, flush=True)
        trainer.resume(checkpoint)
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
    parser = ArgumentParser(
        prog="mixdist sample",
        exit_on_error=False,
        description="Draw from every expert of a run into a picture. Example: mixdist sample runs/digits_moe-1",
    )
    parser.add_argument("run", type=str, help="the run's directory")
    parser.add_argument("--out", type=str | None, help="the picture; unset, RUN/images/samples.png")
    parser.add_argument("--num_samples", type=int, default=8, help="samples of each expert, 1 to 1000")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    options = parse(parser, words)
    if not 1 <= options.num_samples <= 1000:
        raise ValueError(f"--num_samples ({options.num_samples}) must be from 1 to 1000")
    model = load(options.run)
    images: list[Any] = [to_uint8(model.sample(options.num_samples, e, options.seed).numpy()) for e in model.experts]
    path = Path(options.out or Path(options.run) / "images" / "samples.png")
    sample_picture(path, images, [f"expert {e}" for e in model.experts])
    print(path)
