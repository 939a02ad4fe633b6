"""The pool of ranks: what goes wrong in one call is told, and the next call has ranks of its own."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.pool import Pool


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.close()


def summed() -> tuple[float, int]:
    """Return the sum of 1 over ranks, and this process."""
    one = torch.ones(1)
    dist.all_reduce(one)
    return one.item(), os.getpid()


def ones(count: int) -> list[torch.Tensor]:
    return [torch.ones(2) for _ in range(count)]


def killed(rank: int) -> float:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return summed()[0]


def broken(rank: int) -> None:
    assert dist.get_rank() != rank, "no such rank"


def hanging(rank: int) -> None:
    time.sleep(600 if dist.get_rank() == rank else 0)


def test_a_rank_that_is_killed_hangs_or_raises_fails_its_own_case_alone(pool: Pool) -> None:
    first = pool.run(f"{__name__}:summed")
    assert [total for total, _ in first] == [2.0, 2.0]
    assert pool.run(f"{__name__}:summed") == first, "the ranks stay as long as nothing fails"
    for function, limit_s, message in (
        ("killed", 100.0, "rank 1 of 2: ended with exit code -9"),
        ("broken", 100.0, "no such rank"),
        ("hanging", 0.5, f"rank 1 of 2: did not answer {__name__}:hanging in 0.5 s"),
    ):
        before = pool.run(f"{__name__}:summed")
        pool.limit_s = limit_s
        with pytest.raises(AssertionError, match=message):
            pool.run(f"{__name__}:{function}", 1)
        pool.limit_s = 100.0
        after = pool.run(f"{__name__}:summed")
        assert [total for total, _ in after] == [2.0, 2.0]
        assert not {pid for _, pid in before} & {pid for _, pid in after}


def test_a_rank_that_dies_between_two_calls_is_replaced(pool: Pool) -> None:
    pool.run(f"{__name__}:summed")
    pool.processes[0].kill()
    pool.processes[0].wait()
    assert [total for total, _ in pool.run(f"{__name__}:summed")] == [2.0, 2.0]


def test_an_interrupt_leaves_no_answer_behind(pool: Pool) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    pool.run(f"{__name__}:summed")
    known = signal.signal(signal.SIGUSR1, interrupt)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()  # as pytest-timeout does, by another signal
    with pytest.raises(KeyboardInterrupt):
        pool.run(f"{__name__}:hanging", 0)
    signal.signal(signal.SIGUSR1, known)
    assert [total for total, _ in pool.run(f"{__name__}:summed")] == [2.0, 2.0]


def test_tensors_answered_hold_no_descriptors(pool: Pool) -> None:
    """A cache of results is kept for the whole session, and the limit of open files may be 1,024."""
    pool.run(f"{__name__}:ones", 1)
    before = len(os.listdir("/proc/self/fd"))
    answers = pool.run(f"{__name__}:ones", 50)
    assert len(os.listdir("/proc/self/fd")) <= before
    assert all(torch.equal(one, torch.ones(2)) for answer in answers for one in answer)
