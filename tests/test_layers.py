"""The shape of the code, read from its imports and names without running it.

`FLOORS` is the order of the package: a module may import its own room and rooms on floors below it, nothing beside or
above. The other tables say who may name what.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mixdist"

# Rooms (files or folders of mixdist/) from the bottom up; rooms on one line stand side by side.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("terms", "version"),
    ("stats", "kde", "noise", "nets", "pulse", "manifest", "messages", "process"),
    ("convnets",),
    ("data", "experts", "gates"),
    ("routing", "objectives", "health", "importance", "discriminators", "assignment"),
    ("scores",),
    ("mesh", "phases"),
    ("wire",),
    ("route", "collectives"),
    ("reader",),
    ("rules", "pieces"),
    ("dispatch",),
    ("mixtures",),
    ("engines", "evidence", "density"),
    ("checkpoint", "metrics", "evaluate", "pictures"),
    ("trainer", "gallery", "entrant"),
    ("scoring", "removal", "chronicle"),
    ("competition",),
    ("config",),
    ("complaints",),
    ("options",),
    ("parsing", "build"),
    ("model",),
    ("ending",),
    ("commands", "data_commands", "shard_commands"),
    ("train_command",),
    ("cli",),
    ("__init__", "__main__"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Rooms of pure mathematics, and what none of them may import.
PURE = (*FLOORS[0], "stats", "kde", "noise", "nets", "convnets", "experts", "gates", *FLOORS[4], *FLOORS[5])
PROCESSES = ("torch.distributed", "mixdist.mesh", "mixdist.wire", "mixdist.dispatch", "mixdist.config", "mixdist.build")
NEVER: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("experts",), ("mixdist.gates",)),
    (("gates",), ("mixdist.experts",)),
    (PURE, PROCESSES),
)

# A library: the only places (prefixes of module names) that may import it.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "deepspeed": ("mixdist.engines.deepspeed",),
    "webdataset": ("mixdist.data",),
    "torch.distributed": (
        "mixdist.mesh",
        "mixdist.wire",
        "mixdist.dispatch",
        "mixdist.engines",
        "mixdist.checkpoint",
    ),
}

NAMES_THAT_SAY_NOTHING = {"utils", "common", "helpers"}
PICKLES = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
IN_README = ("mixdist", "configs", "launch", "benchmarks")
NOT_IN_README = {"py.typed"}


class Import(NamedTuple):
    """One imported (or, for `torch.distributed`, used) dotted name."""

    line: int
    target: str


class Module(NamedTuple):
    name: str  # dotted, "mixdist.experts.vae"; a package's __init__ bears the package's name
    path: str  # from the root of the checkout
    is_package: bool
    tree: ast.Module

    @property
    def room(self) -> str:
        return room_of(self.name)

    def at(self, line: int) -> str:
        return f"{self.path}:{line}"


def room_of(name: str) -> str:
    """The room of a dotted name under mixdist: "mixdist.experts.vae" -> "experts", "mixdist" -> "__init__"."""
    return [*name.split("."), "__init__"][1]


def is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def dotted(node: ast.expr) -> str | None:
    """`a.b.c` as text, or None for anything but a chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        stem = dotted(node.value)
        return None if stem is None else f"{stem}.{node.attr}"
    return None


def parse(name: str, path: str, source: str) -> Module:
    return Module(name, path, path.endswith("__init__.py"), ast.parse(source, filename=path))


