"""`python -m benchmarks.kernels [chain] [compile] [gru]`: chains as native kernels, against all that they compete with.

JAX is needed for its column only (`pip install jax`), g++ for the limit line.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pcr_fx
from benchmarks.measure import median_ms, record
from benchmarks.models import residual_net
from benchmarks.rivals import jax_calls, limit_calls

LENGTH = 1024
SETTINGS = ((4, 1), (8, 1), (16, 1), (8, 32), (64, 32))
# At least so many times eager's speed, and jax.lax.scan's.
EAGER_FORWARD, EAGER_BOTH = (200, 200, 100, 18, 1.5), (250, 200, 100, 30, 1.5)
JAX_FORWARD, JAX_BOTH = (0.6, 0.7, 1.5, 1, 1), (3, 3, 2.5, 2, 1)
COMPILED_FORWARD, COMPILED_BOTH = (8, 8, 8, 6, 1.2), (8, 8, 8, 7, 1.2)
LIMIT = 3


def timed(function: Callable[[], Any]) -> float:
    """Milliseconds, the median of as many calls as take about half a second, at least 9."""
    function()
    start = time.perf_counter()
    function()
    seconds = max(time.perf_counter() - start, 1e-6)
    return median_ms(function, max(9, min(2000, int(0.5 / seconds))))


def both_ways(model: Callable[..., Tensor], parameters: list[nn.Parameter], *inputs: Tensor) -> tuple[float, float]:
    """Milliseconds of a call without gradients, and of one with its backward."""

    def forward() -> None:
        with torch.no_grad():
            model(*inputs)

    def forward_and_backward() -> None:
        for parameter in parameters:
            parameter.grad = None
        model(*inputs).sum().backward()

    return timed(forward), timed(forward_and_backward)


# --- one chain --------------------------------------------------------------------------------------------------------


def chain() -> None:
    rows: dict[str, list[Any]] = {}
    for column, (width, batch) in enumerate(SETTINGS):
        for name, value in chain_times(width, batch, column).items():
            rows.setdefault(name, []).append(value)
    record(
        "kernels",
        f"{LENGTH} residual blocks as one native kernel, float32",
        ("", *(f"w={width}, B={batch}" for width, batch in SETTINGS)),
        [(name, *values) for name, values in rows.items()],
        "Medians in one run; forward without gradients, forward + backward with the gradients of all parameters. "
        "`transform` with `pack_parameters=True` has one parameter for each column of the blocks' parameters, "
        "`transform` and `torch.compile` as they come have the model's own 4,096. Modules are not guarded with PyTorch's option "
        "`guard_filter_fn`: torch.compiler.skip_guard_on_all_nn_modules_unsafe. A ratio says how many times faster "
        "ours is, and behind it the goal. The limit is C++ written by hand for this chain and width, with "
        "-ffast-math and parameters packed; it keeps what its backward wants.",
    )


def chain_times(width: int, batch: int, column: int) -> dict[str, str]:
    model, x = residual_net(LENGTH, width), torch.randn(batch, width)
    packed = pcr_fx.transform(model, x, pack_parameters=True)
    plain = pcr_fx.transform(model, x)
    check(model, packed, plain, x)
    own = list(model.parameters())
    eager = both_ways(model, own, x)
    ours = both_ways(packed, list(packed.parameters()), x)
    unpacked = both_ways(plain, own, x)
    in_jax = jax_calls(model, x)
    jax = None if in_jax is None else tuple(map(timed, in_jax))
    limit = tuple(map(timed, limit_calls(model, x)))
    compiled = compiled_times(model, own, x)
    unguarded = compiled_times(model, own, x, {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe})
    cells = {}
    for index, direction in enumerate(("forward", "forward + backward")):
        goals = [(EAGER_FORWARD, JAX_FORWARD, COMPILED_FORWARD), (EAGER_BOTH, JAX_BOTH, COMPILED_BOTH)][index]
        cells[f"eager, {direction}, ms"] = f"{eager[index]:.2f}"
        cells[f"`transform`, packed, {direction}, ms"] = f"{ours[index]:.3f}"
        cells[f"`transform`, {direction}, ms"] = f"{unpacked[index]:.3f}"
        cells[f"`torch.compile`, {direction}, ms"] = f"{compiled[index]:.2f}"
        cells[f"`torch.compile`, modules not guarded, {direction}, ms"] = f"{unguarded[index]:.2f}"
        cells[f"`jax.lax.scan`, {direction}, ms"] = f"{jax[index]:.3f}" if jax else "-"
        cells[f"limit, {direction}, ms"] = f"{limit[index]:.3f}"
        cells[f"packed against eager, {direction}"] = against(eager[index] / ours[index], goals[0][column])
        cells[f"unpacked against eager, {direction}"] = f"{eager[index] / unpacked[index]:.3g}x"
        cells[f"packed against jax, {direction}"] = against(jax[index] / ours[index], goals[1][column]) if jax else "-"
        cells[f"`torch.compile` against eager, {direction}"] = against(eager[index] / compiled[index], goals[2][column])
        ratio = eager[index] / unguarded[index]
        cells[f"`torch.compile`, modules not guarded, against eager, {direction}"] = against(ratio, goals[2][column])
        ratio = ours[index] / limit[index]
        cells[f"packed, times the limit, {direction}"] = (
            f"{ratio:.2g} (<= {LIMIT}{'' if ratio <= LIMIT else ', missed'})"
        )
    return cells


def against(ratio: float, goal: float) -> str:
    return f"{ratio:.3g}x ({goal:g}x{'' if ratio >= goal else ', missed'})"


def check(model: nn.Module, packed: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """A benchmark of wrong results is worth nothing."""
    expected = model(x)
    expected.sum().backward()
    gradients = [p.grad for p in model.parameters()]
    for fast in (packed, plain):
        for parameter in model.parameters():
            parameter.grad = None
        output = fast(x)
        assert torch.allclose(output, expected, rtol=1e-3, atol=1e-4), "the outputs differ"
        output.sum().backward()
    for ours, theirs in zip(model.parameters(), gradients, strict=True):
        assert theirs is not None and ours.grad is not None
        assert torch.allclose(ours.grad, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max())), "gradients differ"


def compiled_times(
    model: nn.Module, parameters: list[nn.Parameter], x: Tensor, options: dict[str, Any] | None = None
) -> tuple[float, float]:
    torch._dynamo.reset()
    return both_ways(torch.compile(model, backend="deeppcr", options=options), parameters, x)


# --- first calls ------------------------------------------------------------------------------------------------------

_FIRST_CALL = """
import sys, time, torch
sys.path.insert(0, {root!r})
from benchmarks.models import residual_net
from benchmarks.rivals import jax_calls, limit_calls
import pcr_fx
model, x = residual_net({length}, 8), torch.randn(1, 8)
{prepare}
start = time.perf_counter()
with torch.set_grad_enabled({gradients}):
    {call}
