"""Hooks of a module as two ops of a graph: what runs before its forward, and what runs after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_modules
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree
from torch.utils.hooks import BackwardHook, RemovableHandle

from pcr_fx.errors import CaptureError

# Hooks that compute a weight from other parameters, which is part of the forward: they are traced with it.
_PART_OF_FORWARD = (BasePruningMethod, SpectralNorm, WeightNorm)
_KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_part_of_forward(hook: Any) -> bool:
    return isinstance(hook, _PART_OF_FORWARD)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module runs hooks that are no part of its forward."""
    held = module.__dict__
    return bool(of_modules._has_any_global_hook()) or any(
        not is_part_of_forward(hook) for kind in _KINDS for hook in (held.get(kind) or {}).values()
    )


def numbers_of_hooks(module: nn.Module) -> list[tuple[int, ...]]:
    """Which hooks a module has: PyTorch numbers all that are ever registered."""
    return [tuple(module.__dict__.get(kind) or ()) for kind in _KINDS]


class HookWatch(Protocol):
    """Who looks after the graph that a hook op is part of."""

    def changed(self) -> str:
        """What hooks changed of what the graph takes for granted, in words; empty if nothing."""

    def blame(self, reason: str) -> None:
        """The graph is not used any more, since hooks do what it cannot follow."""


class HookOp:
    """An op that runs hooks of a module: those that it has when the op runs.

    Its inputs are tensors; what else the module is given or returns, and how all that is nested, was known when the graph was
    made. A hook may put other tensors in the place of those that it is given, of the same shapes.

    Args:
        path: of the module, for messages.
        values: what is handed to the hooks: the module's arguments and keyword arguments, or its result.
    """

    __module__ = "pcr_fx.graphs.hooks"
    watch: HookWatch | None = None

    def __init__(self, module: nn.Module, path: str, values: Any) -> None:
        self.module, self.path = module, path
        leaves, self.spec = pytree.tree_flatten(values)
        self.places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.__name__ = f"{type(self).__name__}_of_{type(module).__name__}"
        _refuse_old_hooks(module)

    def assumed(self, given: Sequence[Any]) -> list[Any]:
        """What it returns for such inputs, as far as shapes go."""
        raise NotImplementedError

    def values(self, tensors: Sequence[Any]) -> Any:
        """What was nested, with these tensors in it."""
        leaves = list(self.leaves)
        for index, tensor in zip(self.places, tensors, strict=True):
            leaves[index] = tensor
        return pytree.tree_unflatten(leaves, self.spec)

    def tensors(self, given: Sequence[Tensor], values: Any) -> list[Tensor]:
        """The tensors in what hooks made of it.

        Raises:
            CaptureError: something else than the values of tensors is another than before.
        """
        before = self.values(given)
        if (words := difference(before, values)) or (words := self.watch.changed() if self.watch else ""):
            reason = f"a hook of {self.path} ({type(self.module).__name__}) changes {words}"
            if self.watch is not None:
                self.watch.blame(reason)
            raise CaptureError(
                f"{reason}; the graph of this call was another. Later calls run the model as it was written"
            )
        return tensors_in(values)


class BeforeForward(HookOp):
    """Runs the hooks before a forward; returns the tensors it is to be given, and what `AfterForward` has to know."""

    def assumed(self, given: Sequence[Any]) -> list[Any]:
        return [*given, None]

    def __call__(self, *given: Tensor) -> tuple[Any, ...]:
        module = self.module
        _refuse_old_hooks(module)
        args, kwargs = self.values(given)
        for number, hook in (*of_modules._global_forward_pre_hooks.items(), *module._forward_pre_hooks.items()):
            if is_part_of_forward(hook):
                continue
            if number in module._forward_pre_hooks_with_kwargs:
                result = hook(module, args, kwargs)
                if result is not None:
                    args, kwargs = result
            else:
                result = hook(module, args)
                if result is not None:
                    args = result if isinstance(result, tuple) else (result,)
        backward = None
        before_backward = module._get_backward_pre_hooks()
        after_backward, _ = module._get_backward_hooks()
        if before_backward or after_backward:
            backward = BackwardHook(module, after_backward, before_backward)
            args = backward.setup_input_hook(args)
        return *self.tensors(given, (args, kwargs)), (args, kwargs, backward)


class AfterForward(HookOp):
    """Runs the hooks after a forward; returns the tensors of the result."""

    def assumed(self, given: Sequence[Any]) -> list[Any]:
        return list(given[1:])

    def __call__(self, before: tuple[Any, ...], *given: Tensor) -> tuple[Tensor, ...]:
        module = self.module
        args, kwargs, backward = before
        result = self.values(given)
        for number, hook in (*of_modules._global_forward_hooks.items(), *module._forward_hooks.items()):
            with_kwargs = (
                number in module._forward_hooks_with_kwargs or number in of_modules._global_forward_hooks_with_kwargs
            )
            other = hook(module, args, kwargs, result) if with_kwargs else hook(module, args, result)
            if other is not None:
                result = other
        if backward is not None:
            result = backward.setup_output_hook(result)
        return tuple(self.tensors(given, result))


class TensorHook(HookOp):
    """Registers a hook of a tensor, as the model did when it was traced."""

    def __init__(self, hook: Callable[[Tensor], Tensor | None]) -> None:
        self.hook, self.path, self.__name__ = hook, "a tensor", "register_hook"

    def assumed(self, given: Sequence[Any]) -> list[Any]:
        return []

    def __call__(self, tensor: Tensor) -> RemovableHandle:  # type: ignore[override]
        return tensor.register_hook(self.hook)


def tensors_in(values: Any) -> list[Any]:
    """What to give to an op for these values."""
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _refuse_old_hooks(module: nn.Module) -> None:
    """`register_backward_hook` hooks the last op of a module, of which a rewritten graph may have another."""
    _, old = module._get_backward_hooks()
    if old:
        raise CaptureError(
            f"{type(module).__name__} has a hook of register_backward_hook, which PyTorch itself deprecates; "
            "register_full_backward_hook hooks the module"
        )


def difference(before: Any, after: Any) -> str:
    """What else than the values of tensors is another, in words; empty if nothing is."""
    (ours, spec), (theirs, other) = pytree.tree_flatten(before), pytree.tree_flatten(after)
    if spec == other and all(map(_are_alike, theirs, ours)):
        return ""
    return f"more than the values of tensors: from {_say(before)} to {_say(after)}"


def _are_alike(ours: Any, theirs: Any) -> bool:
    """Whether one is the other, or a tensor of the shape, dtype and device of the other."""
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    return ours is theirs or (not isinstance(ours, Tensor) and not isinstance(theirs, Tensor) and bool(ours == theirs))


def _say(values: Any) -> str:
    def say(leaf: Any) -> Any:
        return f"{leaf.dtype} {list(leaf.shape)}".removeprefix("torch.") if isinstance(leaf, torch.Tensor) else leaf

    return str(pytree.tree_map(say, values))
