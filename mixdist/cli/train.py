"""``mixdist train``: train, evaluate on held-out rows, draw."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from itertools import count
from pathlib import Path
from typing import IO

from jsonargparse import ArgumentParser, Namespace

from mixdist.baselines.model import ABOUT
from mixdist.cli.ending import report_errors_once
from mixdist.cli.evaluate import figures_of, summary
from mixdist.config.build import KINDS, Session, build, build_mesh, build_program, build_selection, describe
from mixdist.config.card import card
from mixdist.config.config import Config
from mixdist.config.options import parse, values_of
from mixdist.config.parsing import RESOLVED, config_parser, dump, make_config
from mixdist.config.upcycled import check_model
from mixdist.evaluation.evaluate import evaluate
from mixdist.files import hold, write_file
from mixdist.mixtures import Mixture
from mixdist.parallel.agreement import agreed, on_rank_0
from mixdist.parallel.mesh import Mesh
from mixdist.report.gallery import draw
from mixdist.report.metrics import MetricsLog, Progress
from mixdist.training.checkpoint import CheckpointStore, checkpoints_in, load_mixture
from mixdist.training.loop import Loop, Program
from mixdist.training.selection import Selection, choose_checkpoint

SHOWN_S = 10.0
"""Seconds within which what one host writes must be seen by the others."""


def train(argv: Sequence[str]) -> None:
    """``mixdist train``: train, evaluate on held-out rows, draw; print a table."""
    parser = train_parser()
    resumed = _resumed(argv)
    first = ["--config", str(resumed / RESOLVED)] if resumed else []
    parsed = parse(parser, [*first, *argv])
    run_training(parsed, make_config(parser, parsed), resumed)


def run_training(
    parsed: Namespace,
    config: Config,
    resumed: Path | None = None,
    beside: Mapping[str, bytes] = {},
    then: Callable[[Session, Path], None] | None = None,
) -> None:
    """Train a run of a config; every rank calls it.

    Args:
        parsed: what the config was made of, with ``out``.
        config: the run.
        resumed: the directory of a run to go on with.
        beside: files that are written beside the run's own, by name.
        then: called with what was trained, and the run's directory, before the ranks part.
    """
    mesh = build_mesh(config, card("train", parsed))
    held: IO[str] | None = None
    try:
        with report_errors_once(mesh, "look at that rank's own messages, then go on with --resume"):
            session = build(config, mesh, tests=then is not None)
            with closing(session):
                # Before the run has a directory: what does not fit leaves nothing behind.
                if not resumed:
                    agreed(lambda: check_model(parsed), mesh.world)
                    session.mixture.start_experts(session.train)
                agreed(lambda: describe(config, session.train), mesh.world)
                program = agreed(lambda: build_program(config, session, fresh=not resumed), mesh.world)
                if not resumed:
                    program.begin()
                selection = agreed(lambda: build_selection(config, session, program), mesh.world)
                if selection is not None:
                    program.ready()
                    selection.try_out()
                run = Path(on_rank_0(lambda: _directory(parsed, resumed), mesh))
                held = _hold(run, mesh, fresh=not resumed)
                for name, (value, _) in session.mixture.choices().items():
                    if name in parsed.mixture.init_args:  # a family of one's own may have another constructor
                        parsed.mixture.init_args[name] = value  # what was chosen here: the run goes on with it
                for name, data in beside.items() if mesh.rank == 0 else ():
                    write_file(run / name, data)
                try:
                    loop = _train(config, session, program, selection, run, dump(parsed), bool(resumed))
                    _conclude(config, session, loop, run)
                    if then is not None:
                        then(session, run)
                except KeyboardInterrupt:
                    raise KeyboardInterrupt(_remedy(run, "mixdist train --resume")) from None
    finally:
        if held is not None:
            held.close()


def _tell_start(mixture: Mixture) -> None:
    """Say how large a part of an expert trains, where that is not all."""
    experts = list(mixture.parts.experts.values())
    said = mixture.expert_start.told(experts[0]) if experts and mixture.expert_start is not None else ""
    if said:
        print(f"mixdist: {said}", file=sys.stderr, flush=True)


def train_parser() -> ArgumentParser:
    """Make the parser of ``mixdist train``."""
    parser = config_parser(
        "mixdist train",
        "Train a mixture, in one process or, one process a rank, under torchrun, deepspeed or srun. Every key below is "
        "a key of the YAML file and, dotted, an option. A class is chosen by class_path, its arguments stand under "
        "init_args; a class of your own is named by its import path. "
        "Example: torchrun --standalone --nproc-per-node 2 -m mixdist train --config configs/digits_moe.yaml "
        "--train.epochs 5 --mixture.expert.latent 16",
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


def _hold(run: Path, mesh: Mesh, fresh: bool) -> IO[str] | None:
    """Lock the run for this process and those with it: two that write one record would destroy it."""
    held: list[IO[str]] = []

    def lock() -> str:
        held.append(hold(run / ".lock"))
        return (run / ".lock").read_text()

    who = on_rank_0(lock, mesh)
    try:
        agreed(lambda: _check_shared(run, who), mesh.world)
    except ValueError:
        for file in held:
            file.close()
            if fresh:
                (run / ".lock").unlink()
                with suppress(OSError):
                    run.rmdir()
        raise
    return held[0] if held else None


def _check_shared(run: Path, who: str) -> None:
    """Check that this rank sees what rank 0 has written in the run's directory; some storage is slow to show it."""
    deadline = time.monotonic() + SHOWN_S
    while True:
        with suppress(OSError):
            if (run / ".lock").read_text() == who:
                return
        if time.monotonic() > deadline:
            raise ValueError(
                f"{run.absolute()} is not the directory that rank 0 has as {run}: put runs on storage that all ranks "
                f"share, and start all in the same working directory"
            )
        time.sleep(0.1)


