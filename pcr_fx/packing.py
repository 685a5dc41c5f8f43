"""One parameter `[L, ...]` in place of the L parameters of a chain's blocks.

A chain of 1,024 small blocks has thousands of parameters, and to hand each its gradient costs autograd many times what
the chain costs. Packed, those of one operand are one leaf: one gradient, one update by the optimiser. Only `state_dict` and
`load_state_dict` still speak of the blocks' own parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pcr_fx.operands import Source, StackedAttributes

# The submodule that holds the packed parameters.
CONTAINER = "packed"


@dataclass(frozen=True, eq=False)
class Pack:
    """A packed parameter.

    Attributes:
        holder: `_parameters` of the module that holds it.
        name: its name there.
        homes: the parameters that it stands for, block by block, and where they were.
    """

    holder: dict[str, Any]
    name: str
    homes: tuple[Source, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(home.path for home in self.homes)

    @property
    def parameter(self) -> nn.Parameter:
        return self.holder[self.name]

    def __getitem__(self, index: int) -> Tensor:
        """One block's part: so that a pack can be the holder of a source."""
        return self.parameter[index]

    def take_out(self) -> None:
        """Remove the blocks' own parameters."""
        for home in self.homes:
            home.holder.pop(home.name, None)

    def put_back(self) -> None:
        """Give the blocks parameters again, for their forward to be read with."""
        parameter = self.parameter
        for index, home in enumerate(self.homes):
            home.holder[home.name] = nn.Parameter(parameter.detach()[index], parameter.requires_grad)


def pack_operands(root: nn.Module, operands: Sequence[StackedAttributes], other: Iterable[str]) -> list[Pack]:
    """Pack the operands that can be: of parameters that nothing else uses, alike in shape, dtype and `requires_grad`.

    Args:
        root: gets the packed parameters, and hooks through which its `state_dict` keeps its form.
        operands: per-block operands.
        other: the names of all attributes used elsewhere.
    """
    container = nn.Module()
    order = list(root.state_dict())
    used = Counter([*other, *(path for operand in operands for path in operand.paths)])
    again = {path for path, count in used.items() if count > 1}
    packs = []
    for operand in operands:
        values = operand.values()
        if not _are_alike(values) or not again.isdisjoint(operand.paths):
            continue
        name = _common_name(operand.paths, container)
        stacked = torch.stack([value.detach() for value in values])
        container.register_parameter(name, nn.Parameter(stacked, values[0].requires_grad))
        packs.append(Pack(container._parameters, name, tuple(operand.sources)))
    if packs:
        root.add_module(CONTAINER, container)
        root._pcr_order = order  # type: ignore[assignment]
        root._register_state_dict_hook(_unpack_state)
        root.register_load_state_dict_pre_hook(_pack_state)
    return packs


def _are_alike(values: Sequence[Any]) -> bool:
    first = values[0]
    return len({id(value) for value in values}) == len(values) and all(
        type(value) is nn.Parameter
        and (value.shape, value.dtype, value.device, value.requires_grad)
        == (first.shape, first.dtype, first.device, first.requires_grad)
        for value in values
    )


def _common_name(names: Sequence[str], container: nn.Module) -> str:
    """What the names have in common, without their dots: "blocks.0.inner.weight", ... -> "blocks_inner_weight"."""
    parts = zip(*(name.split(".") for name in names), strict=False)
    same = "_".join(part[0] for part in parts if len(set(part)) == 1) or "parameter"
    number = 0
    name = same
    while name in container._parameters:
        number += 1
        name = f"{same}_{number}"
    return name


def _unpack_state(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """The state by the blocks' own names, in the model's own order."""
    for pack in module._pcr_packs:
        stacked = state.pop(f"{prefix}{CONTAINER}.{pack.name}")
        for path, part in zip(pack.paths, stacked.unbind(0), strict=True):
            state[prefix + path] = part
    for name in module._pcr_order:
        if prefix + name in state:
            state[prefix + name] = state.pop(prefix + name)


def _pack_state(
    module: Any,
    state: dict[str, Any],
    prefix: str,
    _metadata: Any,
    _strict: bool,
    missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    """A state by the blocks' own names, as the container takes it; what is not given stays as it is."""
    for pack in module._pcr_packs:
        parts = list(pack.parameter.detach().unbind(0))
        for index, path in enumerate(pack.paths):
            given = state.pop(prefix + path, None)
            if given is None:
                missing.append(prefix + path)
            elif given.shape != parts[index].shape:
                errors.append(f"size mismatch for {prefix + path}: {list(given.shape)} for {list(parts[index].shape)}")
            else:
                parts[index] = given
        state[f"{prefix}{CONTAINER}.{pack.name}"] = torch.stack(parts)
