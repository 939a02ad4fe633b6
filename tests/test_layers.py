"""The shape of the code, read from its imports without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mixdist"

# Rooms (files or folders of mixdist/) from the bottom up: each may import its own room and those on lines above it.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("terms", "noise", "stats", "files", "messages", "arguments"),
    ("nets",),
    ("data", "parallel", "experts", "gates"),
    ("mixtures",),
    ("engines", "evaluation", "baselines"),
    ("training", "report"),
    ("competition",),
    ("config",),
    ("model", "sweep"),
    ("cli",),
    ("__init__", "__main__"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
GROUND = 0  # its files may import each other, though not in a circle

# Libraries and the only places (prefixes of module names) that may import them.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "deepspeed": ("mixdist.engines.deepspeed",),
    "webdataset": ("mixdist.data",),
    "torch.distributed": ("mixdist.parallel", "mixdist.engines", "mixdist.training.checkpoint"),
}
NAMES_THAT_SAY_NOTHING = {"utils", "common", "helpers"}
PICKLES = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
MOST_LINES, MOST_FILES = 350, 8


class Module(NamedTuple):
    name: str  # dotted, "mixdist.experts.vae"; a package's __init__ bears the package's name
    path: str  # from the root of the checkout
    tree: ast.Module
    lines: int = 0

    @property
    def room(self) -> str:
        return room_of(self.name)


def room_of(name: str) -> str:
    """The room of a dotted name under mixdist: "mixdist.experts.vae" -> "experts", "mixdist" -> "__init__"."""
    return [*name.split("."), "__init__"][1]


def is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def parse(path: str, source: str) -> Module:
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return Module(name, path, ast.parse(source, filename=path), source.count("\n"))


def read_modules() -> list[Module]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return [parse(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


def dotted(node: ast.expr) -> str | None:
    """`a.b.c` as text, or None for anything but a chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        stem = dotted(node.value)
        return None if stem is None else f"{stem}.{node.attr}"
    return None


