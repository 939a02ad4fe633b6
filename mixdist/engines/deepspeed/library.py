"""DeepSpeed itself: imported at first use, quiet, without a compiler, over the groups of the mesh."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from mixdist.messages import one_line
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Group

OLDEST, FIRST_UNKNOWN = (0, 19, 8), (0, 20)
"""Versions from the first to before the second: older ones average gradients, whatever their config says."""


def load(mesh: Mesh) -> Any:
    """Import DeepSpeed for the device of a mesh.

    Its logger tells errors only. Beside a CPU it would compile an operator of its own at the first start, for minutes.

    Raises:
        ValueError: it is not installed, or not in a version that is known here.
    """
    os.environ["DS_ACCELERATOR"] = mesh.device.type
    remedy = "install it with pip install 'mixdist[deepspeed]', or leave engine out (mixdist.engines.Native)"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed.moe.layer
    except ImportError as error:
        raise ValueError(f"engine (DeepSpeed) needs deepspeed ({one_line(str(error))}): {remedy}") from None
    version = deepspeed.__version_major__, deepspeed.__version_minor__, deepspeed.__version_patch__
    if not OLDEST <= version < FIRST_UNKNOWN:
        raise ValueError(
            f"engine (DeepSpeed) needs deepspeed 0.19.8 or newer of 0.19, not {deepspeed.__version__}: {remedy}"
        )
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", r".*all_gather_into_tensor", FutureWarning)
    return deepspeed


def start(
    deepspeed: Any,
    mesh: Mesh,
    optimizer: Optimizer,
    shared: Sequence[nn.Parameter],
    own: Sequence[nn.Parameter],
    config: dict[str, Any],
) -> Any:
    """Return a DeepSpeedEngine over parameters; every rank calls it.

    Args:
        deepspeed: the library.
        mesh: this rank's place.
        optimizer: over the parameters; its groups are made DeepSpeed's.
        shared: what every rank holds.
        own: of this rank's experts.
        config: of DeepSpeed.
    """
    name = _set_groups(deepspeed, mesh)
    optimizer.param_groups[:] = cut(optimizer, [shared, own])
    if own:
        optimizer.param_groups[-1] |= {"moe": True, "name": name}
    for parameter in own:  # marks of an expert's parameter
        parameter.allreduce, parameter.group_name = False, name  # type: ignore[attr-defined]
    for parameter in (*shared, *own):
        # It would send every weight from a first rank to the others: they are alike already.
        parameter.ds_optim_param = True  # type: ignore[attr-defined]
    # It asks for the variable although the device is given.
    os.environ.setdefault("LOCAL_RANK", str(mesh.device.index or 0))
    with warnings.catch_warnings():  # of what it imports
        warnings.simplefilter("ignore")
        engine, *_ = deepspeed.initialize(
            args=SimpleNamespace(device_rank=mesh.device.index or 0),
            model=_model(deepspeed, mesh.placement.num_experts, shared, own),
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,  # unused: a mixture scales its losses itself
                "steps_per_print": None,
                "gradient_allreduce_op": "sum",
                "gradient_clipping": 0.0,  # unset, it is 1
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,  # which would be compiled
                **config,
            },
        )
    assert not engine.gradient_average
    return engine


def cut(optimizer: Optimizer, parts: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """Return the groups of an optimiser made of one list of tensors, cut into those of parts that hold some."""
    (group,) = optimizer.param_groups
    return [{**group, "params": list(part)} for part in parts if part]


def _set_groups(deepspeed: Any, mesh: Mesh) -> str:
    """Hand the mesh's groups to DeepSpeed, whose own would wait for 30 minutes; return the name of the experts' one."""
    groups, placement = deepspeed.utils.groups, mesh.placement
    groups._release_process_group_references()
    world, ep, replicas = (_made(group, mesh) for group in (mesh.world, mesh.ep_group, mesh.replica_group))
    name = f"ep_size_{placement.ep_size}"
    groups._WORLD_GROUP = world
    groups._EXPERT_PARALLEL_GROUP[name], groups._EXPERT_DATA_PARALLEL_GROUP[name] = ep, replicas
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = placement.ep_ranks(mesh.replica)
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = placement.replica_ranks(mesh.member)
    return name


def _made(group: Group, mesh: Mesh) -> dist.ProcessGroup:
    return mesh.alone if group is None else group


def _model(deepspeed: Any, num_experts: int, shared: Sequence[nn.Parameter], own: Sequence[nn.Parameter]) -> nn.Module:
    """Return a module of parameters, in which DeepSpeed finds those of experts; it is never called."""

    class Experts(deepspeed.moe.layer.MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = num_experts
            self.parameters_ = nn.ParameterList(own)

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """Do nothing: groups are there."""

    return nn.ModuleList([nn.ParameterList(shared), *([Experts()] if own else [])])
