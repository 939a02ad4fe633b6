"""Rows of several modalities: by an index, on textures, by class, by a key, with absent ones, with sentences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mixdist.config.options import parse
from mixdist.config.parsing import config_parser, dump, read_config
from mixdist.data import (
    Captions,
    Dataset,
    Digits,
    MnistSvhn,
    Paired,
    Pairs,
    Samples,
    Shards,
    Source,
    Splits,
    Textures,
    Views,
)
from mixdist.data.fields import describe_spec, read_spec
from mixdist.data.formats import open_listing
from mixdist.data.order import Epoch
from mixdist.data.paired import labels_of
from mixdist.data.prepare.prepare import prepare
from mixdist.data.prepare.recipe import Recipe
from mixdist.data.sources.splits import load_splits
from mixdist.data.sources.textures import texture
from mixdist.data.words import END, PAD, UNKNOWN, decode, encode, vocabulary
from mixdist.terms import Batch, Field
from tests import sources
from tests.errors import error_of, refusal_of
from tests.launch import changed, write_config

FEW = {"fac": 216, "pix": 240, "mor": 6}


def every(samples: Samples) -> Batch:
    return samples.take(torch.arange(len(samples)))


def prepared(kind: str, root: Path, out: Path) -> None:
    listing = open_listing(kind, root)
    prepare(kind, listing, Recipe(channels=listing.channels), out)


class Keyed(Source):
    """Rows of one number under given ids, and a code of each that may be matched."""

    def __init__(self, ids: list[int], codes: list[int] | None = None, label: bool = False) -> None:
        self.given, self.codes, self.labelled = ids, codes or ids, label

    def load(self) -> Splits[Dataset]:
        spec = {"x": Field((), torch.float32), "code": Field((), torch.int64)}
        parts = []
        for shift in (0, 1000):
            ids, codes = torch.tensor(self.given) + shift, torch.tensor(self.codes) + shift
            rows = {"id": ids, "x": 0.5 * codes.float(), "code": codes}
            if self.labelled:
                rows["y"] = (codes % 3).byte()
            named = spec | ({"y": Field((), torch.uint8, num_classes=3)} if self.labelled else {})
            parts.append(Dataset(rows, named, "y" if self.labelled else None))
        return Splits(*parts)


# The index


def of_two() -> tuple[Paired, Dataset, Dataset]:
    left, right = Keyed([5, 6, 7]).load().train, Keyed([1, 2]).load().train
    index = torch.tensor([[0, 1], [2, -1], [2, 0], [1, 1]])
    columns = {"id": torch.arange(4) + 9, "y": torch.tensor([0, 1, 1, 0], dtype=torch.uint8)}
    spec = {"y": Field((), torch.uint8, num_classes=2)}
    return Paired((left, right), ({"a": "x", "c": "code"}, {"b": "x"}), index, columns, spec, "y"), left, right


def test_a_row_is_made_of_the_rows_that_the_index_names() -> None:
    paired, left, right = of_two()
    rows = every(paired)
    assert {*paired.spec} == {"a", "b", "c", "y"} == {*rows} - {"id"}
    assert rows["id"].tolist() == [9, 10, 11, 12]
    assert torch.equal(rows["a"], left.rows["x"][[0, 2, 2, 1]])
    assert torch.equal(rows["c"], left.rows["code"][[0, 2, 2, 1]])
    assert torch.equal(rows["b"], right.rows["x"][[1, 0, 0, 1]] * torch.tensor([1, 0, 1, 1]))
    assert rows["y"].tolist() == [0, 1, 1, 0]
    assert set(paired.take(torch.tensor([1]), fields=["b", "y"])) == {"id", "b", "y"}
    assert len(paired.take(torch.arange(0))["a"]) == 0


def test_a_part_is_cut_from_the_index_and_fingerprints_tell_it() -> None:
    paired, _, _ = of_two()
    cut = paired.part(torch.tensor([1, 3]))
    assert all(
        torch.equal(cut_, whole[[1, 3]])
        for cut_, whole in zip(every(cut).values(), every(paired).values(), strict=True)
    )
    assert cut.fingerprint != paired.fingerprint == of_two()[0].fingerprint
    assert paired.without([10, 9]).ids.tolist() == [11, 12]
    assert paired.in_memory


def test_what_a_part_cannot_read_is_left_out_of_every_row_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    paired, _, _ = of_two()
    monkeypatch.setattr(Dataset, "unreadable", lambda self, rank, world: [(7, "torn")] if 7 in self.ids else [])
    assert paired.unreadable(0, 1) == [(10, "torn"), (11, "torn")]


# Textures


def test_modalities_are_of_one_class_and_of_different_images() -> None:
    source = Textures(Digits(), modalities=4)
    for part, plain in zip(source.load()[:2], Digits().load()[:2], strict=True):
        index_NM, class_N = part.index_NM, plain.rows["y"]
        assert torch.equal(part.ids, plain.ids)
        assert bool((class_N[index_NM] == class_N[:, None]).all())
        assert all(len(set(row)) == 4 for row in index_NM.tolist())
        assert all(sorted(column) == list(range(len(plain))) for column in index_NM.T.tolist())  # each once a modality


@pytest.mark.parametrize("channels", [1, 3])
def test_a_texture_shows_where_the_image_is_0_and_its_inverse_where_it_is_1(channels: int) -> None:
    train = Textures(Digits(), 2, channels, seed=4).load().train
    rows, plain = every(train.first(50)), Digits().load().train
    for m in range(2):
        d = plain.rows["x"][train.index_NM[:50, m]].float() / 16
        x = rows[f"x{m}"].float() / 255
        assert x.shape == (50, channels, 8, 8)
        known = texture(m, channels, 4).flatten(1)
        for at, level in ((d == 0, known), (d == 1, 1 - known)):
            for c in range(channels):
                seen = x[:, c][at[:, 0]]
                nearest = (seen[:, None] - level[c]).abs().amin(1)
                assert nearest.max() < 0.5 / 255 + 1e-6
    assert len({float(texture(m, 3, 0).mean()) for m in range(5)}) == 5


def test_textures_are_keyed_by_row_and_seed() -> None:
    train = Textures(Digits(), 2).load().train
    alone, beside = train.take(torch.tensor([7])), train.take(torch.tensor([3, 7]), Epoch(5))
    assert torch.equal(alone["x1"][0], beside["x1"][1])
    assert train.fingerprint == Textures(Digits(), 2).load().train.fingerprint
    other = Textures(Digits(), 2, seed=1).load().train
    assert other.fingerprint != train.fingerprint
    assert not torch.equal(other.take(torch.tensor([7]))["x0"], alone["x0"])


def test_validation_rows_are_cut_out_of_any_of_these_sources() -> None:
    splits = load_splits(Textures(Digits(), 2), 0.1)
    assert splits.valid is not None
    assert len(splits.train) + len(splits.valid) == 1438
    assert not set(splits.train.ids.tolist()) & set(splits.valid.ids.tolist())


# MNIST and SVHN


def digits_of_both(root: Path) -> MnistSvhn:
    sources.idx(root / "mnist")
    sources.svhn(root / "svhn")
    return MnistSvhn(str(root / "mnist"), str(root / "svhn"), pairs=3, max_per_class=1)


def test_pairs_are_the_first_of_each_class_in_many_orders(tmp_path: Path) -> None:
    source = digits_of_both(tmp_path)
    source.max_per_class = 2
    for part in source.load()[:2]:
        labels = [labels_of(one, "test") for one in part.parts]
        expected = 0
        for c in range(10):
            own = [(label == c).nonzero()[:, 0] for label in labels]
            n = min(len(own[0]), len(own[1]), 2)
            expected += 3 * n
            rows = part.index_NM[part.columns["y"] == c]
            for m in range(2):
                assert sorted(rows[:, m].tolist()) == sorted(own[m][:n].tolist() * 3)
        assert len(part) == expected > 0
        rows = every(part)
        assert (rows["mnist"].shape[1:], rows["svhn"].shape[1:]) == ((1, 10, 9), (3, 32, 32))
    ids = [part.ids for part in source.load()[:2]]
    assert torch.equal(torch.cat(ids), torch.arange(sum(map(len, ids))))


def test_pairs_are_the_same_out_of_shards(tmp_path: Path) -> None:
    memory = digits_of_both(tmp_path)
    for kind, root in (("idx", "mnist"), ("svhn", "svhn")):
        prepared(kind, tmp_path / root, tmp_path / f"{root}_shards")
    shards = MnistSvhn(str(tmp_path / "mnist_shards"), str(tmp_path / "svhn_shards"), pairs=3, max_per_class=1)
    for here, there in zip(memory.load()[:2], shards.load()[:2], strict=True):
        assert here.in_memory
        assert not there.in_memory
        found = every(there)
        assert all(torch.equal(column, found[name]) for name, column in every(here).items())
        there.close()


# Views


def features(root: Path, rows: int = 60, header: bool = True) -> dict[str, np.ndarray]:
    """Files of UCI's multiple features, with the class in the last column, or as the official ones are."""
    random, found = np.random.default_rng(0), {}
    label = np.arange(rows) % 10 if header else np.arange(rows) // (rows // 10)
    for name, size in FEW.items():
        numbers = random.integers(0, 7, (rows, size)) if name == "pix" else random.normal(3, 2, (rows, size)).round(4)
        found[name] = numbers
        if header:
            lines = [",".join(map(str, [*range(size), 0]))]
            lines += [",".join([*map(str, row), str(c)]) for row, c in zip(numbers.tolist(), label, strict=True)]
            (root / f"mfeat-{name}.csv").write_text("\n".join(lines))
        else:
            (root / f"mfeat-{name}").write_text("\n".join("  ".join(map(str, row)) for row in numbers.tolist()))
    return found | {"y": label}


