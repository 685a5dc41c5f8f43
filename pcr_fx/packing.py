"""One parameter `[L, ...]` in place of the L parameters of a chain's blocks.

A chain of 1,024 small blocks has thousands of parameters, and to hand each its gradient costs autograd many times what
the chain costs. Packed, those of one operand are one leaf: one gradient, one update by the optimiser. Only `state_dict` and
`load_state_dict` still speak of the blocks' own parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pcr_fx.operands import Source, StackedAttributes
from pcr_fx.watched import Parameters, Part

# The submodule that holds the packed parameters.
CONTAINER = "packed"


@dataclass(frozen=True, eq=False)
class Pack:
    """A packed parameter.

    Attributes:
        holder: `_parameters` of the module that holds it.
        name: its name there.
        homes: the parameters that it stands for, block by block: where they were.
    """

    holder: dict[str, Any]
    name: str
    homes: tuple[Source, ...]

    @property
    def parameter(self) -> nn.Parameter:
        return self.holder[self.name]

    def __getitem__(self, index: int) -> Tensor:
        """One block's part: so that a pack can be the holder of a source."""
        return self.parameter[index]

    def take_out(self) -> None:
        """Have the blocks find their parameters here."""
        for index, home in enumerate(self.homes):
            home.holder.pop(home.name, None)
            home.holder.parts = {**home.holder.parts, home.name: Part(self.holder, self.name, index)}

    def put_back(self) -> None:
        """Give the blocks parameters again, for their forward to be read with."""
        parameter = self.parameter
        for index, home in enumerate(self.homes):
            home.holder.parts = {name: part for name, part in home.holder.parts.items() if name != home.name}
            home.holder[home.name] = nn.Parameter(parameter.detach()[index], parameter.requires_grad)


def pack_operands(
    root: nn.Module,
    operands: Sequence[StackedAttributes],
    other: Iterable[str],
    why_apart: Callable[[Sequence[Any]], str] = lambda values: "",
) -> tuple[list[Pack], list[str]]:
    """Pack the operands that can be: of parameters that nothing else uses, alike in shape, dtype and `requires_grad`.

    Args:
        root: gets the packed parameters, and hooks through which its `state_dict` keeps its form.
        operands: per-block operands.
        other: the names of all attributes used elsewhere.
        why_apart: what else there is against packing some parameters, in words; empty if nothing.

    Returns:
        What was packed; and of what was not, in words, why not.
    """
    container = nn.Module()
    container._parameters = Parameters()
    order = list(root.state_dict())
    used = Counter([*other, *(source.path for operand in operands for source in operand.sources)])
    places = Counter(id(value) for module in root.modules() for value in module._parameters.values())
    packs, notes = [], []
    for operand in operands:
        values = operand.values()
        if not any(isinstance(value, nn.Parameter) for value in values):
            continue
        is_used = any(used[source.path] > 1 for source in operand.sources)
        reason = _why_not(values, places) or ("used elsewhere as well" if is_used else why_apart(values))
        if reason:
            first, count = operand.sources[0].path, len(values)
            notes.append(f"{first} and the {count - 1} like it are not packed: {reason}")
            continue
        name = _common_name([source.path for source in operand.sources], container)
        stacked = torch.stack([value.detach() for value in values])
        container.register_parameter(name, nn.Parameter(stacked, values[0].requires_grad))
        packs.append(Pack(container._parameters, name, tuple(operand.sources)))
    if packs:
        _keep_state_dicts(root, packs, order)
        root.add_module(CONTAINER, container)
        root._modules.aside = (CONTAINER,)  # type: ignore[attr-defined]
    return packs, notes


def _why_not(values: Sequence[Any], places: Counter[int]) -> str:
    """Why the parameters of a column cannot be one; empty if they can."""
    first = values[0]
    if any(places[id(value)] > 1 for value in values) or len({id(value) for value in values}) < len(values):
        return "some of them are one parameter"
    if other := next((type(value) for value in values if type(value) is not nn.Parameter), None):
        return f"some are of type {other.__name__}"
    if any(value._backward_hooks or value._post_accumulate_grad_hooks for value in values):
        return "some have hooks"
    for name in ("shape", "dtype", "device", "requires_grad"):
        differing = next((value for value in values if getattr(value, name) != getattr(first, name)), None)
        if differing is not None:
            return f"they differ in {name}, {getattr(first, name)} and {getattr(differing, name)}"
    return ""


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


# --- state_dict -------------------------------------------------------------------------------------------------------


def _keep_state_dicts(root: nn.Module, packs: Sequence[Pack], order: list[str]) -> None:
    """Have `state_dict` and `load_state_dict` of the root, and of each block, speak of the blocks' own parameters."""
    root.__dict__["_pcr_order"] = order
    homes = {id(home.holder) for pack in packs for home in pack.homes}
    for module in root.modules():
        if id(module._parameters) in homes and module is not root:
            module._register_state_dict_hook(_unpack_own)
            module.register_load_state_dict_pre_hook(_load_own)
    root._register_state_dict_hook(_unpack_state)
    root.register_load_state_dict_pre_hook(_pack_state)


def _parts_of(module: Any) -> dict[str, Part]:
    return getattr(module._parameters, "parts", {})


def _all_parts(root: nn.Module) -> Iterator[tuple[str, Part]]:
    """The parts that modules have now, by path."""
    for path, module in root.named_modules():
        for name, part in _parts_of(module).items():
            yield f"{path}.{name}".lstrip("."), part


def _alone(row: Tensor) -> Tensor:
    """The same memory as a tensor that is not part of a larger one, which those who write files refuse."""
    return row if row.is_meta else torch.from_dlpack(row)


def _unpack_own(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name, part in _parts_of(module).items():
        state[prefix + name] = _alone(part().detach())


def _unpack_state(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """The state by the blocks' own names, in the model's own order; with gradients where these were asked for."""
    packed = {name: state.pop(f"{prefix}{CONTAINER}.{name}") for name in module._modules[CONTAINER]._parameters}
    for path, part in _all_parts(module):
        row = packed[part.name][part.index]
        state[prefix + path] = row if row.requires_grad else _alone(row)
    own = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
    for key in [key for name in module._pcr_order if (key := prefix + name) in own] + list(own):
        state.setdefault(key, own[key])


def _load_own(
    module: Any, state: dict[str, Any], prefix: str, _metadata: Any, _strict: bool, *messages: list[str]
) -> None:
    missing, _, errors = messages
    for name, part in _parts_of(module).items():
        given = state.pop(prefix + name, None)
        if given is None:
            missing.append(prefix + name)
        elif given.shape != part.shape:
            errors.append(f"size mismatch for {prefix + name}: {list(given.shape)} for {list(part.shape)}")
        elif not part.holder[part.name].is_meta:
            part().detach().copy_(given)


def _pack_state(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A state by the blocks' own names, as the container takes it; what is not given, or does not fit, stays as it is.

    The blocks' own hooks tell what that is.
    """
    container = module._modules[CONTAINER]._parameters
    stacks = {name: list(parameter.detach().unbind(0)) for name, parameter in dict.items(container)}
    own = _parts_of(module)
    for path, part in _all_parts(module):
        given = state.pop(prefix + path, None) if path in own else state.get(prefix + path)
        if given is not None and given.shape == part.shape:
            stacks[part.name][part.index] = given
    for name, parts in stacks.items():
        state[f"{prefix}{CONTAINER}.{name}"] = torch.stack(parts)
