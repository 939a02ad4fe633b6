"""``mixdist baseline vae``: one expert of a mixture, trained by the code of ``mixdist train``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from mixdist.baselines.model import ABOUT
from mixdist.baselines.single import alone, epochs_for, expert_of, widened
from mixdist.cli.evaluate import evaluate_checkpoint
from mixdist.cli.train import check_unused, run_training
from mixdist.config.build import Session
from mixdist.config.config import Config
from mixdist.config.experts import num_parameters
from mixdist.config.options import explained
from mixdist.config.parsing import make_config, plain
from mixdist.data import Samples, Source, Splits
from mixdist.data.sources.splits import load_splits


class Loaded(Source):
    """A source whose data is there already: it is read once, to count its rows and to train.

    Args:
        splits: what the source loaded.
    """

    def __init__(self, splits: Splits) -> None:
        self.splits = splits

    def load(self) -> Splits:
        return self.splits


def train_alone(parser: ArgumentParser, parsed: Namespace, config: Config, stem: str) -> None:
    """Derive the config of one expert, train it and evaluate it; every rank calls it.

    Raises:
        ValueError: the family has no experts, their widths are not known, or the data does not fit.
    """
    if parsed.num_samples < 1:
        raise ValueError(f"--num_samples ({parsed.num_samples}) must be 1 or more: give 100 for a usual estimate")
    if parsed.out:
        check_unused(Path(parsed.out))
    source = Loaded(config.data.load())
    train = load_splits(source, config.valid).train
    one, about = derive(parsed, config, train)
    with explained(parser):
        derived = parser.parse_object(one)
    derived.out, derived.config = parsed.out, [f"{stem}.yaml"]
    single = dataclasses.replace(make_config(parser, derived), data=source)
    beside = {ABOUT: (json.dumps(about, indent=2) + "\n").encode()}

    def judge(session: Session, run: Path) -> None:
        for split in ["test"] if session.valid is None else ["valid", "test"]:
            options = {"split": split, "num_samples": parsed.num_samples, "mixture": derived.mixture}
            evaluate_checkpoint(single, session, options, run)

    run_training(derived, single, beside=beside, then=judge)


def derive(parsed: Namespace, config: Config, train: Samples) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config of the one expert, and what it has and spends beside the mixture.

    Args:
        parsed: the config and the options of the command.
        config: made of it.
        train: the training rows.
    """
    described = {name: plain(parsed[name]) for name in Config.__dataclass_fields__}
    mixture, stages = config.mixture, [*config.pretrain, config.train]
    expert = expert_of(described, parsed.expert)
    count = lambda one: num_parameters(one, train.spec)  # noqa: E731
    listed = described["mixture"]["init_args"]["expert"]
    whole = sum(map(count, listed)) if isinstance(listed, list) else mixture.num_experts * count(expert)
    if parsed.size == "mixture":
        expert = widened(expert, whole, count)
    spent = mixture.gradients(stages)
    epochs = epochs_for(spent, mixture.num_experts, parsed.budget)
    steps = [number * -(-len(train) // stage.batch_size) for number, stage in zip(epochs, stages, strict=True)]
    one = alone(described, expert, epochs, list(zip(mixture.schedule_steps(stages, len(train)), steps, strict=True)))
    if mixture.program is not None:
        one["checkpoint"]["every"] = None  # it does not count steps
    return one, {
        "kind": "vae",
        "size": parsed.size,
        "budget": parsed.budget,
        "expert": parsed.expert,
        "parameters": count(expert),
        "mixture_parameters": whole,
        "sample_gradients": sum(epochs) * len(train),
        "mixture_sample_gradients": round(sum(spent) * len(train)),
    }