@pytest.mark.parametrize("header", [True, False])
def test_views_are_read_and_standardised(tmp_path: Path, header: bool) -> None:
    known = features(tmp_path, header=header)
    train, test, _ = Views(str(tmp_path), views=["pix", "fac", "mor"]).load()
    assert len(train) + len(test) == 60
    assert "present" not in train.spec
    for part in (train, test):
        assert part.rows["y"].tolist() == known["y"][part.ids].tolist()
        assert torch.equal(part.rows["pix"].flatten(1).long(), torch.from_numpy(known["pix"][part.ids]))
    assert train.spec["pix"].shape == (1, 16, 15)
    assert train.rows["fac"].mean(0).abs().max() < 1e-5
    assert (train.rows["fac"].std(0, correction=0) - 1).abs().max() < 1e-5
    turned = np.corrcoef(test.rows["fac"].numpy()[:, 3], known["fac"][test.ids][:, 3])
    assert turned[0, 1] > 0.99999


def test_absent_views_are_keyed_by_id_and_every_row_keeps_one(tmp_path: Path) -> None:
    features(tmp_path, rows=2000)
    views = ["pix", "fac", "mor"]
    train, test, _ = Views(str(tmp_path), views, absent=0.5).load()
    there = train.rows["present"].bool()
    assert bool(there.any(1).all())
    assert bool(test.rows["present"].bool().all())
    for m, name in enumerate(views):
        assert not bool(train.rows[name].flatten(1)[~there[:, m]].any())
        assert abs(there[:, m].float().mean() - (0.5 + 0.5**3 / 3)) < 0.05
    smaller = Views(str(tmp_path), views, absent=0.3).load().train
    assert bool((smaller.rows["present"].bool() | ~there).all())  # what is there at 0.5 is there at 0.3
    whole = Views(str(tmp_path), views, absent=0.5, complete=True).load().train
    assert whole.ids.tolist() == train.ids[there.all(1)].tolist()
    other = Views(str(tmp_path), views, absent=0.5, seed=1).load().train
    assert not torch.equal(other.rows["present"], train.rows["present"])


