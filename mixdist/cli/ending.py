"""How a command ends: what a user can fix is told in one line, once, and no rank waits for another."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mixdist.engines import NotFinite
from mixdist.messages import SingleRankError, format_error, one_line
from mixdist.parallel.agreement import Agreed
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import LostRank


@contextmanager
def report_errors_once(mesh: Mesh, remedy: str) -> Iterator[None]:
    """Do what ranks do together; whatever ends it is told once, and the mesh is closed.

    Args:
        mesh: of this rank.
        remedy: what to do where a rank is lost.

    Raises:
        Agreed: what every rank knows.
        SingleRankError: what this rank met by itself.
    """
    try:
        yield
    except LostRank as lost:
        _leave(mesh, lost, remedy)
    except (Agreed, NotFinite):
        raise
    except (ValueError, OSError) as error:
        raise SingleRankError(
            f"rank {mesh.rank}: {format_error(error)}" if mesh.world_size > 1 else format_error(error)
        ) from error
    finally:
        mesh.close()


def _leave(mesh: Mesh, lost: LostRank, remedy: str) -> None:
    """Name the ranks that do not answer, once, and end this one; a launcher may end all first and tell by itself."""
    missing, speaks = mesh.missing()
    if speaks:
        who = f"rank {', '.join(map(str, missing))} does not answer" if missing else "a collective failed on every rank"
        limit = f"mesh.timeout_s is {mesh.timeout.total_seconds():g}"
        print(f"mixdist: {who} ({one_line(str(lost))}; {limit}): {remedy}", file=sys.stderr, flush=True)
    os._exit(1)  # groups that lost a member cannot be ended in good order
