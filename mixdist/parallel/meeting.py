"""How ranks meet: in the rendezvous store, where each compares what it was started with against rank 0's.

Nothing here depends on what may differ. Rank 0 writes its card, every other rank reads it and agrees or complains, and
rank 0 writes the verdict, which all wait for. A rank that cannot come, because it found a mistake of its own, complains
too, so that the others end with it. Keys of the store, under one prefix a meeting:

    here/RANK   how many processes came as this rank
    card        what rank 0 was started with
    agreed      how many ranks were started with the same
    complaint   the first complaint
    verdict     a complaint, or the empty one
    seen        how many know a bad verdict
    told, left  rank 0 has printed it; how many know that and are done with the store
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, NamedTuple, cast

from torch.distributed import TCPStore

from mixdist.messages import USER_ERROR, SharedError, SingleRankError, one_line, report
from mixdist.parallel.identity import difference
from mixdist.parallel.launch import Launch, has_launcher
from mixdist.parallel.store import POLL_S, connect

PATIENCE_S = 20.0
"""Seconds for which a rank that ends early tries to tell the others; those that start together come within them."""
LINGER_S, LEAVE_S = 10.0, 3.0
"""Seconds that other ranks wait at most for rank 0 to print an error before they exit, since a launcher ends all
processes when one fails; and rank 0 for them to know."""


class Complaint(NamedTuple):
    """Why the ranks cannot go on; with an empty text, that they can.

    Args:
        text: the reason.
        rank: that ended before all had met, as its environment has it; None where all know the reason.
    """

    text: str = ""
    rank: str | None = None


class Meeting:
    """This rank's part in a meeting of all ranks.

    Args:
        launch: this rank.
        limit_s: seconds to wait for the store.

    Attributes:
        last: the last meeting of this process.
        reachable: whether a store was found, or none was looked for.
        over: whether all ranks have met and agreed.

    Raises:
        ValueError: there is no store to meet in.
    """

    last: ClassVar[Meeting | None] = None
    reachable: ClassVar[bool] = True

    def __init__(self, launch: Launch, limit_s: float) -> None:
        last = Meeting.last
        self.launch, self.over = launch, False
        self.number: int = 0 if last is None else last.number + 1
        Meeting.reachable = last is not None
        self.store: TCPStore = connect(launch, limit_s) if last is None else last.store
        Meeting.reachable = True
        # The agent's store outlives a restart of its ranks.
        self.prefix = f"mixdist/meeting/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{self.number}"
        Meeting.last = self

    def agree(self, card: Mapping[str, Any], limit_s: float) -> None:
        """Wait for all ranks and compare their cards.

        Args:
            card: what this rank was started with, JSON by name; the first name whose value differs is reported.
            limit_s: seconds to wait.

        Raises:
            SharedError: a rank was started with something else, or did not come.
            SingleRankError: another rank ended early, or this one is none of theirs.
            ValueError: another process has this rank.
        """
        rank = self.launch.rank
        if self._count(f"here/{rank}", 1) > 1:
            raise ValueError(
                f"RANK ({rank}) is taken: another process has come as rank {rank} of {self.launch.world_size}; give "
                f"each process a RANK of its own"
            )
        card = dict(json.loads(json.dumps(card)))
        deadline = time.monotonic() + limit_s
        try:
            own = self._decide(card, deadline, limit_s) if rank == 0 else self._join(card, deadline, limit_s)
            self._wait("verdict", time.monotonic() + PATIENCE_S)
            verdict = self._verdict()
        except RuntimeError:
            raise SingleRankError(
                f"rank {rank}: rank 0 ended before all ranks had met: look at its own messages, then start all again"
            ) from None
        if verdict is None:
            raise SingleRankError(own.text)
        if verdict.text:
            raise self._error(verdict)
        if own.text:  # the others go on without this process
            raise SingleRankError(own.text)
        self.over = True

    def _error(self, verdict: Complaint) -> ValueError:
        """Return what a verdict is on this rank; rank 0 stays until those that came know it: it may be their store."""
        self._count("seen", 1)
        if self.launch.rank == 0:
            limit_s = LINGER_S if verdict.rank is None else LEAVE_S  # who ended early reads nothing more
            self._until("seen", self.launch.world_size - len(self._missing()), limit_s)
        if verdict.rank is None:
            return SharedError(verdict.text)
        if has_launcher():
            return SharedError(f"rank {verdict.rank}: {verdict.text}")
        return SingleRankError(f"rank {verdict.rank} ended before all ranks had met: {verdict.text}")

    def _decide(self, card: Mapping[str, Any], deadline: float, limit_s: float) -> Complaint:
        """Write the card and, when all have agreed or one complains, the verdict."""
        self._write("card", card)
        self._count("agreed", 1)
        verdict = None
        while verdict is None:
            if self._has("complaint"):
                verdict = Complaint(*self._read("complaint"))
            elif self._count("agreed", 0) == self.launch.world_size:
                verdict = Complaint()
            elif time.monotonic() > deadline:
                verdict = Complaint(self._absent(limit_s))
            else:
                time.sleep(POLL_S)
        self._write("verdict", verdict)
        return verdict

    def _join(self, card: Mapping[str, Any], deadline: float, limit_s: float) -> Complaint:
        """Agree with rank 0's card or complain, and wait for the verdict; return the complaint."""
        if not self._wait("card", deadline):
            return self._complain(Complaint(self._absent(limit_s)))
        first = self._read("card")
        differs = None if first is None else difference(first, card, self.launch.rank)
        if differs is not None:
            return self._complain(Complaint(differs))
        self._count("agreed", 1)
        if not self._wait("verdict", deadline):
            return self._complain(Complaint(self._absent(limit_s)))
        return Complaint()

    def _absent(self, limit_s: float) -> str:
        """Return which ranks did not come."""
        absent = self._missing()
        who = f"rank {', '.join(map(str, absent))} did not come" if absent else "a rank came and did not answer"
        where = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        return (
            f"{who} within mesh.timeout_s ({limit_s:g}): start all {self.launch.world_size} ranks, with the same "
            f"mixdist, MASTER_ADDR and MASTER_PORT ({where}), and look at their own messages"
        )

    def give_up(self, text: str, wait: bool) -> Complaint | None:
        """Tell the others that this rank does not come; return the verdict if it is there or waited for."""
        if self.launch.rank == 0:
            self._write("verdict", Complaint(text, "0"))
            self._write("card", None)
            self._write("told", True)
            self._until("seen", self.launch.world_size - 1, PATIENCE_S * wait)
            return self._verdict()
        self._complain(Complaint(text, os.environ.get("RANK", str(self.launch.rank))))
        if wait and self._wait("verdict", time.monotonic() + PATIENCE_S):
            self._count("seen", 1)
        return self._verdict()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Make process groups; end this process if another rank cannot, for which it would wait inside the backend.

        Raises:
            SingleRankError: this rank cannot.
        """
        made, rank = threading.Event(), self.launch.rank
        threading.Thread(
            target=self._watch, args=(cast(Any, self.store).clone(), made), daemon=True, name="mixdist-watch"
        ).start()
        try:
            yield
        except RuntimeError as error:
            text = f"no process group can be made ({one_line(str(error))}): look at the network of that rank's host"
            self._complain(Complaint(text, str(rank)))
            raise SingleRankError(f"rank {rank}: {text}") from None
        finally:
            made.set()

    def _watch(self, store: Any, made: threading.Event) -> None:
        try:
            while not made.wait(10 * POLL_S) and not store.check([f"{self.prefix}/complaint"]):
                pass
        except RuntimeError:
            return
        if not made.is_set():
            text, rank = json.loads(store.get(f"{self.prefix}/complaint"))
            if not has_launcher():
                report(f"rank {rank}: {text}")
            time.sleep(1.0)  # a launcher ends all with the first
            os._exit(USER_ERROR)

    def tell(self) -> bool:
        """Say on rank 0 that it has printed the error; wait on another until it has, or has ended.

        Rank 0 stays until the others are done with the store, which may end with it.

        Returns:
            whether it is printed; not so on one rank where rank 0 does not know the error: that one must print it.
        """
        with suppress(RuntimeError):  # the store went with rank 0
            if self.launch.rank == 0:
                self._write("told", True)
                self._until("left", self.launch.world_size - len(self._missing()) - 1, LEAVE_S)
            else:
                told = self._wait("told", time.monotonic() + LINGER_S)
                self._count("left", 1)
                if not told and self._count("tells", 1) == 1:
                    return False
                if not told:
                    time.sleep(1.0)  # another prints it now, and a launcher ends all with the first
        return True

    def _missing(self) -> list[int]:
        return [rank for rank in range(self.launch.world_size) if not self._has(f"here/{rank}")]

    def _until(self, key: str, number: int, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while self._count(key, 0) < number and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def _complain(self, complaint: Complaint) -> Complaint:
        self.store.compare_set(f"{self.prefix}/complaint", "", json.dumps(complaint))  # the first one stands
        return complaint

    def _verdict(self) -> Complaint | None:
        return Complaint(*self._read("verdict")) if self._has("verdict") else None

    def _has(self, key: str) -> bool:
        return bool(self.store.check([f"{self.prefix}/{key}"]))

    def _read(self, key: str) -> Any:
        return json.loads(self.store.get(f"{self.prefix}/{key}"))

    def _write(self, key: str, value: Any) -> None:
        self.store.set(f"{self.prefix}/{key}", json.dumps(value))

    def _count(self, key: str, by: int) -> int:
        return int(self.store.add(f"{self.prefix}/{key}", by))

    def _wait(self, key: str, deadline: float) -> bool:
        """Return whether a key came before the deadline; a wait inside the store would not be interrupted."""
        while not (found := self._has(key)) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return found


def end_early(text: str, launch: Launch | None, printed: bool = False) -> None:
    """Report a mistake of this rank, found before all ranks had met, and tell the others.

    A launcher's ranks report one mistake once. Ranks started by hand have terminals of their own: each reports.

    Args:
        text: the mistake.
        launch: this rank; None where its environment is the mistake.
        printed: it is reported already.
    """
    first, launched = launch is not None and launch.rank == 0, has_launcher()
    own = text if first or launch is None else f"rank {launch.rank}: {text}"
    aloud = printed or first or launch is None or not launched
    if aloud and not printed:
        report(own)
    verdict = meeting = None
    with suppress(ValueError, RuntimeError, KeyboardInterrupt):
        meeting = Meeting.last
        if (meeting is None or meeting.over) and Meeting.reachable:
            meeting = Meeting(launch or Launch(1, 2), PATIENCE_S)
        if meeting is not None and not meeting.over:
            verdict = meeting.give_up(text, wait=first or launched)
    if aloud or meeting is None:
        return
    if verdict is None or verdict.text != text:
        report(own)
    else:
        meeting.tell()


def interrupt() -> None:
    """Tell the others that this rank was interrupted before all had met."""
    if Meeting.last is not None and not Meeting.last.over:
        with suppress(RuntimeError):
            Meeting.last.give_up("interrupted", wait=False)