# Keys


def test_rows_of_two_sources_are_matched_by_a_key() -> None:
    left, right = Keyed([3, 1, 2], label=True), Keyed([2, 3, 1])
    train, test, _ = Pairs({"left": left, "right": right}).load()
    assert train.ids.tolist() == [3, 1, 2]
    assert test.ids.tolist() == [1003, 1001, 1002]
    rows = every(train)
    assert torch.equal(rows["left"], rows["right"])
    assert (train.label, rows["y"].tolist()) == ("y", [0, 1, 2])
    by_code = Pairs({"left": Keyed([1, 2], [8, 9]), "right": Keyed([7, 6], [9, 8])}, key="code").load().train
    assert by_code.ids.tolist() == [8, 9]
    assert torch.equal(every(by_code)["left"], every(by_code)["right"])


def test_rows_without_a_partner_are_kept_where_modalities_may_be_absent() -> None:
    train = Pairs({"left": Keyed([1, 2, 3]), "right": Keyed([4, 3])}, absent=True).load().train
    rows = every(train)
    assert rows["id"].tolist() == [1, 2, 3, 4]
    assert rows["present"].tolist() == [[1, 0], [1, 0], [1, 1], [0, 1]]
    assert rows["left"].tolist() == [0.5, 1.0, 1.5, 0.0]
    assert rows["right"].tolist() == [0.0, 0.0, 1.5, 2.0]


