"""Rows of any source as shards: every field, id and split as the source has them, and a run the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixdist.data import Bananas, Blobs, Captions, Digits, Parabolas, Shards, Source, Spiral, Textures, Views
from mixdist.data.prepare.prepare import prepare
from mixdist.data.prepare.recipe import AsTheyAre
from mixdist.data.prepare.rows import list_rows
from mixdist.data.shards.index import ShardIndex
from mixdist.data.shards.reader import read_npy
from mixdist.data.sources.splits import load_splits
from mixdist.report.metrics import read_metrics
from tests.launch import changed, here, mlp, refused, together, write_config
from tests.test_paired import features, flickr

SOURCES: dict[str, Any] = {
    "Digits": Digits,
    "Blobs": lambda: Blobs(rows=40, test_rows=20),
    "Parabolas": Parabolas,
    "Spiral": lambda: Spiral(rows=600, test_rows=100),
    "Bananas": lambda: Bananas(rows=600, test_rows=90),
    "Textures": lambda: Textures(Digits(), modalities=2),
}


def shards_of(source: Source, out: Path, shard_samples: int = 300) -> str:
    listing, rows = list_rows(load_splits(source, None), type(source).__name__)
    prepare("rows", listing, AsTheyAre(), out, shard_samples, rows=rows)
    return str(out)


def check_same(source: Source, root: str) -> None:
    """Check that shards give what their source does, in its order."""
    for one, other in zip(source.load(), Shards(root, order="full", workers=0).load(), strict=True):
        if one is None:
            assert other is None
            continue
        assert torch.equal(one.ids, other.ids)
        assert dict(one.spec) == dict(other.spec)
        assert list(one.spec) == list(other.spec)
        assert (one.label, one.class_names, one.attribute) == (other.label, other.class_names, other.attribute)
        index = torch.arange(len(one) - 1, -1, -3)
        rows, found = one.take(index), other.take(index)
        assert rows.keys() == found.keys()
        for name, column in rows.items():
            assert column.dtype == found[name].dtype
            assert torch.equal(column, found[name]), name
        assert other.take(index, fields=[]).keys() == {"id"}


@pytest.mark.parametrize("name", SOURCES)
def test_shards_hold_the_rows_of_their_source(name: str, tmp_path: Path) -> None:
    check_same(SOURCES[name](), shards_of(SOURCES[name](), tmp_path / "out"))


def test_absent_modalities_and_texts_are_held(tmp_path: Path) -> None:
    features(tmp_path)
    views = Views(str(tmp_path), views=["pix", "fac", "mor"], absent=0.5)
    check_same(views, shards_of(views, tmp_path / "views", 7))
    assert "present" in Shards(str(tmp_path / "views")).load().train.spec
    flickr(tmp_path / "captions")
    captions = Captions(str(tmp_path / "captions"), size=8, tokens=6, more_than=0, holdout=1)
    root = shards_of(captions, tmp_path / "texts")
    check_same(captions, root)
    assert Shards(root).load().train.spec["text"].words == captions.load().train.spec["text"].words


def test_a_run_with_absent_views_has_the_numbers_of_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command, out of decoding processes, on one rank and on two; with validation rows cut by id."""
    monkeypatch.chdir(tmp_path)
    features(tmp_path)
    init_args = {"root": str(tmp_path), "views": ["pix", "fac", "mor"], "absent": 0.5}
    kind = "mixdist.experts.Modality"
    experts = [
        {
            "class_path": kind,
            "init_args": {"field": name, "network": mlp(5), "likelihood": "gaussian", "mean": "identity"},
        }
        for name in init_args["views"]
    ]
    family = {"class_path": "mixdist.mixtures.MMVAE", "init_args": {"expert": experts, "latent": 2, "samples": 2}}
    config: dict[str, Any] = {
        "data": {"class_path": "mixdist.data.Views", "init_args": init_args},
        "mixture": family,
        "valid": 0.2,
        "dtype": "float64",
        "log_every": 1,
        "pictures": False,
        "train": {"epochs": 2, "batch_size": 13},
    }
    source = write_config(tmp_path / "source.yaml", config)
    ended = here("prepare", "rows", source, "--out", "shards", "--shard-samples", "20")
    assert ended.code == 0, ended.err
    assert "train: " in ended.out
    assert here("verify", "shards", "--decode").code == 0
    shards = {"class_path": "mixdist.data.Shards", "init_args": {"root": "shards", "order": "full"}}
    again = write_config(tmp_path / "again.yaml", {**config, "data": shards})
    for run, words in (("one", source), ("two", again)):
        assert (ended := here("train", "--config", words, "--out", run)).code == 0, ended.err
    ended = together("train", "--config", again, "--out", "three", ranks=2, folder=tmp_path)
    assert ended.code == 0, ended.err
    losses = [[(r["loss"], r["log_px"], r["present"]) for r in read_metrics(Path(run))] for run in ("one", "two")]
    assert losses[0] == losses[1]
    on_two = [record["loss"] for record in read_metrics(Path("three"))]
    np.testing.assert_allclose(on_two, [loss for loss, _, _ in losses[0]], rtol=1e-10)
    assert losses[0][0][2] != [1.0, 1.0, 1.0]


