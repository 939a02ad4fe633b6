"""Every module can be imported, and the examples of its docstrings run; what is public has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import mixdist

MODULES = [m.name for m in pkgutil.walk_packages(mixdist.__path__, "mixdist.") if m.name != "mixdist.__main__"]
PUBLIC = ("experts", "gates", "nets", "mixtures", "competition", "data")

# Classes of these packages without an example; a name that has one goes from this list, and none is added.
WITHOUT: dict[str, set[str]] = {
    "experts": set(),
    "gates": set(),
    "nets": set(),
    "mixtures": {
        *("Ensemble", "Mixture", "RoutingPlan", "Scores"),
        # What a family is handed and what it returns: nobody makes them by hand.
        *("Context", "Evaluation", "ExpertEvaluation", "Facts", "Model", "Request", "Stage", "Study"),
    },
    "competition": {
        *("Assignment", "HardMixture", "Rounds", "Rules", "Score"),
    },
    "data": {"Cifar10", "Idx", "Samples", "Shards"},
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    torch.manual_seed(0)
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("package", PUBLIC)
def test_public_classes_have_an_example(package: str) -> None:
    module = importlib.import_module(f"mixdist.{package}")
    classes = {name: item for name in module.__all__ if inspect.isclass(item := getattr(module, name))}
    without = {name for name, item in classes.items() if ">>> " not in (item.__doc__ or "")}
    assert without <= WITHOUT[package], "give each an example: a few lines in a section `Examples:` of its docstring"