def test_a_label_that_one_split_lacks_is_left_out_of_all() -> None:
    class Short(Keyed):
        """Its test rows lack one key."""

        def load(self) -> Splits[Dataset]:
            train, test, _ = super().load()
            return Splits(train, test.first(2))

    train, test, _ = Pairs({"left": Short([1, 2, 3], label=True), "right": Keyed([1, 2, 3])}, absent=True).load()
    assert (train.label, test.label) == (None, None)
    assert set(train.spec) == set(test.spec) == set(every(train)) - {"id"} == {"left", "right", "present"}


def test_pairs_read_shards(tmp_path: Path) -> None:
    truth = sources.idx(tmp_path / "plain")
    prepared("idx", tmp_path / "plain", tmp_path / "shards")
    shards = Shards(str(tmp_path / "shards"), workers=0)
    train = Pairs({"left": shards, "right": shards}).load().train
    rows = every(train)
    own = [one for one in truth if one.split == "train"]
    assert all(np.array_equal(rows["left"][i], one.raw) for i, one in enumerate(own))
    assert torch.equal(rows["left"], rows["right"])


# Sentences

LINES = ["A dog runs.", "The dog, a cat!", "a zebra"]


def test_words_are_the_frequent_ones_and_sentences_come_back() -> None:
    words = vocabulary(LINES, more_than=0)
    assert words[:5] == ("<pad>", "<end>", "<unknown>", "a", "dog")
    codes = encode(LINES, words, 8)
    assert [decode(row.tolist(), words) for row in codes] == ["a dog runs .", "the dog , a cat !", "a zebra"]
    few = encode(LINES, vocabulary(LINES, more_than=1), 3)
    assert few.tolist() == [[3, 4, END], [UNKNOWN, 4, END], [3, UNKNOWN, END]]
    assert encode(["dog"], words, 4)[0, 2:].tolist() == [PAD, PAD]


def flickr(root: Path, num: int = 6) -> None:
    lines = ["image,caption"]
    for k in range(num):
        sources.put(root / "images" / f"{k}.jpg", sources.picture(k))
        lines += [f'{k}.jpg,"A dog, number {word} ."' for word in ("one", "two")]
    sources.put(root / "captions.txt", "\n".join(lines).encode())


