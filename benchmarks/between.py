"""`python -m benchmarks.between OLD [NEW] [--rounds 5] [--only softmax]`: what native kernels cost in two commits, in one run.

Each commit is checked out beside the other, and processes of the two take turns; what is told of a chain is the minimum
of all its turns, as every other figure holds what else the machine did. NEW is the working tree where it isn't named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
LENGTH = 1024
SECONDS = 0.4  # that a worker times each call


class Block(nn.Module):
    """x + scale * W2 f(W1 x + b1) + b2."""

    def __init__(self, width: int, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.outer, self.function = nn.Linear(width, width), nn.Linear(width, width), function

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.outer(self.function(self.inner(x)))


class Recurrence(nn.Module):
    """A cell over `LENGTH` inputs `[L, B, w]`, of which the last state is wanted."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        for value in inputs.unbind(0):
            state = self.cell(value, state)
        return state


def softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


def cases() -> Iterator[tuple[str, nn.Module, tuple[Tensor, ...]]]:
    """The chains: a name, a model, its inputs."""
    for function in (torch.tanh, nn.functional.elu, softmax):
        for width, batch in ((4, 1), (8, 1), (16, 1), (8, 32), (16, 32)):
            torch.manual_seed(0)
            model = nn.Sequential(*(Block(width, function) for _ in range(LENGTH)))
            yield f"{function.__name__} w={width} B={batch}", model, (torch.randn(batch, width),)
    for batch in (1, 32):
        torch.manual_seed(0)
        inputs = torch.randn(LENGTH, batch, 16), torch.zeros(batch, 16)
        yield f"GRU w=16 B={batch}", Recurrence(nn.GRUCell(16, 16)), inputs


def work(only: str) -> None:
    """What a process of one of the commits does: print the minima in milliseconds, as JSON.

    Args:
        only: what the names of the chains contain that are measured.
    """
    import pcr_fx

    torch.set_num_threads(1)
    times = {}
    for name, model, inputs in cases():
        if only not in name:
            continue
        pack = isinstance(model, nn.Sequential)
        fast = pcr_fx.transform(model, inputs, pack_parameters=pack)
        parameters = list(fast.parameters())

        def forward(fast: nn.Module = fast, inputs: tuple[Tensor, ...] = inputs) -> None:
            with torch.no_grad():
                fast(*inputs)

        def both(
            fast: nn.Module = fast,
            inputs: tuple[Tensor, ...] = inputs,
            parameters: list[nn.Parameter] = parameters,
        ) -> None:
            for parameter in parameters:
                parameter.grad = None
            fast(*inputs).sum().backward()

        times[f"{name}, forward"] = minimum_ms(forward)
        times[f"{name}, forward + backward"] = minimum_ms(both)
    print(json.dumps(times))


def minimum_ms(function: Callable[[], None]) -> float:
    for _ in range(5):
        function()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def times_of(tree: Path, cache: Path, only: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "PCR_FX_CACHE_DIR": str(cache)}
    command = [sys.executable, __file__, "--worker", "--only", only]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd=tree)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def compare(old: str, new: str | None, rounds: int, only: str) -> None:
    from tabulate import tabulate

    with tempfile.TemporaryDirectory() as folder:
        trees = {}
        for name, commit in (("old", old), ("new", new)):
            trees[name] = ROOT if commit is None else Path(folder, name)
            if commit is not None:
                command = ["git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach", str(trees[name]), commit]
                subprocess.run(command, check=True)
        minima: dict[str, dict[str, float]] = {"old": {}, "new": {}}
        try:
            for _ in range(rounds):
                for name, tree in trees.items():
                    for case, took in times_of(tree, Path(folder, f"cache_{name}"), only).items():
                        minima[name][case] = min(minima[name].get(case, took), took)
        finally:
            for tree in trees.values():
                if tree != ROOT:
                    subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)
    rows = [
        (case, f"{before:.4f}", f"{minima['new'][case]:.4f}", f"{minima['new'][case] / before:.3f}")
        for case, before in minima["old"].items()
    ]
    print(f"{LENGTH} blocks, one thread, minima of {rounds} processes each, PyTorch {torch.__version__}\n")
    print(tabulate(rows, ("", f"{old}, ms", f"{new or 'here'}, ms", "ratio"), tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?", default="HEAD", help="the commit to compare with")
    parser.add_argument("new", nargs="?", help="the commit that is compared, or the working tree")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="what the names of the chains contain that are measured")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.only)
    else:
        compare(arguments.old, arguments.new, arguments.rounds, arguments.only)
