"""Rank heartbeats in the rendezvous store, used to name dead ranks.

A failed collective does not say which rank failed, and a rank that waits elsewhere may learn of it much later. The
heartbeat runs in a thread beside the work: it stops when the process stops, and only then.
"""

from __future__ import annotations

import threading
import time
from typing import Any

BEAT_S = 1.0
PATIENCE_S = 6.0


class Heartbeat:
    """The heartbeat of one rank.

    Args:
        store: the store of torch.distributed, shared by all ranks.
        rank: this rank.
        world_size: the number of ranks.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.heard = False  # some rank has started to look for dead ranks
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(store.clone(),), daemon=True, name="mixdist-heartbeat")
        self._thread.start()

    def stop(self) -> None:
        """Stop the heartbeat when this rank ends normally."""
        self._stop.set()
        self._thread.join(BEAT_S)  # a process that ends inside a call of the store is aborted

    def missing(self) -> tuple[list[int], bool]:
        """Return, after a collective failed, which ranks are dead, and whether this rank should report it."""
        asked = False
        try:
            self.store.set("mixdist/asked", "1")
            before = self._beats()
            asked = True
            time.sleep(PATIENCE_S)
            after = self._beats()
            still = [rank for rank in range(self.world_size) if rank != self.rank and before[rank] == after[rank]]
            return still, self.store.add("mixdist/told", 1) == 1
        except RuntimeError:
            # Without a launcher the store is in rank 0, which is dead or has reported (it waits until all have read).
            return [0], self.rank == 1 and not (asked or self.heard)

    def _beats(self) -> list[bytes]:
        keys = [f"mixdist/heartbeat/{rank}" for rank in range(self.world_size)]
        return [self.store.get(key) if self.store.check([key]) else b"" for key in keys]

    def _run(self, store: Any) -> None:
        beat = 0
        try:
            while not self._stop.wait(BEAT_S if beat else 0.0):
                beat += 1
                store.set(f"mixdist/heartbeat/{self.rank}", str(beat))
                self.heard = self.heard or store.check(["mixdist/asked"])
        except RuntimeError:
            return  # the store is gone, and with it the run
