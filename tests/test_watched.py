"""What is done to a transformed module's parameters from step to step, without a look at all of the module at the next call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import ResidualNet
from torch import Tensor, nn

import pcr_fx
from pcr_fx.operands import Source, StackedAttributes
from pcr_fx.targets import PointerTable
from pcr_fx.watched import Changes

QUICK = {"kernels": False, "planning": "estimated"}


class Asking(ResidualNet):
    """Computes something else in another dtype, and with other classes of parameters."""

    def forward(self, x: Tensor) -> Tensor:
        factor = 2.0 if self.head.weight.dtype == torch.float32 else 1.0
        return factor * super().forward(x.to(self.stem.weight.dtype))


class AskingForStrides(ResidualNet):
    """Computes something else where its weights lie in another order."""

    def forward(self, x: Tensor) -> Tensor:
        return (2.0 if self.head.weight.is_contiguous() else 1.0) * super().forward(x)


class Special(nn.Parameter):
    pass


@pytest.mark.parametrize("pack", [False, True])
def test_a_training_loop_changes_nothing_that_is_looked_at(pack: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3)
    fast: Any = pcr_fx.transform(ResidualNet(9), x, QUICK, pack_parameters=pack)
    before = fast._pcr_changes.count
    for _ in range(2):
        fast.zero_grad()
        fast(x).sum().backward()
        nn.utils.clip_grad_norm_(fast.parameters(), 1.0)
        assert not hasattr(fast.blocks[3], "absent") and len(fast.state_dict()) == 40
    assert fast._pcr_changes.count == before
    fast.blocks[3].inner = fast.blocks[4].inner
    assert fast._pcr_changes.count > before


@pytest.mark.parametrize("pack", [False, True])
def test_data_that_is_put_into_listed_parameters_is_seen(pack: bool) -> None:
    torch.manual_seed(0)
    model: Any = Asking(9)
    x = torch.randn(2, 3)
    fast: Any = pcr_fx.transform(model, x, QUICK, pack_parameters=pack)
    for dtype in (torch.float32, torch.float64, torch.float32):
        for module in (model, fast):
            for parameter in module.parameters():
                parameter.data = parameter.data.to(dtype)
        torch.testing.assert_close(fast(x), model(x))
        assert fast(x).dtype == dtype


def test_another_order_in_memory_is_seen() -> None:
    torch.manual_seed(0)
    model, x = AskingForStrides(9), torch.randn(2, 3)
    fast = pcr_fx.transform(model, x, QUICK)
    torch.testing.assert_close(fast(x), model(x))
    for parameter in fast.parameters():
        parameter.data = parameter.data.t().contiguous().t() if parameter.dim() == 2 else parameter.data
    assert not model.head.weight.is_contiguous()
    torch.testing.assert_close(fast(x), model(x))


def test_listed_parameters_that_are_of_another_class_now_are_not_read_in_place() -> None:
    held = {name: nn.Parameter(torch.randn(2, 2)) for name in "abc"}
    changes = Changes()
    operand = StackedAttributes([Source(name, held, name) for name in held], changes)
    table = operand.look()
    assert isinstance(table, PointerTable)
    changes.listings += 1
    assert operand.look() is table
    held["b"].__class__ = Special
    changes.listings += 1
    assert operand.look() is held["b"]
