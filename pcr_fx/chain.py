"""The chain: a maximal run of L isomorphic blocks, as one record that every other room passes on; and near misses."""

from __future__ import annotations

import functools
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
class Head:
    """What the blocks of a chain give away beside their states: their outputs.

    Attributes:
        body: of one block, called as `body(*states, *new_states, *operands, *literals, *shared)`, a tuple of the outputs.
            What a block computes on the way to its new states, it computes again.
        block: the block as a whole, called as the chain's body with these operands, literals and shared operands behind
            its own, a tuple of the new states and the outputs.
        num_outputs, num_operands, num_shared, literals: as a chain's; operands and literals may be the chain's too.
    """

    body: fx.GraphModule
    block: fx.GraphModule
    num_outputs: int
    num_operands: int = 0
    num_shared: int = 0
    literals: tuple[tuple[float, ...], ...] = ()

    def reads_old_states(self, num_states: int) -> bool:
        """Whether an output depends on the states that a block is given, and not only on those that it returns."""
        return any(node.users for node in self.body.graph.find_nodes(op="placeholder")[:num_states])


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
        head: its outputs; `None` where it has none.
        is_checkpoint: whether its author has what lies between the states computed again in the backward.
    """

    body: fx.GraphModule
    length: int
    num_states: int = 1
    num_operands: int = 0
    num_shared: int = 0
    literals: tuple[tuple[float, ...], ...] = ()
    origin: Origin = field(default_factory=Origin)
    head: Head | None = None
    is_checkpoint: bool = False


@dataclass(frozen=True)
class Leaving:
    """What leaves a chain: the states that the rest of a graph takes of it, and the outputs, which are counted behind them.

    Attributes:
        taps: those that are taken one by one: (which state or output, of which block).
        whole: those that are taken of all blocks, `[L, ...]`; they come first.
    """

    taps: tuple[tuple[int, int], ...]
    whole: tuple[int, ...] = ()

    @functools.cached_property
    def blocks(self) -> tuple[int, ...]:
        """The blocks of the taps, in order."""
        return tuple(sorted({block for _, block in self.taps}))

    def of_solve(self, chain: Chain) -> Leaving:
        """What has to be taken of the states: all of them where there are outputs to compute."""
        taps = tuple(tap for tap in self.taps if tap[0] < chain.num_states)
        if chain.head is not None:
            return Leaving(taps, tuple(range(chain.num_states)))
        return Leaving(taps, self.whole)


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