def read_modules() -> list[Module]:
    modules = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules.append(parse(name, path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")))
    return modules


def imports_of(module: Module) -> Iterator[Import]:
    """Every import, wherever it stands: `from a import b` gives "a.b", since b may be a module.

    `torch.distributed.x` reached through a plain `import torch` counts as an import of torch.distributed.
    """
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parts = module.name.split(".")
                base = parts[: len(parts) - node.level + module.is_package]
                source = ".".join([*base, source] if source else base)
            for alias in node.names:
                yield Import(node.lineno, f"{source}.{alias.name}")
        elif isinstance(node, ast.Attribute) and dotted(node) == "torch.distributed":
            yield Import(node.lineno, "torch.distributed")


def target_room(target: str) -> str | None:
    """The room that an imported name lies in; None outside mixdist. `from mixdist import load` is "__init__"."""
    if not is_under(target, "mixdist"):
        return None
    room = room_of(target)
    return room if room in FLOOR_OF or (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file() else "__init__"


# The rules. Each yields one line for each breach; an empty stream is a pass.


def not_in_the_table(module: Module) -> Iterator[str]:
    if module.room not in FLOOR_OF:
        yield f"{module.path}: room '{module.room}' is not in FLOORS; add it to tests/test_layers.py on its floor"


def upward_imports(module: Module) -> Iterator[str]:
    for line, target in imports_of(module):
        room = target_room(target)
        if room is None or room == module.room or module.room not in FLOOR_OF:
            continue
        if room not in FLOOR_OF:
            yield (
                f"{module.at(line)}: imports {target}, whose room '{room}' is not in FLOORS; "
                "add it to tests/test_layers.py on its floor"
            )
        elif FLOOR_OF[room] >= FLOOR_OF[module.room]:
            where = "beside" if FLOOR_OF[room] == FLOOR_OF[module.room] else "above"
            yield f"{module.at(line)}: imports {target}, but '{room}' lies {where} '{module.room}'; imports point down"


def forbidden_imports(module: Module) -> Iterator[str]:
    for rooms, targets in NEVER:
        if module.room not in rooms:
            continue
        for line, target in imports_of(module):
            yield from (
                f"{module.at(line)}: imports {target}, but '{module.room}' never imports {never}"
                for never in targets
                if is_under(target, never)
            )


def misplaced_libraries(module: Module) -> Iterator[str]:
    for line, target in imports_of(module):
        for library, places in ONLY_IN.items():
            if is_under(target, library) and not any(is_under(module.name, place) for place in places):
                yield f"{module.at(line)}: imports {target}, but {library} belongs only in {', '.join(places)}"


def names_that_say_nothing(module: Module) -> Iterator[str]:
    if not NAMES_THAT_SAY_NOTHING.isdisjoint(module.name.split(".")):
        yield f"{module.path}: name the file after what it holds, not {' or '.join(sorted(NAMES_THAT_SAY_NOTHING))}"


def unsafe_calls(module: Module) -> Iterator[str]:
    for line, target in imports_of(module):
        if any(is_under(target, name) for name in PICKLES):
            yield f"{module.at(line)}: imports {target}; nothing here is pickled: use safetensors or JSON"
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        flags = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        if called in ("eval", "exec", "builtins.eval", "builtins.exec"):
            yield f"{module.at(node.lineno)}: calls {called}; parse the value instead"
        if called == "torch.load" and flags.get("weights_only") is not True:
            yield f"{module.at(node.lineno)}: torch.load without weights_only=True"
        if "allow_pickle" in flags and flags["allow_pickle"] is not False:
            yield f"{module.at(node.lineno)}: {called} with allow_pickle={flags['allow_pickle']}"


RULES = (
    not_in_the_table,
    upward_imports,
    forbidden_imports,
    misplaced_libraries,
    names_that_say_nothing,
    unsafe_calls,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule):
    modules = read_modules()
    assert modules, f"no Python file under {PACKAGE}"
    breaches = [breach for module in modules for breach in rule(module)]
    assert not breaches, "\n" + "\n".join(breaches)


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (not_in_the_table, "mixdist/novelty.py", ""),
        (upward_imports, "mixdist/terms.py", "import mixdist.trainer"),
        (upward_imports, "mixdist/terms.py", "from mixdist import noise"),
        (upward_imports, "mixdist/trainer.py", "from mixdist import load"),
        (upward_imports, "mixdist/stats.py", "from .noise import draw"),
        (upward_imports, "mixdist/engines/__init__.py", "from ..trainer import Trainer"),
        (upward_imports, "mixdist/engines/native.py", "def step():\n    from .. import cli"),
        (forbidden_imports, "mixdist/gates/softmax.py", "from mixdist.experts.vae import VAE"),
        (forbidden_imports, "mixdist/experts/vae.py", "from .. import gates"),
        (forbidden_imports, "mixdist/experts/vae.py", "from torch import distributed"),
        (forbidden_imports, "mixdist/noise.py", "import torch\ntorch.distributed.get_rank()"),
        (forbidden_imports, "mixdist/objectives.py", "import mixdist.config as config"),
        (misplaced_libraries, "mixdist/engines/native.py", "import deepspeed"),
        (misplaced_libraries, "mixdist/trainer.py", "from webdataset import WebDataset"),
        (misplaced_libraries, "mixdist/trainer.py", "import torch.distributed as dist"),
        (misplaced_libraries, "mixdist/data/loader.py", "from torch.distributed.nn import all_reduce"),
        (names_that_say_nothing, "mixdist/data/utils.py", ""),
        (names_that_say_nothing, "mixdist/common/shapes.py", ""),
        (unsafe_calls, "mixdist/checkpoint.py", "from pickle import loads"),
        (unsafe_calls, "mixdist/checkpoint.py", "torch.load(path)"),
        (unsafe_calls, "mixdist/checkpoint.py", "torch.load(path, weights_only=False)"),
        (unsafe_calls, "mixdist/data/idx.py", "numpy.load(path, allow_pickle=True)"),
        (unsafe_calls, "mixdist/build.py", "eval(text)"),
    ],
)
def test_a_breach_is_seen(rule, path, source):
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert list(rule(parse(name, path, source)))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("mixdist/experts/vae.py", "import torch.distributions\nfrom mixdist import nets\nfrom .affine import Affine"),
        ("mixdist/engines/native.py", "import torch.distributed as dist\nfrom mixdist.mesh import Placement"),
        ("mixdist/engines/deepspeed.py", "def start():\n    import deepspeed"),
        ("mixdist/data/__init__.py", "import webdataset\nfrom .digits import Digits"),
        ("mixdist/evaluate.py", "expert.eval()\ntorch.load(path, weights_only=True)"),
        ("mixdist/__init__.py", "from mixdist.model import load"),
    ],
)
def test_what_is_allowed_passes(path, source):
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert [breach for rule in RULES for breach in rule(parse(name, path, source))] == []