def test_each_sentence_is_a_row_with_its_image(tmp_path: Path) -> None:
    flickr(tmp_path)
    train, test, _ = Captions(str(tmp_path), size=8, tokens=10, more_than=1, holdout=2).load()
    assert (len(train), len(test), train.label) == (8, 4, None)
    assert len(train.parts[0]) == 4
    assert not set(train.ids.tolist()) & set(test.ids.tolist())
    rows, field = every(train), train.spec["text"]
    assert (rows["image"].shape, rows["text"].dtype) == ((8, 3, 8, 8), torch.int16)
    assert torch.equal(rows["image"][0], rows["image"][1])
    assert decode(rows["text"][0].tolist(), field.words) == "a dog , number one ."
    assert read_spec(describe_spec(train.spec)) == dict(train.spec)


def birds(root: Path) -> None:
    for split, names in (("train", ("ant", "bee")), ("test", ("cat",))):
        texts = []
        for name in names:
            for k in range(2):
                sources.put(root / split / name / f"{k}.jpg", sources.picture(k))
                texts += [f"this {name} is number {k} ."] * 10
        (root / f"text_{'trainvalclasses' if split == 'train' else 'testclasses'}.txt").write_text("\n".join(texts))


def test_the_layout_of_birds_has_ten_lines_an_image_and_a_label(tmp_path: Path) -> None:
    birds(tmp_path)
    train, test, _ = Captions(str(tmp_path), size=8).load()
    assert (len(train), len(test), train.label) == (40, 20, "y")
    assert train.class_names == ("ant", "bee", "cat")
    rows = every(train)
    assert decode(rows["text"][25].tolist(), train.spec["text"].words) == "this bee is number 0 ."
    assert rows["y"].tolist() == [0] * 20 + [1] * 20
    assert every(test)["y"].unique().tolist() == [2]
    assert decode(every(test)["text"][0].tolist(), test.spec["text"].words).startswith("this <unknown> is")
    (tmp_path / "text_testclasses.txt").write_text("one line")
    error_of(lambda: Captions(str(tmp_path)).load(), "text_testclasses.txt", "1 lines", "2 images")


# Mistakes


def test_arguments_and_data_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = str(tmp_path)
    digits = Digits()
    error_of(lambda: Textures(digits, modalities=0), "modalities (0)")
    error_of(lambda: Textures(digits, channels=2), "channels (2)")
    error_of(lambda: Textures(Keyed([1])).load(), "Textures", "label")
    error_of(lambda: Textures(Keyed([1], label=True)).load(), "Textures", "'x'", "float32")
    error_of(lambda: MnistSvhn(folder, folder, max_per_class=0), "max_per_class (0)")
    error_of(lambda: MnistSvhn(folder, folder).load(), folder, "idx3")
    error_of(lambda: Views(folder, absent=1.0), "absent (1.0)")
    error_of(lambda: Views(folder, views=[]), "views (none)")
    error_of(lambda: Views(folder).load(), folder, "mfeat-fac")
    (tmp_path / "mfeat-mor").write_text("1 2 3\n4 5 6\n")
    error_of(lambda: Views(folder, views=["mor"]).load(), "mfeat-mor", "2 rows of 3", 6)
    (tmp_path / "mfeat-mor").write_text("1 2 three\n")
    error_of(lambda: Views(folder, views=["mor"]).load(), "mfeat-mor", "three")
    error_of(lambda: Captions(folder, tokens=1), "tokens (1)")
    error_of(lambda: Captions(folder).load(), folder, "captions.txt")
    (tmp_path / "captions.txt").write_text("image,caption\n1.jpg\n")
    error_of(lambda: Captions(folder).load(), "line 2", "captions.txt")
    (tmp_path / "captions.txt").write_text("image,caption\n1.jpg,one\n2.jpg,two\n")
    error_of(lambda: Captions(folder, holdout=1).load(), "1.jpg")