print(time.perf_counter() - start)
"""


def first_call(call: str, length: int, gradients: bool = False, prepare: str = "") -> float:
    """Seconds of the first call in a fresh process with empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "PCR_FX_CACHE_DIR": f"{folder}/kernels"}
        root = str(Path(__file__).parents[1])
        code = _FIRST_CALL.format(root=root, length=length, call=call, gradients=gradients, prepare=prepare)
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **caches}, capture_output=True, text=True, check=True
        )
    return float(done.stdout.split()[-1])


def compile_times() -> None:
    rows = []
    for gradients in (False, True):
        run = 'torch.compile(model, backend="{}")(x)' + (".sum().backward()" if gradients else "")
        ours, inductor = (first_call(run.format(name), LENGTH, gradients) for name in ("deeppcr", "inductor"))
        what = "with backward" if gradients else "without gradients"
        rows.append(
            (f"torch.compile, {what}", LENGTH, f"{ours:.1f}", f"{inductor:.1f}", f"{100 * ours / inductor:.0f} %")
        )
    for length in (LENGTH, 10_000):
        seconds = first_call("pcr_fx.transform(model, x)(x)", length)
        rows.append(("transform and a call", length, f"{seconds:.1f}", "-", f"{1e3 * seconds / length:.2f} ms a block"))
    record(
        "first_call",
        "First calls: a chain of residual blocks, w=8, one sample",
        ("", "L", "ours, s", "inductor, s", "ours of it"),
        rows,
        "Each in a process of its own with empty caches. Goals: at most 40 % of Inductor; transform below 5 s at L = "
        f"{LENGTH}, and linear in L.",
    )


# --- a recurrence -----------------------------------------------------------------------------------------------------


class Recurrence(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(width, width)

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        for value in inputs.unbind(0):
            state = self.cell(value, state)
        return state


def gru() -> None:
    # All of ours first: what Inductor compiles for minutes keeps the machine busy.
    times = {(batch, name): measured for batch in (1, 32) for name, measured in gru_times(batch).items()}
    times |= {(batch, "torch.compile, inductor"): inductor_gru(batch) for batch in (1, 32)}
    rows = []
    for (batch, name), measured in sorted(times.items(), key=lambda item: item[0][0]):
        if measured is None:
            rows.append((batch, name, "not compiled in 10 minutes", "", "", ""))
            continue
        ratios = [f"{a / b:.3g}x" for a, b in zip(times[batch, "eager"] or (), measured, strict=True)]
        rows.append((batch, name, *(f"{value:.2f}" for value in measured), *ratios))
    record(
        "gru",
        f"A GRU cell over {LENGTH} steps, w=16, float32",
        ("B", "", "forward, ms", "forward + backward, ms", "against eager", "against eager"),
        rows,
        "Medians; the loop `for value in inputs.unbind(0)` as users write it.",
    )


def gru_times(batch: int) -> dict[str, tuple[float, float] | None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, inputs = Recurrence(16), (torch.randn(LENGTH, batch, 16), torch.zeros(batch, 16))
    fast = pcr_fx.transform(model, inputs)
    assert torch.allclose(fast(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    contenders = {
        "eager": model,
        "transform": fast,
        "torch.compile, deeppcr": torch.compile(model, backend="deeppcr"),
    }
    return {name: both_ways(run, list(model.parameters()), *inputs) for name, run in contenders.items()}


def inductor_gru(batch: int) -> tuple[float, float] | None:
    """`None`: it did not finish compiling."""
    code = (
        "import torch\nfrom benchmarks.kernels import Recurrence, both_ways, LENGTH\ntorch.manual_seed(0)\n"
        f"model, inputs = Recurrence(16), (torch.randn(LENGTH, {batch}, 16), torch.zeros({batch}, 16))\n"
        "print(*both_ways(torch.compile(model), list(model.parameters()), *inputs))"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    except subprocess.TimeoutExpired:
        return None
    forward, both = map(float, done.stdout.split()[-2:])
    return forward, both


if __name__ == "__main__":
    sections = {"chain": chain, "compile": compile_times, "gru": gru}
    for section in sys.argv[1:] or sections:
        sections[section]()