# README's tree.


def readme_tree() -> list[str]:
    """The names in README's tree: what stands before the description in the ```text block that draws mixdist/."""
    readme = ROOT / "README.md"
    assert readme.is_file(), "README.md is missing"
    blocks = re.findall(r"^```text[ \t]*\n(.*?)^```", readme.read_text(encoding="utf-8"), flags=re.M | re.S)
    trees = [block for block in blocks if re.search(r"^\W*mixdist/", block, flags=re.M)]
    assert trees, "README.md has no ```text block with a line that starts with mixdist/"
    # Names may share a line ("mlp.yaml, conv.yaml  two sizes"); two spaces or more begin the description.
    columns = [
        re.split(r" {2,}|\t", re.sub(r"^[\s│├└─|]*", "", line))[0] for tree in trees for line in tree.splitlines()
    ]
    return [name.rsplit("/", 1)[-1] for column in columns for name in re.split(r"[,\s]+", column) if name]


def described_files() -> list[Path]:
    """Every file that README's tree has to name."""
    return [
        path.relative_to(ROOT)
        for folder in IN_README
        for path in sorted((ROOT / folder).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.name not in NOT_IN_README
    ]


def test_readme_tree_names_every_file():
    named = Counter(readme_tree())
    files = described_files()
    # One name may belong to several folders: it is then needed as often. Only __init__.py is enough once.
    needed = Counter({path.name for path in files if path.name == "__init__.py"})
    needed.update(path.name for path in files if path.name != "__init__.py")
    missing = [path.as_posix() for path in files if named[path.name] < needed[path.name]]
    assert not missing, "README.md's tree lacks a line for: " + ", ".join(missing)


def test_readme_tree_names_no_file_that_is_gone():
    there = {path.name for folder in (*IN_README, "tests", "docs") for path in (ROOT / folder).rglob("*.py")}
    there |= {path.name for path in ROOT.glob("*.py")}
    gone = [name for name in readme_tree() if name.endswith(".py") and name not in there]
    assert not gone, "README.md's tree names files that do not exist: " + ", ".join(gone)
