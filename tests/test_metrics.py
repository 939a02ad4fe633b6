"""The record of a run comes back as written, whatever interrupts it."""

from __future__ import annotations

import json
import math
import os
from contextlib import closing
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mixdist.report.metrics import MetricsLog, Progress, read_metrics, table

NUMBERS = [0.1, 1 / 3, -0.0, 5e-324, 1.7976931348623157e308, 123456789.12345678, math.pi]


def write_steps(directory: Path, *steps: int, resume_step: int | None = None) -> None:
    with closing(MetricsLog(directory, resume_step)) as log:
        for step in steps:
            log.write({"step": step, "loss": step / 3})


def steps_of(directory: Path) -> list[int]:
    return [record["step"] for record in read_metrics(directory)]


def events_of(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory / "tensorboard")).Reload()


def test_floats_come_back_exactly(tmp_path: Path) -> None:
    record = {"step": 7, "load": NUMBERS, "phase": "joint \u2713\nline", "mmd": None, "parts": {"kl": 1e-17}}
    with closing(MetricsLog(tmp_path)) as log:
        log.write(record)
    assert read_metrics(tmp_path) == [record]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [record]
    assert math.copysign(1, read_metrics(tmp_path)[0]["load"][2]) == -1


def test_a_line_is_there_before_the_log_is_closed(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    with closing(MetricsLog(tmp_path / "deep" / "run", resume_step=0)) as log:
        for step in range(3):
            log.write({"step": step})
            assert steps_of(tmp_path / "deep" / "run") == list(range(step + 1))


@pytest.mark.parametrize(("resume_step", "kept"), [(-1, []), (0, []), (3, [1, 2, 3]), (9, [1, 2, 3, 4, 5])])
def test_resuming_cuts_what_came_after(tmp_path: Path, resume_step: int, kept: list[int]) -> None:
    write_steps(tmp_path, 1, 2, 3, 4, 5)
    # TensorBoard reads its files in the order of the second in their names, and this test is done within one.
    for events in (tmp_path / "tensorboard").iterdir():
        events.rename(events.with_name("events.out.tfevents.0000000001.earlier"))
    write_steps(tmp_path, 10, resume_step=resume_step)
    assert steps_of(tmp_path) == [*kept, 10]
    write_steps(tmp_path / "whole", *kept, 10)
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "metrics.jsonl").read_bytes()
    assert [event.step for event in events_of(tmp_path).Scalars("loss")] == [*kept, 10]


def test_a_torn_last_line_is_dropped_wherever_it_tears(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    file = tmp_path / "metrics.jsonl"
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole) + 1):
        file.write_bytes(whole[:end])
        kept = [1, 2] if end >= len(whole) - 1 else [1]
        assert steps_of(tmp_path) == kept
    file.write_bytes(whole[:-3])
    write_steps(tmp_path, 2, resume_step=1)
    assert file.read_bytes() == whole


def test_a_damaged_line_before_the_last_is_named(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 3)
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes().replace(b'{"step": 2', b'\xff"step": 2'))
    for read in (lambda: read_metrics(tmp_path), lambda: MetricsLog(tmp_path, resume_step=3)):
        with pytest.raises(ValueError, match="line 2 is damaged"):
            read()


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failing_cut_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    write_steps(tmp_path, 1, 2, 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(OSError, match="no space left"):
            MetricsLog(tmp_path, resume_step=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    write_steps(tmp_path, resume_step=1)
    assert steps_of(tmp_path) == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_new_run_does_not_write_over_an_old_one(tmp_path: Path) -> None:
    write_steps(tmp_path, 1)
    with pytest.raises(ValueError, match="has a record of a run already"):
        MetricsLog(tmp_path)
    assert steps_of(tmp_path) == [1]


@pytest.mark.parametrize(
    "bad", [{"step": 2, "load": [1.0, math.nan]}, {"step": 2, "load": [1.0, -math.inf]}, {"a": 1}, {"step": 1.5}]
)
def test_a_record_without_step_or_with_what_is_not_finite_is_refused(tmp_path: Path, bad: dict[str, object]) -> None:
    with closing(MetricsLog(tmp_path)) as log:
        log.write({"step": 1, "load": [1.0, 2.0]})
        with pytest.raises(ValueError, match=r"load/expert-01 \(-?(nan|inf)\) at step 2|^step \("):
            log.write(bad)
        log.write({"step": 3})
    assert steps_of(tmp_path) == [1, 3]


def test_tensorboard_has_every_number_under_its_path(tmp_path: Path) -> None:
    with closing(MetricsLog(tmp_path)) as log:
        log.write({"step": 4, "loss": 0.5, "load": [3, 5], "bytes": {"sent": 7}, "kl": [[1.0, 2.0]], "phase": "joint"})
    events = events_of(tmp_path)
    expected = {"loss": 0.5, "load/expert-00": 3, "load/expert-01": 5, "bytes/sent": 7}
    expected |= {"kl/expert-00/00": 1, "kl/expert-00/01": 2}
    assert set(events.Tags()["scalars"]) == set(expected)
    for tag, value in expected.items():
        assert [(event.step, event.value) for event in events.Scalars(tag)] == [(4, value)]


@pytest.mark.parametrize("shown", [True, False])
def test_progress_goes_to_stderr_and_lines_to_stdout(shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Progress(total=10, initial=2, shown=shown)) as progress:
        progress.write({"step": 10, "loss": 12.34567, "rows_per_s": 98765.4})
        progress.tell("round 1: 5 0 rows")
    captured = capsys.readouterr()
    assert captured.out == "round 1: 5 0 rows\n"
    assert [text in captured.err for text in ("10/10", "loss=12.35", "98,765")] == [shown] * 3
    assert shown or not captured.err


def test_a_table_is_aligned() -> None:
    rows = [["vae", 3, "1,024", "12.5%"], ["moe-vae", 100, "-", "7.0%"]]
    assert table(["system", "experts", "rows/s", "share"], rows).splitlines() == [
        "system   experts  rows/s  share",
        "-------  -------  ------  -----",
        "vae            3   1,024  12.5%",
        "moe-vae      100       -   7.0%",
    ]
    assert table(["a", "bb"], []) == "a  bb\n-  --"
    with pytest.raises(ValueError, match="shorter"):
        table(["a", "b"], [[1, 2], [3]])
