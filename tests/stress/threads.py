"""Threads that call one model, beside one that exchanges its parameters and one process that writes into the cache folder."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

import pcr_fx
from stress.models import LIMIT, network, samples


def run(count: int, readers: int = 4) -> list[str]:
    """So many calls in all, of values and of gradients in turn; parameters are exchanged for others of the same values."""
    model, x = network(32, 6), samples(6)
    fast = pcr_fx.transform(model, x, options={"solver": "sequential"})
    expected = model(x).detach()
    gradient = _gradient(model, x)
    over, troubles = threading.Event(), list[str]()

    def read() -> None:
        for index in range(count // readers):
            try:
                if index % 2:
                    ours, theirs = _gradient(fast, x), gradient
                else:
                    with torch.no_grad():
                        ours, theirs = fast(x), expected
                error = (ours - theirs).abs().max().item()
                if not error <= LIMIT:
                    troubles.append(f"call {index} is off by {error:.2e}")
            except Exception as error:
                troubles.append(f"call {index}: {type(error).__name__}: {error}")

    writers = [_exchanging_tensors, _exchanging_parameters]
    threads = [threading.Thread(target=write, args=(fast, over)) for write in writers]
    calls = [threading.Thread(target=read) for _ in range(readers)]
    for thread in (*threads, *calls):
        thread.start()
    for thread in calls:
        thread.join()
    over.set()
    for thread in threads:
        thread.join()
    print(f"{count} calls of {readers} threads beside writers: {len(troubles)} wrong")
    return troubles


def _gradient(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    given = x.clone().requires_grad_()
    return torch.autograd.grad(call(given).sum(), given)[0]


def _exchanging_tensors(model: nn.Module, over: threading.Event) -> None:
    """What `.to()` does: parameters get memory of their own again, and what they had is freed and written over."""
    while not over.is_set():
        for parameter in list(model.parameters()):
            before = parameter.data
            parameter.data = before.clone()
            del before
            torch.full((6, 6), float("nan"))
            over.wait(1e-4)


def _exchanging_parameters(model: nn.Module, over: threading.Event) -> None:
    """What `load_state_dict(assign=True)` does."""
    while not over.is_set():
        for block in model.children():
            for layer in block.children():
                layer.weight = nn.Parameter(layer.weight.detach().clone())
                torch.full((6, 6), float("nan"))
                over.wait(1e-4)
