"""The chain: a maximal run of L isomorphic blocks, as one record that every other room passes on; and near misses."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class TensorSpec:
    """What a program needs to know of a tensor before it sees it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def is_differentiable(self) -> bool:
        """Whether such a tensor has a cotangent."""
        return self.dtype.is_floating_point or self.dtype.is_complex

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device)


@dataclass(frozen=True)
class Origin:
    """Where a chain stands in the user's model: what the report says of it."""

    modules: str = ""
    source: str = ""
    ops: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Chain:
    """L blocks z_l = f_l(z_{l-1}) that run the same body.

    Attributes:
        body: one block, called as `body(*states, *operands, *literals, *shared)`, a tuple of the new states. Written
            in the ops that the model was captured in.
        length: L.
        num_states: tensors carried from block to block.
        num_operands: tensors that differ from block to block.
        num_shared: tensors that are the same in every block.
        literals: numbers that differ from block to block, `L` values each.
        origin: where it was found.
    """

    body: fx.GraphModule
    length: int
    num_states: int = 1
    num_operands: int = 0
    num_shared: int = 0
    literals: tuple[tuple[float, ...], ...] = ()
    origin: Origin = field(default_factory=Origin)


@dataclass(frozen=True)
class NearMiss:
    """Blocks that have the makings of a chain, or broke one.

    Attributes:
        modules: where they stand in the model.
        reason: why they are no chain, or none as a whole.
        length: how many blocks they are; 0 if that is not known.
        source: the line of the model that they come from; empty if that is not known.
    """

    modules: str
    reason: str
    length: int = 0
    source: str = ""
