"""Per-round records of a competition: metrics, the console line, the assignment table.

Shape letters: E all experts.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mixdist.competition.entrant import Entrant
from mixdist.competition.reassign import Verdict
from mixdist.competition.table import Assignment
from mixdist.parallel.agreement import gather_json
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Wire
from mixdist.training.loop import peak_memory


class History:
    """Per-round records: seconds, bytes and losses, for all ranks together.

    Args:
        mesh: this rank's place.
        wire: its meter is read and reset with each record.
    """

    def __init__(self, mesh: Mesh, wire: Wire) -> None:
        self.mesh, self.wire = mesh, wire
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
        """Return a record with each expert's loss, the times and the bytes since the last one; every rank calls it.

        Times are those of the slowest rank.
        """
        meter = self.wire.meter
        own = {
            "seconds": self.seconds,
            "bytes": [meter.wire_bytes, meter.wire_bytes_min, meter.sync_bytes],
            "peak": peak_memory(self.mesh.device),
            "rows": sum(entrant.rows for entrant in entrants.values()),
            "experts": {
                e: [entrant.loss, entrant.discriminator_loss_mean, entrant.loss_rows] for e, entrant in entrants.items()
            },
        }
        gathered = gather_json(own, self.mesh.world)
        seconds = {name: max(t["seconds"].get(name, 0.0) for t in gathered) for name in gathered[0]["seconds"]}
        by_expert = {int(e): losses for t in gathered for e, losses in t["experts"].items()}
        busiest = max(t["rows"] for t in gathered)
        if busiest:
            self.seconds_a_row = seconds.get("experts_s", 0.0) / busiest
        names = ("wire_bytes", "wire_bytes_min", "sync_bytes")
        losses_E, discriminators_E, rows_E = zip(*(by_expert[e] for e in sorted(by_expert)), strict=True)
        total = sum(loss * rows for loss, rows in zip(losses_E, rows_E, strict=True) if loss is not None)
        record = {
            **fields,
            "loss": _finite(total / sum(rows_E)) if sum(rows_E) else None,
            "loss_rows": sum(rows_E),
            "expert_loss": [_finite(loss) for loss in losses_E],
            "discriminator_loss": [_finite(loss) for loss in discriminators_E],
            **{name: sum(t["bytes"][i] for t in gathered) for i, name in enumerate(names)},
            **seconds,
            "peak_memory_bytes": max(t["peak"] for t in gathered),
        }
        for entrant in entrants.values():
            entrant.rows = 0
        self.reset()
        return record


def objectives(
    verdict: Verdict, entropies: tuple[float, float], by_shares: bool, last: float | None
) -> tuple[dict[str, Any], float | None]:
    """Return what a record tells of the objective, and what the next one is to be compared with.

    Args:
        verdict: has F with the new table and with the one that experts trained on.
        entropies: H(alpha) of the two tables, nats.
        by_shares: every half-step is to lower F + H(alpha) (seed document 004, equation 3) instead of F (equation 6).
        last: what the round before returned.
    """
    after, before = verdict.objective, verdict.objective_before
    with_shares = None if after is None else after + entropies[0]
    lowered, trained = after, before
    if by_shares:
        lowered, trained = with_shares, None if before is None else before + entropies[1]
    rose = last is not None and trained is not None and trained > last + 1e-12 * abs(last)
    told = {
        "objective": after,
        "objective_trained": before,
        "objective_rose": rose,
        "share_entropy": entropies[0],
        "objective_with_shares": with_shares,
    }
    return told, lowered


def table_files(table: Assignment) -> dict[str, bytes]:
    """Return a round's table and what it is, as files: ``round-0003.npy`` and ``round-0003.json``."""
    name = f"assignments/round-{table.round:04d}"
    about = json.dumps(table.describe(), indent=2).encode()
    return {f"{name}.npy": table.to_bytes(), f"{name}.json": about}


def in_words(record: Mapping[str, Any]) -> str:
    """Return a line on what a round did."""
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
