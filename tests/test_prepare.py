"""``mixdist prepare``: the same bytes whatever happens, every sample once, and one line for what cannot be."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mixdist.data.formats import open_listing
from mixdist.data.formats.listing import Files
from mixdist.data.images import decode
from mixdist.data.prepare.prepare import Prepared, count_reasons, prepare
from mixdist.data.prepare.recipe import Recipe
from mixdist.data.prepare.writer import PREPARING, _Sink
from mixdist.data.shards.index import ShardIndex
from tests import sources
from tests.errors import error_of, refusal_of
from tests.launch import ROOT, descendants, here
from tests.sources import MAKERS, Truth, make, picture, put

SETTINGS: dict[str, Any] = {"shard_samples": 2}
LARGE = picture(0, (1500, 1500))


def _prepare(source: Path, out: Path, kind: str = "celeba", **settings: Any) -> Prepared:
    listing = open_listing(kind, source)
    recipe = settings.pop("recipe", Recipe(listing.channels))
    return prepare(kind, listing, recipe, out, **{**SETTINGS, **settings})


def _files(out: Path) -> dict[str, str]:
    """Everything below a folder, by checksum."""
    paths = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _members(out: Path) -> dict[str, dict[str, bytes]]:
    """The members of every sample by split and key, as tarfile reads them."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.isreg(), member.mtime) == (True, 0)
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                found.setdefault(f"{path.name.split('-')[0]} {key}", {})[extension] = file.read()
    return found


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine faces, of which one is damaged and one is too small."""
    root = tmp_path_factory.mktemp("faces")
    sources.celeba(root)
    path = root / "img_align_celeba" / "000004.jpg"
    path.write_bytes(path.read_bytes()[:-30])
    put(root / "img_align_celeba" / "000006.jpg", picture(5, (7, 14)))
    return root


@pytest.fixture(scope="module")
def whole(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an uninterrupted preparation."""
    out = tmp_path_factory.mktemp("whole") / "out"
    _prepare(faces, out)
    return _files(out)


# What is written.


@pytest.mark.parametrize("kind", MAKERS)
def test_every_sample_is_written_once_as_it_is(kind: str, tmp_path: Path) -> None:
    truths = make(kind, tmp_path / "source")
    prepared = _prepare(tmp_path / "source", tmp_path / "out", kind, shard_samples=3)
    members = _members(tmp_path / "out")
    assert list(members) == sorted(f"{truth.split} {truth.id:09d}" for truth in truths)
    names = open_listing(kind, tmp_path / "source").attribute_names
    for truth in truths:
        sample = members[f"{truth.split} {truth.id:09d}"]
        _check_image(sample, truth)
        assert sample.get("cls") == (None if truth.label is None else str(truth.label).encode())
        about = json.loads(sample["json"])
        assert about.get("attributes", {}) == dict(zip(names, truth.attributes, strict=True))
        assert about["name"]
    _check_index(prepared.index, tmp_path / "out", truths, members)
    assert not prepared.set_aside
    others = {path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".tar"}
    assert others == {"index.json", "index.npz"}


def _check_image(sample: dict[str, bytes], truth: Truth) -> None:
    (extension,) = sample.keys() - {"cls", "json"}
    if not isinstance(truth.raw, bytes):
        assert extension == "png"
        np.testing.assert_array_equal(decode(sample["png"], len(truth.raw)), truth.raw)
        return
    with Image.open(io.BytesIO(truth.raw)) as image:
        kind, pixels = image.format, np.asarray(image.convert("RGB"))
    if kind in ("JPEG", "PNG", "WEBP"):
        assert extension == {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]
        assert sample[extension] == truth.raw
    else:
        np.testing.assert_array_equal(decode(sample["png"], 3), pixels.transpose(2, 0, 1))


def _check_index(index: ShardIndex, out: Path, truths: list[Truth], members: dict[str, dict[str, bytes]]) -> None:
    assert index.fingerprint == ShardIndex.read(out).fingerprint
    assert index.id_N.tolist() == [truth.id for truth in truths]
    labels = [truth.label for truth in truths]
    assert (index.label_N is None) == (labels[0] is None)
    if index.label_N is not None:
        assert index.label_N.tolist() == labels
    if index.attribute_NA is not None:
        assert index.attribute_NA.tolist() == [list(truth.attributes) for truth in truths]
    else:
        assert not truths[0].attributes
    assert index.image == (None if isinstance(truths[0].raw, bytes) else truths[0].raw.shape)
    for entry, first, last in zip(index.shards, index.starts, index.starts[1:], strict=False):
        data = (out / entry.name).read_bytes()
        for n in range(first, last):
            sample = members[f"{entry.split} {index.id_N[n]:09d}"]
            for m, extension in enumerate(index.extensions):
                at, size = index.member_NM2[n, m]
                assert sample.get(extension) == (None if at < 0 else data[at : at + size])