def test_keys_that_do_not_match_are_refused() -> None:
    def pairs(left: Source, right: Source, **options: object) -> None:
        Pairs({"left": left, "right": right}, **options).load()  # type: ignore[arg-type]

    error_of(lambda: pairs(Keyed([1, 2, 3]), Keyed([3, 2])), "key id 1", "left", "right", "train")
    error_of(lambda: pairs(Keyed([1, 2]), Keyed([5, 6], [2, 2]), key="code"), "key code 2", "2 times", "right")
    error_of(lambda: pairs(Keyed([1]), Keyed([1]), key="name"), "left", "'name'")
    error_of(lambda: pairs(Keyed([1]), Keyed([1]), field="z"), "left", "'z'")
    error_of(lambda: pairs(Keyed([1]), Keyed([1]), key="x"), "key 'x'", "left", "float32")
    error_of(lambda: pairs(Keyed([1, 1001]), Keyed([1, 1001])), "key id 1001", "train", "test")
    error_of(lambda: Pairs({"left": Keyed([1])}), "sources (left)")
    error_of(lambda: Pairs({"left": Keyed([1]), "id": Keyed([1])}), "'id'")


def test_a_name_that_the_label_has_is_refused() -> None:
    with pytest.raises(ValueError, match="the name 'y' is that of the label of the first source, too"):
        Pairs({"y": Digits(), "right": Digits()}).load()


def test_a_key_that_does_not_match_ends_the_command_with_one_line(tmp_path: Path) -> None:
    config = tmp_path / "pairs.yaml"
    config.write_text(
        """
data:
  class_path: mixdist.data.Pairs
  init_args:
    sources:
      left: {class_path: mixdist.data.Digits}
      right: {class_path: mixdist.data.Digits, init_args: {test_fraction: 0.3}}
mixture:
  class_path: mixdist.mixtures.Soft
  init_args:
    gate: {class_path: mixdist.gates.Softmax, init_args: {field: left}}
    expert: {class_path: mixdist.experts.VAE, init_args: {field: left}}
    num_experts: 2
"""
    )
    ended = refusal_of("train", "--config", config, "--out", tmp_path / "run", named=["key id", "left", "right"])
    assert "Traceback" not in ended.err


OWN = """
from enum import Enum
from mixdist.data import Digits, Source


class Shade(Enum):
    DARK = 1
    LIGHT = 2


class Own(Source):
    def __init__(self, parts: dict[str, Source], rates: dict[int, float], kinds: set[str], shade: Shade = Shade.DARK):
        self.given = sorted(parts), type(parts["a"]).__name__, rates, kinds, shade.name

    def load(self):
        return Digits().load()
"""


def test_a_run_s_config_is_read_again_whatever_holds_its_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written beside a run gives the same objects: dicts of classes, sets and names of an Enum, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("own_holder.py").write_text(OWN)
    digits = {"class_path": "mixdist.data.Digits"}
    own = {"parts": {"b": digits, "a": digits}, "rates": {3: 0.5}, "kinds": ["x", "y"], "shade": "LIGHT"}
    source = {"class_path": "own_holder.Own", "init_args": own}
    pairs = {"class_path": "mixdist.data.Pairs", "init_args": {"sources": {"left": source, "right": digits}}}
    parser, path = config_parser("mixdist train"), write_config(Path("c.yaml"), changed(data=pairs))
    text = dump(parse(parser, ["--config", path]))
    assert "Namespace" not in text
    Path("again.yaml").write_text(text)
    assert dump(parse(parser, ["--config", "again.yaml"])) == text
    made = read_config(Path("again.yaml")).data
    assert isinstance(made, Pairs)
    assert made.sources["left"].given == (["a", "b"], "Digits", {3: 0.5}, {"x", "y"}, "LIGHT")  # type: ignore[attr-defined]
