"""What a competition leaves behind of each round: records, lines, tables.

Shape letters: E all experts.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixdist.competition.entrant import Entrant
from mixdist.competition.table import Assignment
from mixdist.files import write_file
from mixdist.parallel.agreement import agree, gather_json
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Wire
from mixdist.training.loop import Recorder, peak_memory


class History:
    """Keeps time and writes down what happens, for all ranks together.

    Args:
        mesh: this rank's place.
        wire: its meter is read and reset with each record.
        recorders: receive the records, on rank 0.
        tell: receives a line for each round, on rank 0.
        tables: the folder for each round's table; None for none.
    """

    def __init__(
        self,
        mesh: Mesh,
        wire: Wire,
        recorders: Sequence[Recorder] = (),
        tell: Callable[[str], None] = lambda line: None,
        tables: Path | None = None,
    ) -> None:
        self.mesh, self.wire, self.recorders, self.tell, self.tables = mesh, wire, list(recorders), tell, tables
        self.seconds_a_row: float | None = None
        self.reset()

    def reset(self) -> None:
        """Begin to count anew."""
        self.seconds: dict[str, float] = {}
        self.wire.meter.reset(timed=False)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds that something takes on this rank."""
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def record(self, fields: dict[str, Any], entrants: Mapping[int, Entrant]) -> dict[str, Any]:
        """Hand a record to the recorders, with each expert's loss, the times and the bytes since the last one.

        Times are those of the slowest rank. Every rank calls it, and gets the record.
        """
        meter = self.wire.meter
        own = {
            "seconds": self.seconds,
            "bytes": [meter.wire_bytes, meter.wire_bytes_min, meter.sync_bytes],
            "peak": peak_memory(self.mesh.device),
            "rows": sum(entrant.rows for entrant in entrants.values()),
            "experts": {e: [entrant.loss, entrant.judge_loss, entrant.loss_rows] for e, entrant in entrants.items()},
        }
        told = gather_json(own, self.mesh.world)
        seconds = {name: max(t["seconds"].get(name, 0.0) for t in told) for name in told[0]["seconds"]}
        by_expert = {int(e): losses for t in told for e, losses in t["experts"].items()}
        busiest = max(t["rows"] for t in told)
        if busiest:
            self.seconds_a_row = seconds.get("experts_s", 0.0) / busiest
        names = ("wire_bytes", "wire_bytes_min", "sync_bytes")
        losses_E, judges_E, rows_E = zip(*(by_expert[e] for e in sorted(by_expert)), strict=True)
        total = sum(loss * rows for loss, rows in zip(losses_E, rows_E, strict=True) if loss is not None)
        record = {
            **fields,
            "loss": _finite(total / sum(rows_E)) if sum(rows_E) else None,
            "expert_loss": [_finite(loss) for loss in losses_E],
            "discriminator_loss": [_finite(loss) for loss in judges_E],
            **{name: sum(t["bytes"][i] for t in told) for i, name in enumerate(names)},
            **seconds,
            "peak_memory_bytes": max(t["peak"] for t in told),
        }
        for recorder in self.recorders if self.mesh.rank == 0 else ():
            recorder.write(record)
        for entrant in entrants.values():
            entrant.rows = 0
        self.reset()
        return record

    def round(self, table: Assignment, record: dict[str, Any]) -> None:
        """Put a round's table into the run and tell of it; every rank calls it.

        Raises:
            Agreed: the table cannot be written.
        """
        error = None
        if self.mesh.rank == 0 and self.tables is not None:
            try:
                write_table(self.tables, table)
            except OSError as mistake:
                error = f"{self.tables} cannot be written ({mistake}): free space, then go on with --resume"
        agree(gather_json(error, self.mesh.world)[0], self.mesh.world)
        if self.mesh.rank == 0:
            self.tell(in_words(record))


def write_table(folder: Path, table: Assignment) -> Path:
    """Write a round's table and what it is: ``round-0003.npy`` and ``round-0003.json``; give the former."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"round-{table.round:04d}.npy"
    write_file(path, table.to_bytes())
    write_file(path.with_suffix(".json"), json.dumps(table.describe(), indent=2).encode())
    return path


def in_words(record: Mapping[str, Any]) -> str:
    """Say in a line what a round did."""
    counts, changed, starved_experts = record["counts"], record["changed"], record["starved"]
    line = f"round {record['round']}: {' '.join(map(str, counts))} rows"
    line += "" if changed is None else f", {changed:.2%} moved"
    line += "" if record["objective"] is None else f", objective {record['objective']:.4f}"
    line += " (it rose in training)" if record["objective_rose"] else ""
    done = {"none": "", "freeze": " and does not train", "reseed": " and starts anew with the samples modelled worst"}
    for e in starved_experts:
        line += f"; expert {e} is starved{done[record['starved_rule']]}"
    return line


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