def test_shards_are_of_consecutive_samples(faces: Path, tmp_path: Path) -> None:
    index = _prepare(faces, tmp_path).index
    # Ids 0 to 2 are trained on; 1 (000004.jpg) is damaged, 8 (the last of 000003, 6, 9) is well, 7 is too small.
    assert [(s.name, s.num_samples, s.first_id) for s in index.shards] == [
        ("train-000000.tar", 1, 0),
        ("train-000001.tar", 1, 2),
        ("valid-000000.tar", 2, 3),
        ("valid-000001.tar", 1, 5),
        ("test-000000.tar", 1, 6),
        ("test-000001.tar", 1, 8),
    ]
    assert index.splits == ("train", "valid", "test")


def test_what_is_set_aside_is_listed_with_its_reason(faces: Path, tmp_path: Path) -> None:
    prepared = _prepare(faces, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "set_aside.jsonl").read_text().splitlines()]
    assert lines == [one._asdict() for one in prepared.set_aside]
    assert [(line["id"], line["name"]) for line in lines] == [(1, "000004.jpg"), (7, "000006.jpg")]
    assert all(number in lines[1]["reason"] for number in ("7 x 14", "8"))
    # What differs from image to image is left out of what is counted.
    reasons = [reason for reason, _ in count_reasons([*prepared.set_aside, *prepared.set_aside])]
    assert [lines[0]["reason"].startswith(reasons[0]), "7" in reasons[1]] == [True, False]


def test_a_shard_of_which_all_is_set_aside_is_not_there(tmp_path: Path) -> None:
    for k in range(6):
        put(tmp_path / "in" / "a" / f"{k}.jpg", b"" if k in (2, 3) else picture(k))
    prepared = _prepare(tmp_path / "in", tmp_path / "out", "folder")
    assert [shard.name for shard in prepared.index.shards] == ["train-000000.tar", "train-000002.tar"]
    assert prepared.index.id_N.tolist() == [0, 1, 4, 5]
    assert _prepare(tmp_path / "in", tmp_path / "out", "folder").before


def test_with_a_size_the_shape_is_known(faces: Path, tmp_path: Path) -> None:
    prepared = _prepare(faces, tmp_path, recipe=Recipe(size=8, crop=12))
    assert prepared.index.image == (3, 8, 8)
    for sample in _members(tmp_path).values():
        assert decode(sample["png"], 3).shape == (3, 8, 8)
    assert prepared.index.source == "celeba by mixdist prepare (channels 3, size 8, crop 12)"


