"""Batch norm in training within blocks: what is normalised, its gradients, and what the running statistics become."""

import copy

import pytest
import torch
from torch import Tensor, nn

import pcr_fx

LENGTH = 9


def model() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.BatchNorm1d(4, momentum=0.3), nn.Linear(4, 4), nn.Tanh()) for _ in range(LENGTH)]
    return nn.Sequential(*blocks).double()


def results(run: nn.Module, original: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = run(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    gradients = torch.autograd.grad((weights * y).sum(), [x, *original.parameters()])
    assert not any(buffer.requires_grad for buffer in original.buffers())
    return [y, *gradients, *(buffer.clone() for buffer in original.buffers())]


@pytest.mark.parametrize("way", ["transform", "compile"])
@pytest.mark.parametrize("solver", ["sequential", "newton"])
def test_blocks_that_update_statistics(way: str, solver: str) -> None:
    ours, theirs = model(), model()
    options = {"solver": solver, "kernels": False}
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(6, 4, dtype=torch.float64, generator=draw)
    before = [buffer.clone() for buffer in ours.buffers()]
    if way == "transform":
        fast: nn.Module = pcr_fx.transform(ours, x, options=options)
    else:
        torch._dynamo.reset()
        fast = torch.compile(ours, backend="deeppcr", options={**options, "inner_backend": "eager"})
    torch.testing.assert_close(before, list(ours.buffers()))
    for _ in range(3):
        x = torch.randn(6, 4, dtype=torch.float64, generator=draw)
        got, expected = results(fast, ours, x), results(theirs, theirs, x)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    report = pcr_fx.report(fast) if way == "transform" else pcr_fx.report()
    assert [chain["length"] for chain in report.to_dict()["chains"]] == [LENGTH]
    fast.eval(), theirs.eval()
    torch.testing.assert_close(fast(x), theirs(x), rtol=1e-9, atol=1e-9)


def test_where_there_is_no_chain_the_op_stays() -> None:
    alone = copy.deepcopy(model()[:3])
    fast = pcr_fx.transform(alone, torch.randn(6, 4, dtype=torch.float64))
    assert not fast.report.chains
