"""An optimizer that was made for a model, on its way to the packed parameters of a copy of it.

Of an optimizer that works on each number by itself it makes no difference whether L parameters are L tensors or the rows of
one. Its groups and what it keeps of each parameter move to the packed ones; `state_dict` and `load_state_dict` still speak of
the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn, optim

from pcr_fx.errors import UnsupportedError

# Those of `torch.optim` that update each number of a parameter from its own gradients alone. Not their subclasses, which may
# take a norm of the whole.
ELEMENTWISE: tuple[type[optim.Optimizer], ...] = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Adagrad,
    optim.Adadelta,
    optim.Rprop,
    optim.ASGD,
)
# What they keep of a parameter as one number, which follows from the number of steps. All else has the parameter's shape.
_NUMBERS = frozenset({"step", "mu_product", "eta", "mu"})


def check_optimizer(optimizer: Any) -> None:
    """Raise `UnsupportedError` for what cannot follow its parameters into packed ones."""
    if not isinstance(optimizer, optim.Optimizer):
        raise UnsupportedError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if type(optimizer) not in ELEMENTWISE:
        allowed = ", ".join(kind.__name__ for kind in ELEMENTWISE)
        raise UnsupportedError(
            f"{type(optimizer).__name__} is not known to update each number of a parameter by itself, so that packed parameters "
            f"might be trained otherwise than the model's own; of torch.optim, these can be: {allowed}"
        )


@dataclass(frozen=True)
class _Slot:
    """One parameter of a group, and what was in the group in its place.

    Attributes:
        name: how the group calls it.
        positions: where those that it stands for were in the group.
        names: how the group called them.
        part: the shape of each, where they are rows of it.
    """

    name: str
    positions: tuple[int, ...]
    names: tuple[str, ...]
    part: torch.Size | None = None

    @property
    def is_packed(self) -> bool:
        return self.part is not None


@dataclass(frozen=True)
class Joined:
    """A packed parameter.

    Attributes:
        name: its path in the model.
        parameter: `[L, ...]`.
        members: the parameters that it stands for, in the copy of the model.
    """

    name: str
    parameter: nn.Parameter
    members: Sequence[nn.Parameter]


class MovingOptimizer:
    """An optimizer between the parameters of a model and those of a copy, which are being packed.

    Args:
        optimizer: one of a class in `ELEMENTWISE`.
        copies: the parameters of the copy, by the `id` of those that they are copies of.

    Raises:
        UnsupportedError: none of its parameters is the model's.
    """

    def __init__(self, optimizer: optim.Optimizer, copies: Mapping[int, Any]) -> None:
        self.optimizer, self.copies = optimizer, copies
        # By the `id` of a copy: its group, and the parameter that the optimizer has.
        self._known: dict[int, tuple[int, nn.Parameter]] = {}
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                if id(parameter) in copies:
                    self._known[id(copies[id(parameter)])] = number, parameter
        if not self._known:
            raise UnsupportedError(f"none of the parameters of the {type(optimizer).__name__} is one of the model")

    def why_apart(self, members: Sequence[Any]) -> str:
        """Why parameters of the copy cannot be one for the optimizer; empty if they can, or are none of its own."""
        known = [self._known[id(member)] for member in members if id(member) in self._known]
        if not known:
            return ""
        if len(known) < len(members):
            return f"the optimizer has {len(known)} of them"
        groups = sorted({number for number, _ in known})
        if len(groups) > 1:
            return f"they are in groups {groups[0]} and {groups[1]} of the optimizer"
        if len({parameter.grad is None for _, parameter in known}) > 1:
            return "only some have a gradient"
        return _why_unlike([self.optimizer.state.get(parameter, {}) for _, parameter in known], members[0].shape)

    def finish(self, packs: Sequence[Joined]) -> None:
        """Exchange the parameters in the optimizer, with what it keeps of them, and have `state_dict` keep its form."""
        pack_of = {id(member): pack for pack in packs for member in pack.members if id(member) in self._known}
        layout = [self._move_group(group, pack_of) for group in self.optimizer.param_groups]
        for pack in packs:
            if id(pack.members[0]) in self._known:
                self._move_pack(pack)
        for original in [parameter for _, parameter in self._known.values()]:
            copy = self.copies[id(original)]
            if id(copy) not in pack_of:
                copy.grad = None if original.grad is None else original.grad.detach().clone()
                if original in self.optimizer.state:
                    self.optimizer.state[copy] = self.optimizer.state.pop(original)
        names = _Names(layout)
        # State dicts take their usual form before others see them, and lose it only after.
        self.optimizer.register_state_dict_post_hook(names.unpack, prepend=True)
        self.optimizer.register_load_state_dict_pre_hook(names.pack)

    def _move_group(self, group: dict[str, Any], pack_of: Mapping[int, Joined]) -> list[_Slot]:
        """Replace the parameters of a group, in the lists that others may hold. A pack takes the place of its first member."""
        copies = [self.copies.get(id(parameter), parameter) for parameter in group["params"]]
        names = group.get("param_names") or [""] * len(copies)
        position = {id(copy): index for index, copy in enumerate(copies)}
        slots: list[_Slot] = []
        parameters: list[nn.Parameter] = []
        placed: set[int] = set()
        for index, copy in enumerate(copies):
            pack = pack_of.get(id(copy))
            if pack is None:
                slots.append(_Slot(names[index], (index,), (names[index],)))
                parameters.append(copy)
            elif id(pack) not in placed:
                placed.add(id(pack))
                places = tuple(position[id(member)] for member in pack.members)
                slots.append(_Slot(pack.name, places, tuple(names[place] for place in places), pack.members[0].shape))
                parameters.append(pack.parameter)
        group["params"][:] = parameters
        if "param_names" in group:
            group["param_names"][:] = [slot.name for slot in slots]
        return slots

    def _move_pack(self, pack: Joined) -> None:
        originals = [self._known[id(member)][1] for member in pack.members]
        gradients = [original.grad for original in originals if original.grad is not None]
        if gradients:
            pack.parameter.grad = torch.stack(gradients)
        states = [self.optimizer.state.pop(original, {}) for original in originals]
        if states[0]:
            self.optimizer.state[pack.parameter] = _joined(states)


class _Names:
    """State dicts in terms of the parameters that an optimizer had before they were packed.

    Args:
        layout: the slots of each group. What is added to the optimizer later stands behind them, as it is.
    """

    def __init__(self, layout: Sequence[Sequence[_Slot]]) -> None:
        self.layout = layout

    def _slots(self, number: int) -> list[_Slot]:
        return list(self.layout[number]) if number < len(self.layout) else []

    def unpack(self, optimizer: optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        """A state dict of the packed parameters, as one of those that they stand for; their states are views of the packs'."""
        groups: list[dict[str, Any]] = []
        states: dict[Any, Any] = {}
        for group in given["param_groups"]:
            slots = self._slots(len(groups))
            slots = _with_others(slots, len(group["params"]) - len(slots))
            first = sum(len(before["params"]) for before in groups)
            for slot, key in zip(slots, group["params"], strict=True):
                if key in given["state"]:
                    states.update(_states_by_key(slot, given["state"][key], first))
            groups.append(_unpack_group(group, slots, first))
        return _state_dict(given, dict(sorted(states.items())), groups)

    def pack(self, optimizer: optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        """A state dict of the parameters that the packed ones stand for, as one of these.

        Raises:
            ValueError: it is one of other parameters.
            UnsupportedError: what it has of parameters that are one now differs in what one has only once.
        """
        groups: list[dict[str, Any]] = []
        states: dict[Any, Any] = {}
        if len(given["param_groups"]) != len(optimizer.param_groups):
            return given  # which PyTorch refuses in its own words
        for group in given["param_groups"]:
            keys, slots = group["params"], self._slots(len(groups))
            if len(keys) < _plain_count(slots):
                raise ValueError(
                    f"loaded state dict has {len(keys)} parameters in group {len(groups)}, and {_plain_count(slots)} are "
                    "expected: the model's, as they were before they were packed"
                )
            slots = _with_others(slots, len(keys) - _plain_count(slots))
            for slot in slots:
                those = [keys[position] for position in slot.positions]
                if state := _join_loaded(slot, [given["state"].get(key, {}) for key in those]):
                    states[those[0]] = state
            groups.append(_pack_group(group, slots))
        return _state_dict(given, states, groups)


def _with_others(slots: list[_Slot], count: int) -> list[_Slot]:
    """With those of `count` parameters that are behind them."""
    first = _plain_count(slots)
    return slots + [_Slot("", (first + index,), ("",)) for index in range(count)]


def _plain_count(slots: Sequence[_Slot]) -> int:
    return sum(len(slot.positions) for slot in slots)


def _state_dict(given: dict[str, Any], states: dict[Any, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Another form of `given`. What it has beside the states of parameters stays."""
    keys = {key for group in given["param_groups"] for key in group["params"]}
    others = {key: value for key, value in given["state"].items() if key not in keys}
    return {**given, "state": {**states, **others}, "param_groups": groups}


def _states_by_key(slot: _Slot, state: Mapping[str, Any], first: int) -> Iterator[tuple[int, Any]]:
    for index, position in enumerate(slot.positions):
        yield first + position, _row(state, index) if slot.is_packed else state


def _unpack_group(group: dict[str, Any], slots: Sequence[_Slot], first: int) -> dict[str, Any]:
    count = _plain_count(slots)
    unpacked = {**group, "params": list(range(first, first + count))}
    if "param_names" in group:
        names: dict[int, str] = {}
        for slot, name in zip(slots, group["param_names"], strict=True):
            names.update(zip(slot.positions, slot.names if slot.is_packed else (name,), strict=True))
        unpacked["param_names"] = [names[position] for position in range(count)]
    return unpacked


def _pack_group(group: dict[str, Any], slots: Sequence[_Slot]) -> dict[str, Any]:
    packed = {**group, "params": [group["params"][slot.positions[0]] for slot in slots]}
    if names := group.get("param_names"):
        packed["param_names"] = [slot.name if slot.is_packed else names[slot.positions[0]] for slot in slots]
    return packed


def _join_loaded(slot: _Slot, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if slot.part is None:
        return states[0]
    if reason := _why_unlike(states, slot.part):
        raise UnsupportedError(
            f"what is loaded for the {len(states)} parameters in {slot.name} cannot be packed: {reason}"
        )
    return _joined(states)


# --- what is kept of a parameter --------------------------------------------------------------------------------------


def _is_whole(name: str, value: Any) -> bool:
    """Whether this has a number for each number of the parameter."""
    return isinstance(value, Tensor) and name not in _NUMBERS


def _why_unlike(states: Sequence[Mapping[str, Any]], shape: torch.Size) -> str:
    """Why what is kept of parameters of one shape cannot be one; empty if it can."""
    first = states[0]
    if any(state.keys() != first.keys() for state in states):
        return "the optimizer keeps more of some than of others"
    for name, value in first.items():
        values = [state[name] for state in states]
        if _is_whole(name, value):
            other = next((v for v in values if not isinstance(v, Tensor) or v.shape != shape), None)
            if other is not None:
                return f"their {name} is {_in_words(other)}, and they have the shape {list(shape)}"
        elif (other := next((v for v in values if not _is_same(v, value)), None)) is not None:
            return f"they differ in {name}, {_in_words(value)} and {_in_words(other)}"
    return ""


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (a is not None and b is not None and bool(a == b))


def _in_words(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{value.item():g}" if value.numel() == 1 else f"of shape {list(value.shape)}"


def _joined(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is kept of L parameters, as that of one `[L, ...]`."""
    return {
        name: torch.stack([state[name] for state in states]) if _is_whole(name, value) else _own(value)
        for name, value in states[0].items()
    }


def _row(state: Mapping[str, Any], index: int) -> dict[str, Any]:
    """What is kept of one parameter in a pack."""
    return {name: value[index] if _is_whole(name, value) else _own(value) for name, value in state.items()}


def _own(value: Any) -> Any:
    """A number that others may count on by themselves."""
    return value.clone() if isinstance(value, Tensor) else value
