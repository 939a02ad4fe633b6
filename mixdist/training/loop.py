"""The training loop: one for every family, with one save and one resume."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from mixdist.files import write_file
from mixdist.parallel.agreement import on_rank_0
from mixdist.parallel.mesh import Mesh
from mixdist.training.checkpoint import CheckpointStore, Saved, read_state
from mixdist.training.resume import check_run
from mixdist.training.selection import Selection


class Recorder(Protocol):
    """Receives each record, on rank 0."""

    def write(self, record: dict[str, Any]) -> None:
        """Keep one record."""

    def close(self) -> None:
        """Finish."""


class Advance(NamedTuple):
    """What one step of a program leaves; the same on every rank, but for the contents of files.

    Args:
        ended: an epoch, a phase or a round ended.
        record: for metrics.jsonl, or None.
        line: for the console, or None.
        files: to be written under the run's directory, by relative path; their bytes are those of rank 0.
        selectable: an epoch of the main phase or a round ended: the mixture may be evaluated for a selection.
    """

    ended: bool
    record: dict[str, Any] | None = None
    line: str | None = None
    files: Mapping[str, bytes] = {}
    selectable: bool = False


class Program(Protocol):
    """What advances training: steps on global batches (Trainer), or epochs and rounds of a competition (Rounds)."""

    @property
    def total(self) -> int:
        """Steps done, which number checkpoints and records."""

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""

    def begin(self) -> None:
        """Prepare to go on from the position; every rank calls it."""

    def advance(self) -> Advance:
        """Do the next step; every rank calls it."""

    def ready(self) -> None:
        """Put the modules as they are now in place for an evaluation between two steps; every rank calls it."""

    def end(self) -> None:
        """Put the trained modules in place after the last step; every rank calls it."""

    def save(self) -> Saved:
        """Return what a checkpoint holds; every rank calls it."""

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Take modules, optimisers and position from a checkpoint, whatever layout wrote it.

        Raises:
            ValueError: it does not fit the config.
        """


class Loop:
    """Runs a program to its end; every rank has one.

    Args:
        program: what advances.
        mesh: this rank's place.
        described: what a checkpoint says of the run, to be the same on resume.
        store: where checkpoints go; None for none.
        save_every: steps between checkpoints; None for one whenever an epoch, phase or round ended.
        recorders: receive each record, on rank 0.
        tell: receives lines for the console, on rank 0.
        directory: of the run, for files that the program leaves; None for none.
        selection: chooses the best checkpoint and may end training; None for neither.
    """

    def __init__(
        self,
        program: Program,
        mesh: Mesh,
        described: dict[str, Any] | None = None,
        store: CheckpointStore | None = None,
        save_every: int | None = None,
        recorders: Sequence[Recorder] = (),
        tell: Callable[[str], None] = lambda line: None,
        directory: Path | None = None,
        selection: Selection | None = None,
    ) -> None:
        self.program, self.mesh, self.described = program, mesh, described or {}
        self.store, self.save_every, self.directory = store, save_every, directory
        self.recorders, self.tell = list(recorders), tell
        self.selection, self.saved = selection, -1

    def fit(self) -> None:
        """Run from the position to the end.

        Raises:
            NotFinite: a loss or gradient is not finite; names the expert.
            Agreed: the same in a competition, or something could not be written.
        """
        program = self.program
        program.begin()
        while not self.finished:
            advance = program.advance()
            self._report(advance)
            best = self._select() if advance.selectable else False
            due = program.total % self.save_every == 0 if self.save_every else advance.ended
            if due or best or self.finished:
                self.save()
        program.end()

    @property
    def finished(self) -> bool:
        """Whether the program has come to its end, or the selection ends it early."""
        return self.program.finished or (self.selection is not None and self.selection.stopped)

    def _select(self) -> bool:
        """Evaluate where it is time; return whether the mixture is the best so far."""
        selection, step = self.selection, self.program.total
        if selection is None or not selection.end_epoch():
            return False
        self.program.ready()
        self._report(Advance(True, selection.evaluate(step)))
        self.program.begin()  # what an evaluation takes and sends is not training's
        return selection.found.step == step

    def save(self) -> None:
        """Write a checkpoint of the position; every rank calls it."""
        total = self.program.total
        if self.store is None or self.saved == total:
            return
        saved, selection = self.program.save(), self.selection
        state = {**saved.state, "run": self.described}
        if selection is not None:
            state["selection"] = selection.state()
        self.store.save(total, saved._replace(state=state), selection.found.step if selection else None)
        self.saved = total

    def resume(self, path: Path) -> None:
        """Go to the position of a checkpoint.

        Raises:
            ValueError: it belongs to another run.
        """
        state = read_state(path)
        check_run(path, state, self.described)
        if self.selection is not None:
            self.selection.load(path, state.get("selection"))
        self.program.load(path, state)
        self.saved = self.program.total

    def _report(self, advance: Advance) -> None:
        if self.mesh.rank == 0 and advance.record is not None:
            for recorder in self.recorders:
                recorder.write(advance.record)
        if self.directory is not None and advance.files:
            on_rank_0(lambda: self._write(advance.files), self.mesh)
        if self.mesh.rank == 0 and advance.line is not None:
            self.tell(advance.line)

    def _write(self, files: Mapping[str, bytes]) -> None:
        assert self.directory is not None
        for name, data in files.items():
            path = self.directory / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, data)
            except OSError as error:
                raise ValueError(f"{path} cannot be written ({error}): free space, then go on with --resume") from None


def peak_memory(device: torch.device) -> int:
    """Return the most memory held so far, bytes: allocated on a CUDA device, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
