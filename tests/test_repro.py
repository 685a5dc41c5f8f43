"""A chain as a script for a bug report: it runs by itself, shows the chain, and holds nothing of the model."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from models import ResidualNet
from torch import Tensor, nn

import pcr_fx
from pcr_fx.__main__ import main

IN_OPS = {"solver": "sequential", "kernels": False}
SCRIPT = """
import sys
import torch, pcr_fx

def step(carry, x):
    (a, b), (c, d) = carry, x
    a = torch.where(d, torch.clamp(a * c, -float("inf"), 2.0), a - shared.cumsum(0)) + b.mean(-1, keepdim=True)
    return (a, b.sin()), a.sum()

shared = torch.full((3,), 123.456)
carry = torch.full((2, 3), 0.789), torch.ones(2, 3)
xs = torch.rand(11, 2, 3), torch.rand(11, 3) > 0.5
print("to stdout", sys.argv[1:])
pcr_fx.scan(step, carry, xs, options={"solver": "sequential", "kernels": False, "planning": "estimated"})
pcr_fx.solve_chain(lambda z, w, _: torch.tanh(z * w), torch.ones(4), torch.ones(9, 4), options={"kernels": False})
raise RuntimeError("a failure to report")
"""


def run_fresh(script: str, folder: Path) -> str:
    """What a script prints in a process of its own."""
    (folder / "repro.py").write_text(script)
    root = str(Path(pcr_fx.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "repro.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def namespace(script: str) -> dict[str, Any]:
    """A script's names, without running it as one."""
    module = ModuleType(f"repro_{len(sys.modules)}")
    sys.modules[module.__name__] = module  # where Dynamo looks for what a function calls
    exec(compile(script, "repro.py", "exec"), vars(module))
    return vars(module)


def difference(script: str) -> float:
    """How far the chain is from a plain loop, states and gradients."""
    found = namespace(script)
    states, operands, length = found["states"], found["operands"], found["LENGTH"]
    step, loop, both, largest = (found[name] for name in ("step", "loop", "with_gradients", "largest_difference"))
    ours = both(lambda: pcr_fx.scan(step, states, operands, length=length, options=found["OPTIONS"]))
    theirs = both(lambda: loop(states, operands))
    (report,) = pcr_fx.report(step).chains
    assert report.chain.length == length
    return max(largest(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_command_prints_a_script_that_runs_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(SCRIPT)
    argv, path = list(sys.argv), list(sys.path)
    assert main(["repro", str(tmp_path / "mine.py"), "--steps", "3"]) == 0
    printed = capsys.readouterr()
    assert "a failure to report" in printed.err and "to stdout ['--steps', '3']" in printed.err
    assert "11 blocks of step (a loop): this one" in printed.err and "9 blocks of" in printed.err
    assert (sys.argv, sys.path) == (argv, path)
    for secret in ("123.456", "0.789", str(tmp_path), "mine.py"):
        assert secret not in printed.out
    assert "LENGTH = 11" in printed.out and "float(" in printed.out
    said = run_fresh(printed.out, tmp_path)
    assert "blocks           | 11 of" in said and "largest difference to a plain loop" in said
    assert main(["repro", "--chain", "3", str(tmp_path / "mine.py")]) == 2
    assert "--chain must be one of the" in capsys.readouterr().err
    assert main(["repro", str(tmp_path / "none.py")]) == 2


class Scheduled(nn.Module):
    """Numbers in the code, an index, a buffer, and several states."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 3)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for number in range(9):
            x, y = torch.tanh(x * self.scale + self.table(index)) + 0.01 * number, y + x
        return x + y


def test_the_report_has_a_script_for_each_chain() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3)
    fast = pcr_fx.transform(ResidualNet(9), x, IN_OPS)
    script = fast.report.repro()
    assert difference(script) < 1e-5
    assert "blocks.0" not in script and "test_repro" not in script and "models.py" not in script
    with pytest.raises(pcr_fx.UnsupportedError, match="number must be one of the report's 1 chains, got 2"):
        fast.report.repro(2)


def test_numbers_indices_and_buffers_are_said() -> None:
    x, index = torch.randn(2, 3), torch.tensor([1, 2])
    fast = pcr_fx.transform(Scheduled(), (x, index), IN_OPS)
    script = fast.report.repro()
    assert difference(script) < 1e-5 and "0.08" in script


def test_a_chain_that_has_not_run_has_no_script() -> None:
    fast = pcr_fx.transform(ResidualNet(9), options=IN_OPS)
    with pytest.raises(pcr_fx.UnsupportedError, match="known once it ran, and this one has no plan: not run"):
        fast.report.repro()
    fast(torch.randn(2, 3))
    assert "LENGTH = 9" in fast.report.repro()
