"""README and docs/ keep their word: commands, links, names of configs; every example trains from a file of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mixdist
from mixdist.report.metrics import read_metrics
from tests.launch import ROOT, here

DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("launch/*.md"), *DOCS.rglob("*.md")]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def train(config: str, *argv: str) -> str:
    ended = here("train", "--config", config, *argv)
    assert ended.code == 0, ended.err
    return ended.out


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with every example of docs/extend.md in a file of its own."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(DOCS / "extend.md", "python"):
        named = re.match(r"# (my_\w+\.py)\n", block)
        assert named, block
        (tmp_path / named[1]).write_text(block)
    kinds = ("data", "expert", "family", "gate", "network", "objective", "score")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"my_{kind}.py" for kind in kinds]
    return tmp_path


def test_a_data_set_an_expert_a_gate_and_an_objective_of_your_own(examples: Path) -> None:
    (soft,) = blocks(DOCS / "extend.md", "yaml")
    (examples / "own.yaml").write_text(soft + "log_every: 1\n")
    assert "1000 test rows: loss" in train("own.yaml", "--train.epochs", "3", "--out", "run")
    records = list(read_metrics(examples / "run"))
    losses = [record["loss"] for record in records]
    assert len(losses) == 30
    assert losses[-1] < losses[0]
    explained = (DOCS / "evaluation.md").read_text()
    assert all(f"`{key}`" in explained for record in records for key in record if not key.startswith("loss_"))


def test_a_score_of_your_own_and_the_competition_of_the_docs(examples: Path) -> None:
    (competition,) = blocks(DOCS / "competition.md", "yaml")
    (examples / "hard.yaml").write_text("data: {class_path: my_data.Waves}\n" + competition)
    argv = ["--mixture.rounds", "2", "--train.epochs", "1", "--out"]
    assert "round 2: " in train("hard.yaml", *argv, "hard")
    own = ["--mixture.score", "my_score.Reconstruction", "--mixture.expert.network", "my_network.Gated"]
    assert "round 2: " in train("hard.yaml", *own, *argv, "own")


def test_a_family_of_your_own(examples: Path) -> None:
    (named,) = (block for block in blocks(DOCS / "extend.md", "text") if block.startswith("mixture:"))
    (examples / "family.yaml").write_text(f"data: {{class_path: my_data.Waves}}\nlog_every: 1\n{named}")
    assert "squared_error" in train("family.yaml", "--train.epochs", "3", "--out", "run")
    losses = [record["loss"] for record in read_metrics(examples / "run")]
    assert losses[-1] < losses[0]


def test_the_expert_of_the_readme_is_that_of_the_docs() -> None:
    named = [block for block in blocks(ROOT / "README.md", "python") if block.startswith("# my_")]
    assert named
    assert set(named) <= set(blocks(DOCS / "extend.md", "python"))


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_first_command_is_one_line_and_uses_the_constraints(page: str) -> None:
    first = blocks(ROOT / page, "bash")[0]
    assert len(first.strip().splitlines()) == 1
    assert "-c constraints.txt" in first
    assert "torchrun --standalone --nproc-per-node 2 -m mixdist train --config configs/digits_moe.yaml" in first


def test_the_readme_s_second_command_runs_the_tests() -> None:
    second = blocks(ROOT / "README.md", "bash")[1]
    assert len(second.strip().splitlines()) == 1
    assert "-c constraints.txt" in second
    assert "pytest" in second
    assert mixdist.__version__


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_every_config_is_described() -> None:
    described = set(re.findall(r"^\| `(\w+)`", (DOCS / "configs.md").read_text(), re.M))
    assert described == {path.stem for path in (ROOT / "configs").glob("*.yaml")}


def test_every_package_has_an_api_page() -> None:
    rooms = {path.stem for path in (ROOT / "mixdist").iterdir() if not path.name.startswith("_")} - {"py"}
    shown = re.findall(r"^::: mixdist\.(\w+)$", "\n".join(p.read_text() for p in DOCS.glob("api/*.md")), re.M)
    assert sorted(shown) == sorted(rooms)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
            slugs = {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}
            assert heading in slugs, f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_configs_and_tests_exist(page: Path) -> None:
    for path in re.findall(r"\b((?:configs|tests|benchmarks)/\w+\.(?:yaml|py))\b", page.read_text()):
        assert (ROOT / path).exists() or path == "configs/NAME.yaml", f"{page}: {path}"