def test_the_same_command_goes_on_and_another_source_does_not(tmp_path: Path) -> None:
    out, blobs = tmp_path / "out", Blobs(rows=40, test_rows=20)
    shards_of(blobs, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    shards_of(Blobs(rows=40, test_rows=20), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(ValueError, match="not those of the source now"):
        shards_of(Blobs(rows=40, test_rows=20, seed=1), out)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["rows", "drawn.yaml", "--out", "x"], "Dequantised 'x' Shards"),
        (["rows", "missing.yaml", "--out", "x"], "prepare rows missing.yaml"),
        (["rows", "c.yaml", "--out", "x", "--size", "8"], "--size (8)"),
        (["rows", "c.yaml", "--out", "x", "--labels", "none"], "--labels (none)"),
        (["rows", "c.yaml", "--out", "x", "--min-side", "9"], "--min-side (9)"),
        (["rows", "c.yaml"], "--out"),
    ],
)
def test_what_cannot_be_prepared_is_refused(
    words: list[str], names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "c.yaml", changed())
    digits = {"source": {"class_path": "mixdist.data.Digits"}}
    drawn = {"class_path": "mixdist.data.Dequantised", "init_args": digits}
    write_config(tmp_path / "drawn.yaml", changed(data=drawn))
    refused("prepare", *words, names=names)


def test_options_of_images_and_other_indices_are_refused(tmp_path: Path) -> None:
    root = shards_of(Blobs(rows=40, test_rows=20), tmp_path / "out")
    for options, words in (({"size": 8}, "size"), ({"label": "z"}, r"label \(z\)"), ({"augment": Any}, "augment")):
        with pytest.raises(ValueError, match=words):
            Shards(root, **options).load()  # type: ignore[arg-type]
    assert Shards(root, label="none").load().train.label is None
    assert "y" not in Shards(root, label="none").load().train.spec
    head = json.loads((tmp_path / "out/index.json").read_text())
    head["rows"]["spec"]["x"]["scale"] = 2.0
    (tmp_path / "out/index.json").write_text(json.dumps(head))
    with pytest.raises(ValueError, match="fingerprint"):
        Shards(root).load()


def test_an_index_of_images_says_nothing_of_rows(tmp_path: Path) -> None:
    """What was indexed before there were rows has the fingerprint that it had."""
    shards_of(Blobs(rows=40, test_rows=20), tmp_path / "out")
    index = ShardIndex.read(tmp_path / "out")
    assert index.rows
    plain = ShardIndex(**{**vars(index), "rows": {}})
    assert plain.fingerprint != index.fingerprint
    plain.write(tmp_path)
    assert "rows" not in json.loads((tmp_path / "index.json").read_text())
    assert ShardIndex.read(tmp_path).fingerprint == plain.fingerprint


def test_objects_in_a_row_are_never_read() -> None:
    import io

    from mixdist.data.images import Unreadable

    stream = io.BytesIO()
    np.save(stream, np.zeros((), dtype=[("x", "f4"), ("y", "O")]))
    with pytest.raises(Unreadable):
        read_npy(stream.getvalue())
