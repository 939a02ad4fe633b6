"""Experts that start from one trained model, and the clusters of its latents: the same bits on every layout.

Shape letters: N rows, L latent, K clusters (as many as experts).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from mixdist.arguments import check_fields
from mixdist.data import Samples
from mixdist.experts import Expert
from mixdist.gates import Gate
from mixdist.gates.gaussians import ClusterName, Clusters, fit_clusters
from mixdist.messages import report
from mixdist.mixtures import Context, ExpertStart
from mixdist.mixtures.clustered import clusters_of, nearest
from mixdist.noise import Draw, Purpose
from mixdist.parallel.agreement import Agreed, agreed
from mixdist.parallel.collectives import OverBatch
from mixdist.terms import Batch, misfit
from mixdist.training.checkpoint import CheckpointStore, read_tensors, tensors_of
from mixdist.training.manifest import file_name, read_manifest
from mixdist.training.selection import Which, choose_checkpoint


@dataclass(frozen=True)
class Upcycled(ExpertStart):
    """Every expert starts with the weights of one trained model: the only expert of another run.

    Without noise each expert is that model, so at step 0 a mixture's density is the model's. Which rows an expert then
    learns from starts from clusters of the means of the model's q(z|x) of training rows: a competition's first table
    with ``start: clusters``; a soft mixture's gate with :class:`mixdist.gates.LatentGMM`.

    Args:
        run: the run's directory. Its mixture has one expert, of the same class and sizes as those here; give it the
            same training rows, so that what was held out stays so.
        weights: of the run's best checkpoint, where it selects one, else the newest; or of the newest in any case.
        trains: parts of an expert that learn, as their names in it, such as ``decoder.net`` or ``likelihood``: the
            others stay the model's, bit for bit, in all experts, and have neither gradients nor optimiser states;
            unset, all learn.
        noise: each weight w of an expert that learns becomes w (1 + noise eps), eps standard normal, keyed by seed,
            expert and place; 0 for none.
        clusters: of a competition's first table: kmeans, each row to the nearest centre; mixture, to the most probable
            component of a diagonal mixture of Gaussians (EM). Both from k-means++, in float64.
        rows: training rows that clusters are fitted to; of more, so many, chosen by the seed. All rows are assigned.

    Raises:
        ValueError: noise that is negative or no number; no rows; no parts.

    Examples:
        >>> from mixdist.training import Upcycled
        >>> Upcycled("runs/one", noise=0.01).clusters
        'kmeans'
    """

    run: str
    weights: Which = "best"
    noise: float = 0.0
    clusters: ClusterName = "kmeans"
    rows: int = 20_000
    trains: Sequence[str] | None = None
    # What was told of damaged checkpoints: experts, a gate and a first table read the run, and it is told once.
    _passed_over: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self, "mixture.expert_start.")
        if not 0 <= self.noise < 1:
            raise ValueError(f"mixture.expert_start.noise ({self.noise}) must be from 0 to below 1: give 0 for none")
        if self.rows < 1:
            raise ValueError(f"mixture.expert_start.rows ({self.rows}) must be at least 1: give more")
        if self.trains is not None and (not self.trains or isinstance(self.trains, str)):
            raise ValueError(
                f"mixture.expert_start.trains ({self.trains or '[]'}) must be a list with the names of one part or "
                f"more, such as [decoder.net]: give some, or leave it out for all"
            )

    def prepare(self, expert: Expert) -> None:
        if self.trains is None:
            return
        parts, found = tuple(self.trains), dict(expert.named_parameters())
        learn = {name for name in found if any(_within(name, part) for part in parts)}
        for part in parts:
            if not any(_within(name, part) for name in found):
                self._refuse(
                    f"trains ({part}) is no part of {type(expert).__name__} that has parameters: name some of "
                    f"{', '.join(_parts(found))}, or of what lies in them"
                )
        for name, parameter in found.items():
            parameter.requires_grad_(parameter.requires_grad and name in learn)

    def describe(self) -> dict[str, Any]:
        return {} if self.trains is None else {"expert_start.trains": sorted(self.trains)}

    def told(self, expert: nn.Module) -> str:
        if self.trains is None:
            return ""
        own, all_ = (sum(p.numel() for p in expert.parameters() if p.requires_grad or every) for every in (0, 1))
        parts = ", ".join(self.trains)
        return f"each expert trains {own:,} of its {all_:,} parameters ({parts}); all else stays as in {self.run}"

    @torch.no_grad()
    def start(
        self, context: Context, over_batch: OverBatch, experts: Mapping[int, nn.Module], dataset: Samples
    ) -> None:
        tensors = self._read(context)

        def clone() -> None:
            for e, expert in experts.items():
                self._take(expert, tensors, f"expert {e}")
                if self.noise:
                    perturb(expert, self.noise, context.seed, e)

        agreed(clone, context.mesh.world)

    @torch.no_grad()
    def start_shared(self, context: Context, shared: Mapping[str, nn.Module]) -> None:
        gates = [one.model for one in shared.values() if isinstance(one, Gate) and one.model.can("take_model")]
        if gates:
            tensors = self._read(context)
            agreed(lambda: self._give(gates, tensors), context.mesh.world)

    @torch.no_grad()
    def assign(
        self, context: Context, over_batch: OverBatch, expert: nn.Module, num_experts: int, dataset: Samples
    ) -> np.ndarray:
        mesh, tensors = context.mesh, self._read(context)
        assert isinstance(expert, Expert)
        agreed(lambda: self._ready(expert, tensors), mesh.world)

        def points(rows: Batch) -> Tensor:
            return expert.posterior(rows).mean_RL

        def fit(points_NL: Tensor, seed: int) -> Clusters:
            return self._fit(points_NL, num_experts, seed)

        clusters = clusters_of(context, over_batch, dataset, expert.fields, points, fit, num_experts, self.rows)
        return nearest(context, over_batch, dataset, expert.fields, points, clusters)

    def _read(self, context: Context) -> dict[str, Tensor]:
        """Return the trained model's tensors by name; every rank calls it."""
        mesh = context.mesh
        store = CheckpointStore(Path(self.run) / "checkpoints", mesh)
        try:
            path, passed_over = choose_checkpoint(store, self.weights)
        except Agreed as error:
            raise Agreed(f"mixture.expert_start.run ({self.run}): {error}") from None
        for sentence in passed_over:
            if mesh.rank == 0 and sentence not in self._passed_over:
                report(f"mixture.expert_start.run ({self.run}): {sentence}; using {path.name}")
        self._passed_over[:] = passed_over
        return agreed(lambda: self._tensors(path), mesh.world)

    def _tensors(self, path: Path) -> dict[str, Tensor]:
        number = read_manifest(path)["num_experts"]
        if number != 1:
            self._refuse(f"run ({self.run}) has {number} experts, expected 1: name the run of the one model")
        return tensors_of("model", read_tensors(path / file_name("expert", 0)))

    def _take(self, expert: nn.Module, tensors: Mapping[str, Tensor], who: str) -> None:
        """Give an expert the model's weights."""
        own = expert.state_dict()
        wrong = misfit(tensors, own)
        if wrong:
            self._refuse(f"{self.run} does not fit {who}: {wrong}; give the expert the class and sizes of that run's")
        for name, value in own.items():
            value.copy_(tensors[name])

    def _give(self, gates: Sequence[Gate], tensors: Mapping[str, Tensor]) -> None:
        for gate in gates:
            try:
                gate.take_model(tensors)
            except ValueError as error:
                self._refuse(f"mixture.gate ({type(gate).__name__}): {error}")

    def _ready(self, expert: Expert, tensors: Mapping[str, Tensor]) -> None:
        if not expert.can("posterior"):
            kind = type(expert).__name__
            self._refuse(f"clusters are of latents, and {kind} has none: set mixture.start to all, split or table")
        self._take(expert, tensors, "the experts")
        expert.eval()

    def _fit(self, points_NL: Tensor, num_clusters: int, seed: int) -> Clusters:
        try:
            return fit_clusters(points_NL, num_clusters, seed, self.clusters)
        except ValueError as error:
            self._refuse(str(error))

    def _refuse(self, why: str) -> NoReturn:
        raise ValueError(f"mixture.expert_start (Upcycled): {why}")


def _within(name: str, part: str) -> bool:
    """Return whether a parameter, by its dotted name, is a part of a module or lies in it."""
    return name == part or name.startswith(f"{part}.")


def _parts(names: Iterable[str]) -> list[str]:
    """Return the first two words of dotted names, each once."""
    return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))


@torch.no_grad()
def perturb(expert: nn.Module, noise: float, seed: int, e: int) -> None:
    """Multiply each weight that learns by 1 + noise eps: no sum over weights, so the same bits on every layout."""
    for place, parameter in enumerate(expert.parameters()):
        if not parameter.requires_grad:
            continue
        draw = Draw(seed, Purpose.CLONE, step=place)
        eps = draw.normal(torch.zeros(1, dtype=torch.int64), [e], tuple(parameter.shape), torch.float64)[0, 0]
        parameter.copy_(parameter.cpu().double() * (1 + noise * eps))
