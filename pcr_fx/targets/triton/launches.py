"""Kernels on their way from text to a launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from pcr_fx.body.isolation import isolated

# The kernels' arguments by type: whole numbers, and pointers to words of 64 bits. All others but `tolerance` and constants
# are pointers to numbers of the chain's dtype.
_WHOLE = ("length", "samples", "limit", "group", "run", "skip_solved", "columns", "chunk", "chunks", "iteration")
_WORDS = ("messages", "ends", "ticket")


@dataclass(frozen=True)
class Launch:
    """A kernel as it is compiled for a chain.

    Attributes:
        name: which kernel, and direction.
        function: Triton's.
        signature: the Triton type of each argument.
        constants: arguments that are compiled in.
        warps: of a program.
        stages: of the loops that Triton pipelines; 1 where it is to leave loads where they are.
    """

    name: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int = 1

    @classmethod
    def of(
        cls, name: str, function: Any, dtype: torch.dtype, constants: dict[str, Any], warps: int, stages: int = 1
    ) -> Launch:
        real = {torch.float32: "fp32", torch.float64: "fp64"}[dtype]
        # A number of Python's is a float32 to Triton, whatever the tensors are.
        kinds = {**dict.fromkeys(_WHOLE, "i32"), **dict.fromkeys(_WORDS, "*i64"), "tolerance": "fp32"}
        kinds.update(dict.fromkeys(constants, "constexpr"))
        signature = {argument: kinds.get(argument, f"*{real}") for argument in function.arg_names}
        return cls(name, function, signature, constants, warps, stages)


@dataclass(eq=False)
class Loader:
    """The kernels of one source, each printed and loaded when first asked for.

    Attributes:
        text: prints the kernel of a name and a direction.
    """

    text: Callable[[str, str], str]
    _loaded: dict[tuple[str, str], Any] = field(default_factory=dict)

    def kernel(self, name: str, direction: str) -> Any:
        if (name, direction) not in self._loaded:
            self._loaded[name, direction] = self._load(name, direction)
        return self._loaded[name, direction]

    @isolated
    def _load(self, name: str, direction: str) -> Any:
        from pcr_fx.targets.triton.build import load_module

        return getattr(load_module(self.text(name, direction)), name)
