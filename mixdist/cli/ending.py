"""How a command ends: what a user can fix is told in one line, once, and no rank waits for another."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from mixdist.messages import USER_ERROR, SharedError, SingleRankError, format_error, one_line, own_failure, report
from mixdist.parallel.launch import Launch, has_launcher
from mixdist.parallel.meeting import LINGER_S, Meeting, end_early
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import LostRank


@contextmanager
def report_errors_once(mesh: Mesh, remedy: str) -> Iterator[None]:
    """Do what ranks do together; whatever ends it is told once, and the mesh is closed.

    Args:
        mesh: of this rank.
        remedy: what to do where a rank is lost.

    Raises:
        SharedError: what every rank knows.
        SingleRankError: what this rank met by itself.
    """
    try:
        yield
    except LostRank as lost:
        _leave(mesh, lost, remedy)
    except SharedError:
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


def end_rank(error: Exception, launch: Launch | None, meets: bool) -> int:
    """Report what ends a command on one of several ranks; return the exit code.

    What all ranks know is reported by rank 0; what this one found after all had met, by this one; before, see
    ``end_early``. A traceback is printed of what is no error that a user can fix, which what fails in a user's own
    code is.

    Args:
        error: what ends it.
        launch: this rank; None where its environment is the mistake.
        meets: the command's ranks meet.
    """
    met = Meeting.last is not None and Meeting.last.over
    if not isinstance(error, (ValueError, OSError)) and (told := own_failure(error)):
        error = SingleRankError(f"rank {launch.rank}: {told}") if met and launch is not None else ValueError(told)
    if not isinstance(error, (ValueError, OSError)):
        traceback.print_exception(error)
        if meets and not met:
            end_early(f"{type(error).__name__}: {one_line(str(error))}", launch, printed=True)
        return 1
    text, first = format_error(error), launch is None or launch.rank == 0
    if isinstance(error, SharedError):
        if first:
            report(text)
        if Meeting.last is not None and not Meeting.last.tell():
            report(f"rank {Meeting.last.launch.rank}: {text}")
    elif isinstance(error, SingleRankError) or (not meets and (first or not has_launcher())):
        report(text)
    elif meets:
        end_early(text, launch)
    else:
        time.sleep(LINGER_S)  # rank 0 reports the same, and a launcher ends all processes with the first
    return USER_ERROR