def _remedy(run: Path, go_on: str) -> str:
    """Say how a run that has ended goes on: from its checkpoint, or anew."""
    if checkpoints_in(run / "checkpoints"):
        return f"go on with {go_on} {run}"
    return f"it has no checkpoint yet, so remove {run} and start it again"


def _directory(parsed: Namespace, resumed: Path | None) -> str:
    """Return the run's directory, which is there then."""
    if resumed is None:
        return str(new_directory(parsed.out, Path(str(parsed.config[-1])).stem if parsed.config else "run"))
    if parsed.out and Path(parsed.out).resolve() != resumed.resolve():
        raise ValueError(f"--out {parsed.out} differs from --resume {resumed}: a run goes on in its own directory")
    return str(resumed)


def new_directory(out: str | None, stem: str) -> Path:
    """Make the directory of a new run: the one given, or one of a stem under runs/.

    Raises:
        ValueError: it holds a run already, or cannot be made.
    """
    try:
        if out:
            check_unused(Path(out))
            Path(out).mkdir(parents=True, exist_ok=True)
            return Path(out)
        Path("runs").mkdir(exist_ok=True)
        for number in count(1):
            with suppress(FileExistsError):
                (run := Path("runs") / f"{stem}-{number}").mkdir()
                return run
    except OSError as error:
        raise ValueError(f"the run's directory cannot be made ({error}): name another with --out") from None
    raise AssertionError("numbers do not end")


def check_unused(run: Path) -> None:
    """Check that a directory holds no run.

    Raises:
        ValueError: it does.
    """
    if (run / RESOLVED).exists() and (run / ABOUT).exists():
        raise ValueError(f"--out {run} holds a baseline already: remove it, or name another directory")
    if any((run / name).exists() for name in (RESOLVED, "checkpoints", "metrics.jsonl")):
        again = _remedy(run, "--resume")
        raise ValueError(f"--out {run} holds a run already: {again}, or name another directory")


