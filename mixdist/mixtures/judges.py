"""Classifiers that judge what a mixture of modalities generates.

Shape letters: R rows, M modalities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from mixdist.data import Samples
from mixdist.experts import Modality
from mixdist.mixtures.guards import guarded
from mixdist.mixtures.proposals import PRESENT
from mixdist.nets import MLP, Conv, Network, Text
from mixdist.noise import Purpose, permutation, weights_seed

if TYPE_CHECKING:
    from mixdist.mixtures.multimodal import Multimodal

STEPS, EPOCHS, BATCH, RATE = 600, 60, 128, 2e-3
AT_ONCE = 1000
TOLD = (
    f"of each modality a classifier (images: convolutions of 16 and 32 channels; texts: of 64; vectors: 128 hidden "
    f"units) trained on training rows for {STEPS} batches of {BATCH}, at most {EPOCHS} epochs, Adam {RATE:g} falling "
    f"to 0, seed 0: the same for every run on the same rows"
)


class Judges:
    """Classifiers of this rank's modalities by the label of rows.

    They are a function of the training rows alone, not of the mixture nor of the run's seed, so that runs are judged
    alike; each rank trains those of its own modalities.

    Args:
        mixture: says which modalities are here.
        train: training rows, with a label.
    """

    def __init__(self, mixture: Multimodal, train: Samples) -> None:
        self.mixture = mixture
        self.networks = {e: self._trained(e, expert, train) for e, expert in mixture.modalities.items()}

    @torch.no_grad()
    def predict(self, e: int, x: Tensor) -> Tensor:
        """Return the class of what modality e looks like, as numbers (R, *shape of x_e): int64 (R,).

        -1 where no training row has the modality: there is nothing to judge by.
        """
        network, flat = self.networks[e], self.mixture.modalities[e].numbers({self.mixture.modalities[e].field: x})
        if network is None:
            return torch.full((len(flat),), -1, device=flat.device)
        found: Tensor = network(flat).argmax(-1)
        return found

    def _trained(self, e: int, expert: Modality, train: Samples) -> nn.Module | None:
        label, device = train.label, self.mixture.context.mesh.device
        assert label is not None
        with guarded():  # the global generator is put back as it was
            torch.manual_seed(weights_seed(0, Purpose.JUDGE, e))
            network = _network(expert).encoder(expert.row, train.num_classes or 1)
        network = network.to(self.mixture.dtype).to(device)
        optimizer, num_seen = torch.optim.Adam(network.parameters(), lr=RATE), 0
        each, extra = -(-len(train) // BATCH), self.mixture.extra_fields
        steps = min(STEPS, EPOCHS * each)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for step in range(steps):
            if step % each == 0:
                order = permutation(0, 0, step // each, len(train), e, Purpose.JUDGE)
            places = order[step % each * BATCH :][:BATCH]
            stored = {n: c.to(device) for n, c in train.take(places, fields=(expert.field, label, *extra)).items()}
            there = stored[PRESENT][:, e].bool() if extra else torch.ones(len(places), dtype=torch.bool, device=device)
            x = expert.numbers(self.mixture.values(stored, (expert.field,)))[there]
            with torch.enable_grad():
                loss = functional.cross_entropy(network(x), stored[label].long()[there], reduction="sum")
                optimizer.zero_grad()
                (loss / max(1, len(x))).backward()
            optimizer.step()
            schedule.step()
            num_seen += len(x)
        return network.eval() if num_seen else None


def _network(expert: Modality) -> Network:
    row = expert.row
    if expert.is_text and len(row) == 2 and row[0] > 1:
        return Text(32, (64,))
    image = len(row) == 3 and row[0] in (1, 3) and min(row[1:]) >= 8
    return Conv((16, 32)) if image else MLP((128,))