def imports_of(module: Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, wherever it stands: `from a import b` gives "a.b", since b may be a module.

    `torch.distributed.x` reached through a plain `import torch` counts as an import of torch.distributed.
    """
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parts = module.name.split(".")
                base = parts[: len(parts) - node.level + module.path.endswith("__init__.py")]
                source = ".".join([*base, source] if source else base)
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and dotted(node) == "torch.distributed":
            yield node.lineno, "torch.distributed"


def upward_imports(module: Module) -> Iterator[str]:
    if module.room not in FLOOR_OF:
        yield f"{module.path}: room '{module.room}' is not in FLOORS; add it to tests/test_layers.py on its floor"
        return
    for line, target in imports_of(module):
        if not is_under(target, "mixdist"):
            continue
        room = room_of(target) if room_of(target) in FLOOR_OF else "__init__"
        here, there = FLOOR_OF[module.room], FLOOR_OF[room]
        if room != module.room and there >= here and not there == here == GROUND:
            yield f"{module.path}:{line}: imports {target}: '{room}' is not below '{module.room}'; imports point down"


def misplaced_libraries(module: Module) -> Iterator[str]:
    for line, target in imports_of(module):
        for library, places in ONLY_IN.items():
            if is_under(target, library) and not any(is_under(module.name, place) for place in places):
                yield f"{module.path}:{line}: imports {target}, but {library} belongs only in {', '.join(places)}"


def unsafe_calls(module: Module) -> Iterator[str]:
    for line, target in imports_of(module):
        if any(is_under(target, name) for name in PICKLES):
            yield f"{module.path}:{line}: imports {target}; nothing here is pickled: use safetensors or JSON"
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        called, where = dotted(node.func), f"{module.path}:{node.lineno}"
        flags = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        if called in ("eval", "exec", "builtins.eval", "builtins.exec"):
            yield f"{where}: calls {called}; parse the value instead"
        if called == "torch.load" and flags.get("weights_only") is not True:
            yield f"{where}: torch.load without weights_only=True"
        if "allow_pickle" in flags and flags["allow_pickle"] is not False:
            yield f"{where}: {called} with allow_pickle={flags['allow_pickle']}"


def names_and_sizes(module: Module) -> Iterator[str]:
    if not NAMES_THAT_SAY_NOTHING.isdisjoint(module.name.split(".")):
        yield f"{module.path}: name the file after what it holds"
    if module.lines > MOST_LINES:
        yield f"{module.path} has {module.lines} lines, at most {MOST_LINES}: split it"


RULES = (upward_imports, misplaced_libraries, unsafe_calls, names_and_sizes)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule):
    modules = read_modules()
    assert modules, f"no Python file under {PACKAGE}"
    breaches = [breach for module in modules for breach in rule(module)]
    assert not breaches, "\n" + "\n".join(breaches)


def circle(modules: list[Module]) -> list[str]:
    """A circle of files that import each other when they are loaded, or nothing."""
    names = {module.name for module in modules}
    graph: dict[str, set[str]] = {}
    for module in modules:
        loaded = [node for node in module.tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        found = imports_of(module._replace(tree=ast.Module(loaded, [])))
        prefixes = [[target, target.rpartition(".")[0]] for _, target in found]
        graph[module.name] = {next((p for p in pair if p in names), "") for pair in prefixes} - {""}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_circle():
    assert circle(read_modules()) == []
    two = [parse("mixdist/a.py", "import mixdist.b"), parse("mixdist/b.py", "from mixdist import a")]
    assert set(circle(two)) == {"mixdist.a", "mixdist.b"}


def test_the_top_level_is_small():
    files = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert len(files) <= MOST_FILES, files


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (upward_imports, "mixdist/novelty.py", ""),
        (upward_imports, "mixdist/terms.py", "import mixdist.training"),
        (upward_imports, "mixdist/training/trainer.py", "from mixdist import load"),
        (upward_imports, "mixdist/engines/__init__.py", "from ..training import trainer"),
        (upward_imports, "mixdist/engines/native.py", "def step():\n    from .. import cli"),
        (upward_imports, "mixdist/gates/softmax.py", "from mixdist.experts.vae import VAE"),
        (upward_imports, "mixdist/experts/vae.py", "from .. import gates"),
        (upward_imports, "mixdist/experts/vae.py", "from mixdist.parallel import wire"),
        (misplaced_libraries, "mixdist/experts/vae.py", "from torch import distributed"),
        (misplaced_libraries, "mixdist/noise/draws.py", "import torch\ntorch.distributed.get_rank()"),
        (misplaced_libraries, "mixdist/engines/native.py", "import deepspeed"),
        (misplaced_libraries, "mixdist/training/trainer.py", "from webdataset import WebDataset"),
        (names_and_sizes, "mixdist/data/utils.py", ""),
        (names_and_sizes, "mixdist/data/long.py", "\n" * 351),
        (unsafe_calls, "mixdist/training/checkpoint.py", "from pickle import loads"),
        (unsafe_calls, "mixdist/training/checkpoint.py", "torch.load(path)"),
        (unsafe_calls, "mixdist/training/checkpoint.py", "torch.load(path, weights_only=False)"),
        (unsafe_calls, "mixdist/data/order.py", "numpy.load(path, allow_pickle=True)"),
        (unsafe_calls, "mixdist/model.py", "eval(text)"),
    ],
)
def test_a_breach_is_seen(rule, path, source):
    assert list(rule(parse(path, source)))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("mixdist/noise/draws.py", "from mixdist.terms import Batch"),
        ("mixdist/experts/vae.py", "import torch.distributions\nfrom mixdist import nets\nfrom .affine import Affine"),
        ("mixdist/engines/native.py", "import torch.distributed as dist\nfrom mixdist.parallel.mesh import Mesh"),
        ("mixdist/engines/deepspeed.py", "def start():\n    import deepspeed"),
        ("mixdist/data/__init__.py", "import webdataset\nfrom .order import Epoch"),
        ("mixdist/evaluation/evaluate.py", "expert.eval()\ntorch.load(path, weights_only=True)"),
        ("mixdist/__init__.py", "from mixdist.model import load"),
    ],
)
def test_what_is_allowed_passes(path, source):
    assert [breach for rule in RULES for breach in rule(parse(path, source))] == []