def _train(
    config: Config,
    session: Session,
    program: Program,
    selection: Selection | None,
    run: Path,
    resolved: str,
    resumed: bool,
) -> Loop:
    mesh, rank0 = session.mesh, session.mesh.rank == 0
    store = CheckpointStore(run / "checkpoints", mesh, config.checkpoint.keep)
    about, every = describe(config, session.train), config.checkpoint.every
    loop = Loop(program, mesh, about, store, every, directory=run, selection=selection)
    if resumed:
        _resume(loop, store)
    if rank0:
        write_file(run / RESOLVED, resolved.encode())
        log = MetricsLog(run, program.total if resumed else None)
        bar = Progress(program.total_steps, program.total, sys.stderr.isatty())
        loop.recorders, loop.tell = [log, bar], bar.tell
        _tell_start(session.mixture)
    try:
        loop.fit()
    finally:
        for recorder in loop.recorders:
            recorder.close()
    return loop


def _resume(loop: Loop, store: CheckpointStore) -> None:
    """Go to the newest good checkpoint, all ranks or none."""
    checkpoint, passed_over = store.choose()
    for sentence in passed_over if store.mesh.rank == 0 else ():
        print(f"mixdist: {sentence}; going back to {checkpoint.name}", file=sys.stderr, flush=True)
    agreed(lambda: loop.resume(checkpoint), store.mesh.world)
    store.set_aside_after(checkpoint)


def _conclude(config: Config, session: Session, loop: Loop, run: Path) -> None:
    """Evaluate the best checkpoint on validation rows, where there are some, else on test rows; draw and print."""
    mixture, kept = session.mixture, _restore_best(loop)
    if not mixture.has_figures:
        if session.mesh.rank == 0:
            print(f"{type(mixture).__name__} has no figures: it has no measure method\nrun: {run}", flush=True)
        return
    rows = session.split(session.watched)
    evaluation = evaluate(mixture, rows, config.test_batch_size, config.seed, shares_from=session.train)
    picture = draw(mixture, rows, evaluation, run, config.seed) if config.pictures else None
    if session.mesh.rank == 0:
        chosen = [f"   {name}: {value} ({why})" for name, (value, why) in mixture.choices().items() if why]
        shown = f"   picture: {picture}" if picture else ""
        print(summary(evaluation, session.watched))
    if config.train.ema is not None:
        _evaluate_averages(config, session, loop)
    if session.mesh.rank == 0:
        print(f"run: {run}{kept}{''.join(chosen)}{shown}", flush=True)


def _evaluate_averages(config: Config, session: Session, loop: Loop) -> None:
    """Evaluate the averages of weights of the same checkpoint, and print their figures; then put the weights back."""
    assert loop.store is not None
    mixture, world, (checkpoint, _) = session.mixture, session.mesh.world, choose_checkpoint(loop.store)
    rows = session.split(session.watched)
    agreed(lambda: load_mixture(checkpoint, mixture, ema=True), world)
    found = evaluate(mixture, rows, config.test_batch_size, config.seed, shares_from=session.train)
    if session.mesh.rank == 0:
        print(
            figures_of(
                found, f"averages of weights (ema {config.train.ema}), {len(rows)} {KINDS[session.watched]} rows"
            )
        )
    agreed(lambda: load_mixture(checkpoint, mixture), world)


def _restore_best(loop: Loop) -> str:
    """Put the best checkpoint's weights in place of the last ones; return which it is, in words."""
    selection, store = loop.selection, loop.store
    if selection is None or store is None:
        return ""
    early = ", ended early" if selection.stopped else ""
    if selection.found.step is None:
        return f"   checkpoint: the newest ({selection.monitor} on validation rows has no finite value yet{early})"
    checkpoint, passed_over = choose_checkpoint(store)
    for sentence in passed_over if store.mesh.rank == 0 else ():
        print(f"mixdist: {sentence}; using {checkpoint.name}", file=sys.stderr, flush=True)
    agreed(lambda: load_mixture(checkpoint, selection.mixture), store.mesh.world)
    return f"   checkpoint: {checkpoint.name} (best {selection.monitor} {selection.found.value:.4f}{early})"