@pytest.mark.parametrize("workers", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_workers_makes_the_same_bytes_wherever_the_source_lies(
    workers: int, faces: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    moved = Path(shutil.copytree(faces, tmp_path / "moved"))
    _prepare(moved, tmp_path / "out", workers=workers, tell=lambda *counts: told.append(counts))
    assert _files(tmp_path / "out") == whole
    assert (told[0], told[-1]) == ((0, 9), (9, 9))
    assert [done for done, _ in told] == sorted(done for done, _ in told)


# Ends of all kinds.


def _fork(run: Callable[[], object]) -> int:
    """Run something in a process of its own and give how it ended: 0, or the negative number of a signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child uses none of them
        child = os.fork()
    if not child:
        try:
            run()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _killed_at(step: int, run: Callable[[], object]) -> Callable[[], None]:
    """Run something that is killed at its ``step``-th look at the file system or write into a shard."""

    def killed() -> None:
        left = [step]

        def watch(event: str, args: Any) -> None:
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "write"):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

        def write(sink: _Sink, data: bytes) -> int:
            real(sink, data[: len(data) // 2])
            watch("write", data)
            return real(sink, data[len(data) // 2 :])

        real = _Sink.write
        _Sink.write = write  # type: ignore[method-assign]
        sys.addaudithook(watch)
        run()

    return killed


def _steps(run: Callable[[], object]) -> int:
    """How many looks at the file system something takes, to within a power of two, by killing it later and later."""
    step = 1
    while _fork(_killed_at(step, run)) == -signal.SIGKILL:
        step *= 2
    return step


def _complete(out: Path) -> dict[str, str]:
    """The files that bear a final name: they are what they will be."""
    return {name: sha for name, sha in _files(out).items() if "/" not in name and not name.endswith(".partial")}


def _all_steps(faces: Path, tmp_path: Path) -> int:
    def run() -> None:
        shutil.rmtree(tmp_path / "count", ignore_errors=True)
        _prepare(faces, tmp_path / "count")

    return _steps(run)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_at_any_step_and_started_again(every: bool, faces: Path, whole: dict[str, str], tmp_path: Path) -> None:
    random, most = np.random.default_rng(0), _all_steps(faces, tmp_path)
    assert most > 30
    some = [random.integers(1, most, random.integers(1, 4)).tolist() for _ in range(12)]
    for trial, steps in enumerate([[step] for step in range(1, most)] if every else some):
        for step in steps:
            _fork(_killed_at(step, lambda trial=trial: _prepare(faces, tmp_path / f"{trial}")))
            assert _complete(tmp_path / f"{trial}").items() <= whole.items()
        _prepare(faces, tmp_path / f"{trial}")
        assert _files(tmp_path / f"{trial}") == whole, f"killed at {steps}"


def _until(condition: Callable[[], bool], running: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert running is None or running.poll() is None, "it ended before"
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)


def _start(faces: Path, out: Path, workers: int, **options: Any) -> subprocess.Popen[bytes]:
    words = ["prepare", "celeba", str(faces), "--out", str(out), "--shard-samples", "2", "--workers", str(workers)]
    return subprocess.Popen(
        [sys.executable, "-m", "mixdist", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _slow_source(root: Path) -> Path:
    """Faces that take a while each, so that a preparation can be met in the midst of its work."""
    sources.celeba(root, 30, (20, 14))
    for path in (root / "img_align_celeba").iterdir():
        path.write_bytes(LARGE)
    return root


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    source, out = _slow_source(tmp_path / "source"), tmp_path / "out"
    with _start(source, out, workers=2) as started:
        _until(lambda: bool(list(out.glob("*.tar"))), started)
        workers = descendants(started.pid)
        started.kill()
        started.communicate()  # its output stays open as long as a worker lives
    assert len(workers) >= 2
    _until(lambda: not any(map(_alive, workers)))
    assert len(list(out.glob("*.tar"))) < 15
    for folder in (out, tmp_path / "whole"):
        _prepare(source, folder)
    assert _files(out) == _files(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_random_moments_with_workers(tmp_path: Path) -> None:
    source, random = _slow_source(tmp_path / "source"), np.random.default_rng(1)
    _prepare(source, tmp_path / "whole")
    whole = _files(tmp_path / "whole")
    for trial in range(5):
        out = tmp_path / f"{trial}"
        with _start(source, out, 2) as started:
            _until(lambda out=out: (out / PREPARING / "plan.json").exists(), started)
            time.sleep(random.uniform(0, 6))  # its workers start, and work
            started.kill()
        assert _complete(out).items() <= whole.items()
        _prepare(source, out, workers=2 if trial == 4 else 0)
        assert _files(out) == whole


def test_a_shard_that_was_damaged_meanwhile_is_made_again(faces: Path, whole: dict[str, str], tmp_path: Path) -> None:
    _fork(_killed_at(_all_steps(faces, tmp_path) // 2, lambda: _prepare(faces, tmp_path / "out")))
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert shards
    body = bytearray(shards[0].read_bytes())
    body[700] ^= 1
    shards[0].write_bytes(body)
    _prepare(faces, tmp_path / "out")
    assert _files(tmp_path / "out") == whole


def test_shards_that_are_there_are_not_made_again(
    faces: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = Files.read
    monkeypatch.setattr(Files, "read", lambda self, sample: read.append(sample.name) or real(self, sample))

    def stop(done: int, total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _prepare(faces, tmp_path / "out", tell=stop)
    first = list(read)
    _prepare(faces, tmp_path / "out")
    assert len(first) < 9
    assert sorted(read) == [f"{k:06d}.jpg" for k in range(1, 10)]
    assert _files(tmp_path / "out") == whole


def test_a_second_time_changes_nothing(faces: Path, tmp_path: Path) -> None:
    assert not _prepare(faces, tmp_path).before
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = _prepare(faces, tmp_path, workers=3)
    assert again.before
    assert len(again.set_aside) == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_two_at_once(faces: Path, tmp_path: Path) -> None:
    def second(done: int, total: int) -> None:
        error_of(lambda: _prepare(faces, tmp_path / "out"), tmp_path / "out")

    _prepare(faces, tmp_path / "out", tell=second)


# A full disk.


@pytest.mark.parametrize(("of", "name", "every"), [(_Sink, "write", 7), (os, "fsync", 1), (os, "replace", 1)])
def test_a_disk_that_is_full_at_any_moment_is_told_in_one_line_and_gone_on_from(
    of: Any, name: str, every: int, faces: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, number, left = getattr(of, name), 1, 0

    def full(*given: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given)

    while left <= 0:  # else there are fewer calls
        out, left = tmp_path / str(number), number
        with monkeypatch.context() as patch:
            patch.setattr(of, name, full)
            told = ""
            try:
                _prepare(faces, out)
            except ValueError as error:
                told = str(error)
        if left <= 0:
            assert told.startswith(f"the disk of --out {out} is full (No space left on device)")
            assert "\n" not in told
        assert not list(out.rglob("*.partial"))
        assert _complete(out).items() <= whole.items()
        _prepare(faces, out)
        assert _files(out) == whole
        number += every
    assert number > 8


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_file_that_may_not_grow(workers: int, faces: Path, whole: dict[str, str], tmp_path: Path) -> None:
    """The same without a disk of its own: the system refuses to write more than 9,000 bytes into a file."""
    out = tmp_path / "out"
    limit = resource.RLIMIT_FSIZE, (9000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    with _start(faces, out, workers) as started:
        resource.prlimit(started.pid, *limit)  # before it has read its own imports
        _, err = started.communicate(timeout=300)
    told = f"mixdist: the disk of --out {out} is full ({os.strerror(errno.EFBIG)})"
    assert (started.returncode, err.decode().startswith(told), err.count(b"\n")) == (2, True, 1), err
    assert not list(out.glob("*.tar"))
    assert not list(out.rglob("*.partial"))
    _prepare(faces, out)
    assert _files(out) == whole


# What is refused.


def test_another_call_does_not_go_on(faces: Path, tmp_path: Path) -> None:
    changes: list[tuple[dict[str, Any], str, int | str]] = [
        ({"recipe": Recipe(size=8)}, "size unset", 8),
        ({"recipe": Recipe(encode="jpg")}, "encode png", "jpg"),
        ({"recipe": Recipe(min_side=1)}, "min-side 8", 1),
        ({"shard_samples": 3}, "shard-samples 2", 3),
    ]
    _fork(_killed_at(40, lambda: _prepare(faces, tmp_path / "begun")))
    assert (tmp_path / "begun" / PREPARING).is_dir()
    _prepare(faces, tmp_path / "finished")
    for out in (tmp_path / "begun", tmp_path / "finished"):
        before = _files(out)
        for settings, *named in changes:
            error_of(lambda s=settings, out=out: _prepare(faces, out, **s), out, *named)
        other = Path(shutil.copytree(faces, tmp_path / f"other {out.name}"))
        (other / "img_align_celeba" / "000001.jpg").write_bytes(b"")
        error_of(lambda other=other, out=out: _prepare(other, out), out, "source")
        assert _files(out) == before


def test_folders_of_others_are_left_alone(faces: Path, tmp_path: Path) -> None:
    put(tmp_path / "full" / "thesis.tex", b"text")
    for out in (tmp_path / "full", tmp_path / "full" / "thesis.tex"):
        error_of(lambda out=out: _prepare(faces, out), f"--out {out}")
    assert _files(tmp_path / "full").keys() == {"thesis.tex"}
    put(tmp_path / "begun" / PREPARING / "plan.json", b"[]")  # a plan that cannot be read
    error_of(lambda: _prepare(faces, tmp_path / "begun"), tmp_path / "begun", "source unknown", "celeba")
    index = _prepare(faces, tmp_path / "own").index
    (tmp_path / "own" / "valid-000000.tar").rename(tmp_path / "away")
    error_of(lambda: _prepare(faces, tmp_path / "own"), tmp_path / "own", "valid-000000.tar")
    ShardIndex(index.shards, index.extensions, index.id_N, index.member_NM2, index.crc_NM).write(tmp_path / "own")
    error_of(lambda: _prepare(faces, tmp_path / "own"), tmp_path / "own")


def test_no_image_that_can_be_used(tmp_path: Path) -> None:
    for k in range(3):
        put(tmp_path / "in" / "a" / f"{k}.jpg", b"no image" if k else b"")
    error_of(lambda: _prepare(tmp_path / "in", tmp_path / "out", "folder"), "3 images", "2 times", "1 times")
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_file_that_cannot_be_read_ends_it(faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Files, sample: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Files, "read", broken)
        error_of(lambda: _prepare(faces, tmp_path / "out"), "image 0", "'000001.jpg'", "Input/output error")
    assert not list((tmp_path / "out").rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "code", "named"),
    [
        # The last of its children by number: the first are multiprocessing's own.
        (lambda pid: os.kill(max(descendants(pid)), signal.SIGKILL), 2, ("one of 2 worker processes", "--workers")),
        # As a terminal does: the workers get it as well.
        (lambda pid: os.killpg(pid, signal.SIGINT), 130, ("interrupted: ", "")),
    ],
    ids=["a killed worker", "ctrl-c"],
)
def test_an_end_from_outside_is_told_in_one_line(end: Any, code: int, named: tuple[str, str], tmp_path: Path) -> None:
    source, out = _slow_source(tmp_path / "source"), tmp_path / "out"
    with _start(source, out, 2, start_new_session=True) as started:
        _until(lambda: bool(list(out.glob("*.tar"))), started)
        end(started.pid)
        err = started.communicate(timeout=300)[1].decode()
    assert (started.returncode, err.startswith(f"mixdist: {named[0]}"), err.count("\n")) == (code, True, 1), err
    assert named[1] in err


# The command.


def test_the_command_tells_what_it_did(faces: Path, tmp_path: Path) -> None:
    words = ["prepare", "celeba", str(faces), "--out", str(tmp_path / "out"), "--workers", "0", "--shard-samples", "2"]
    ended = here(*words)
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert [line.split(",")[0] for line in lines[:3]] == ["train: 2 samples", "valid: 3 samples", "test: 2 samples"]
    assert lines[0].endswith("2 shards")
    assert lines[3] == f"set aside: 2 images, listed in {tmp_path / 'out' / 'set_aside.jsonl'}"
    assert lines[4:6] == ["  1: it is truncated or damaged", "  1: it has W x H pixels, fewer than min-side"]
    assert lines[6] == f"shards: {tmp_path / 'out'}   next: mixdist verify {tmp_path / 'out'}"
    again = here(*words)
    assert (again.code, again.err) == (0, "")
    assert again.out.splitlines() == [f"{tmp_path / 'out'} was finished before; nothing was changed", *lines]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("celeba nowhere --out out", ("'nowhere'", "celeba")),
        ("svhn faces --out out", ("'train_32x32.mat'", "looks like celeba")),
        ("folder empty --out out", ("'empty'", ".jpg")),
        ("coco faces --out out", ("source", "coco")),
        ("celeba faces", ("--out",)),
        ("celeba --out out", ("FOLDER",)),
        ("celeba faces --out full", ("--out full",)),
        ("celeba faces --out faces", ("--out faces",)),
        *(
            (f"celeba faces --out out --{words}", words.split())
            for words in ("size 0", "crop -3", "shard-samples 0", "workers -1", "min-side 0")
        ),
        *((f"celeba faces --out out --{words}", words.split()) for words in ("size big", "channels 2", "encode gif")),
        ("celeba faces --out out --sizes 8", ("--sizes",)),
        ("cifar10 cifar --out out --crop 40", ("--crop", 40, "32 x 32")),
    ],
)
def test_one_line_says_what_is_wrong(
    words: str, named: tuple[object, ...], faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("faces").symlink_to(faces)
    put(Path("full", "thesis.tex"), b"text")
    Path("empty").mkdir()
    sources.cifar10(Path("cifar"))
    before = sorted(Path().rglob("*"))
    assert refusal_of("prepare", *words.split(), named=named).out == ""
    assert sorted(Path().rglob("*")) == before


def test_help_tells() -> None:
    ended = here("prepare", "--help")
    assert ended.code == 0
    for word in ("--out", "--size", "--crop", "--workers", "set_aside.jsonl", "Example:"):
        assert word in ended.out
