"""configs/mnist_moe.yaml against the loss of seed document 000's authors, written plainly: no word of mixdist in it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixdist.config.build import build_mixture
from mixdist.config.options import parse
from mixdist.config.parsing import config_parser, make_config
from mixdist.data import Dataset, Loader
from mixdist.engines import Native
from mixdist.mixtures import Soft
from mixdist.noise import Moment, Purpose
from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh, Placement
from mixdist.terms import Field
from tests.launch import ROOT

WEIGHTS = ("layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias")


def plain(x: Tensor, eps: Tensor, gate: list[Tensor], experts: list[tuple[list[Tensor], list[Tensor]]]) -> Tensor:
    """Their loss: mean_n sum_i p_ni (-sum_pixels log N(x; xhat_i, 0.5) + KL_i) + 0.1 Var_i(sum_n p_ni)."""

    def network(x: Tensor, weights: list[Tensor]) -> Tensor:
        first, first_bias, last, last_bias = weights
        return 1 / (1 + torch.exp(-(x @ first + first_bias))) @ last + last_bias

    losses = []
    for e, (encoder, decoder) in enumerate(experts):
        both = network(x, encoder)
        mu, var = both[:, :10], both[:, 10:].exp()
        xhat = 1 / (1 + torch.exp(-network(mu + var.sqrt() * eps[e], decoder)))
        reconstruction = ((x - xhat) ** 2 / (2 * 0.5**2) + math.log(0.5) + 0.5 * math.log(2 * math.pi)).sum(1)
        losses.append(reconstruction - 0.5 * (1 + var.log() - mu**2 - var).sum(1))
    powers = network(x, gate).exp()
    p = powers / powers.sum(1, keepdim=True)
    importance = p.sum(0)
    variance = ((importance - importance.mean()) ** 2).mean()
    return (torch.stack(losses, 1) * p).sum(1).mean() + 0.1 * variance


@pytest.mark.parametrize("execution", ["loop", "stacked"])
def test_loss_and_gradients_are_the_authors(execution: str) -> None:
    """100 rows, as many as their batch; the same weights and noise; every gradient to 1e-10 of its largest number."""
    words = ["--config", str(ROOT / "configs" / "mnist_moe.yaml"), "--dtype", "float64"]
    parser = config_parser()
    config = make_config(parser, parse(parser, [*words, "--mixture.execution", execution]))
    assert (config.train.batch_size, config.mixture.num_experts, config.train.accumulate) == (100, 10, 1)
    pixels = torch.randint(0, 256, (100, 1, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    spec = {"x": Field((1, 28, 28), torch.uint8, scale=1 / 255)}
    mesh = Mesh(Placement.plan(10, 1), Launch(0, 1), torch.device("cpu"), 60.0)
    mixture = build_mixture(config, spec, mesh)
    assert isinstance(mixture, Soft)
    shard = Loader(Dataset({"id": torch.arange(100), "x": pixels}, spec), 100, config.seed, 0, 0, 1).batch(0, 0)
    at = Moment(config.seed, 0, 7)
    config.train.objective.anneal(7)

    def leaves(module: dict[str, Tensor], net: str) -> list[Tensor]:
        return [module[f"{net}.{name}"].detach().clone().requires_grad_() for name in WEIGHTS]

    owned = {one.expert: dict(one.module.named_parameters()) for one in mixture.parts.owned()}
    gate = leaves(owned[None], "net")
    experts = [(leaves(owned[e], "encoder"), leaves(owned[e], "decoder")) for e in range(10)]
    pairs = [(owned[None], "net", gate)]
    for e, (encoder, decoder) in enumerate(experts):
        pairs += [(owned[e], "encoder", encoder), (owned[e], "decoder", decoder)]
    engine = Native(mixture.parts, mesh, mixture.context.wire, config.train.optimizer)
    engine.zero_grad()
    outcome = mixture.backward(shard, config.train.objective, at, 1, None)
    engine.step(outcome, 0)  # from here on a stack's gradients stand at its experts, too
    x = shard.rows["x"].flatten(1).double() / 255
    eps = at.draw(Purpose.POSTERIOR).normal(shard.rows["id"], list(range(10)), (10,), torch.float64)
    loss = plain(x, eps, gate, experts)
    loss.backward()
    assert outcome.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    for module, net, theirs in pairs:
        for name, leaf in zip(WEIGHTS, theirs, strict=True):
            ours = module[f"{net}.{name}"].grad
            assert ours is not None
            assert leaf.grad is not None
            assert (ours - leaf.grad).abs().max() <= 1e-10 * leaf.grad.abs().max(), (net, name)
