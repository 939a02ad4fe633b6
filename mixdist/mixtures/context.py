"""What a rank makes modules with, each a function of the seed and its numbers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from mixdist.messages import PACKAGE, describe_failure, failing_class, one_line
from mixdist.mixtures.guards import guarded
from mixdist.mixtures.probe import Fault
from mixdist.noise import Purpose, weights_seed
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Wire
from mixdist.terms import Batch, Spec

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Context:
    """What a rank gives a mixture to make its modules with.

    Args:
        seed: of the run.
        dtype: of parameters and real numbers.
        spec: the fields of stored rows.
        mesh: this rank's place.
        wire: the counted collectives.
    """

    seed: int
    dtype: torch.dtype
    spec: Spec
    mesh: Mesh
    wire: Wire

    def make(self, make: Callable[[], M], purpose: Purpose, number: int = 0, round: int = 0, key: str = "mixture") -> M:
        """Return a module with its initial weights, a function of the seed and the numbers given alone.

        Args:
            make: makes the module on the CPU, its weights from torch's global generator.
            purpose: of the draws.
            number: of the expert, if it is one.
            round: of a competition.
            key: of the module in the config, for messages.

        Raises:
            Fault: it cannot be made, or draws from another generator.
        """
        with guarded() as touched:  # the global generator is put back as it was
            torch.manual_seed(weights_seed(self.seed, purpose, number, round))
            module = _made(key, make)
        kind = type(module).__name__
        foreign = [name for name in touched.drawn_from if not name.startswith("torch's")]
        if foreign:
            raise Fault(
                f"{key}: {kind}.__init__ draws from {foreign[0]}, so that the run would be no function of its seed: "
                f"draw weights from torch's global generator, as torch.randn does"
            )
        if touched.changed:
            raise Fault(f"{key}: {kind}.__init__ changes {touched.changed[0]}: leave it as it is")
        return module.to(self.dtype).to(self.mesh.device)

    def values(self, rows: Batch, fields: Iterable[str]) -> Batch:
        """Turn the named stored fields into numbers; the id stays."""
        return {"id": rows["id"], **{name: self.spec[name].values(rows[name], self.dtype) for name in fields}}


def _made(key: str, make: Callable[[], M]) -> M:
    """Make a module; tell what fails, and what is not ready to be used."""
    try:
        module = make()
        if isinstance(module, nn.Module):
            found = [*module.named_parameters(), *module.named_buffers()]
    except Exception as error:
        kind = failing_class(error)
        if isinstance(error, (ValueError, OSError)) and _raised_in_package(error):
            if not key.endswith("]"):
                raise  # its own words say where it comes from, but not which of a list
            raise Fault(f"{key}: {one_line(str(error))}") from error
        if not kind:
            raise Fault(f"{key} cannot be made ({describe_failure(error)}): {_remedy(error)}") from error
        said = isinstance(error, ValueError) and one_line(str(error))
        if said:
            raise Fault(f"{key}: {kind}.__init__: {said}") from error
        raise Fault(f"{key}: {kind}.__init__ fails ({describe_failure(error)}): {_remedy(error)}") from error
    if not isinstance(module, nn.Module):
        raise Fault(f"{key} makes {type(module).__name__}, expected a torch.nn.Module: return one, or name its class")
    for name, tensor in found:
        if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
            inner = module.get_submodule(name.rpartition(".")[0])
            raise Fault(
                f"{key}: {type(module).__name__} has {name} without a shape ({type(inner).__name__}), and no optimiser "
                f"takes it: give the layer its number of inputs, as spec['x'].num_values has it"
            )
    return module


def _raised_in_package(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(PACKAGE)


def _remedy(error: BaseException) -> str:
    if isinstance(error, TypeError):
        return "take the data's spec first, a gate also the number of experts, and the config's init_args after them"
    if isinstance(error, AttributeError):
        return "call super().__init__() before all else, or fix it"
    return "fix it"
