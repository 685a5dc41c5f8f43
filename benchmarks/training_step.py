"""`python -m benchmarks.training_step`: what a whole training step takes, and which floors of PyTorch's stand in its way.

1,024 residual blocks, each with four parameters of its own: the model as it is, through `torch.compile`, and with packed
parameters, beside a jitted `jax.lax.scan` (where JAX can be imported) and C++ written by hand. All take turns, and each
time is the least of its turns.

    python -m benchmarks.training_step --write     # some minutes; the record is results/training_step.md
    python -m benchmarks.training_step --quick     # 128 blocks, two of the settings, a minute, and no goals
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn, optim

import pcr_fx
from benchmarks.measure import Call, least_ms, record
from benchmarks.models import residual_net
from benchmarks.rivals import jax_calls, limit_calls

# Width and samples, and what is aimed at there with all blocks.
SETTINGS = {
    (4, 1): {"compiled": 8, "recipe": 10, "step": 150, "jax": 3, "limit": 3, "unpacked": 1.3},
    (8, 32): {"compiled": 8, "recipe": 10, "step": 100, "jax": 4, "limit": 3, "unpacked": 1.3},
    (16, 32): {"compiled": 7, "recipe": 9, "step": 60, "jax": 3, "limit": 2, "unpacked": 1.3},
    (64, 32): {"compiled": 3, "recipe": 3.5, "step": 8, "jax": 2, "limit": 2, "unpacked": 1.3},
}
QUICK = {"length": 128, "settings": [(4, 1), (8, 32)], "rounds": 3}
ALL = {"length": 1024, "settings": list(SETTINGS), "rounds": 12}
TURN_SECONDS = 0.05
# Dynamo misses changes with it on later Pythons.
RECIPE = {"use_recursive_dict_tags_for_guards": True} if sys.version_info < (3, 13) else None
Run = Callable[[Tensor], Any]


# --- what is timed ----------------------------------------------------------------------------------------------------


def both_ways(run: Run, parameters: list[nn.Parameter], x: Tensor) -> Call:
    """Forward + backward."""

    def call() -> None:
        for parameter in parameters:
            parameter.grad = None
        run(x).sum().backward()

    return call


def whole_step(run: Run, optimizer: optim.Optimizer, x: Tensor) -> Call:
    """A step of a plain training loop."""

    def call() -> None:
        optimizer.zero_grad()
        run(x).sum().backward()
        optimizer.step()

    return call


def adam(model: nn.Module, fused: bool = False) -> optim.Optimizer:
    """One that hardly moves the model, which thousands of steps would."""
    return optim.Adam(model.parameters(), lr=1e-9, fused=fused)


def adam_alone(model: nn.Module, fused: bool = False) -> Call:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    return adam(model, fused).step


def compiled(model: nn.Module, x: Tensor, backend: Any, settings: dict[str, Any]) -> Run:
    """The model through `torch.compile`, with settings of Dynamo's that count while it makes its guards."""
    with torch._dynamo.config.patch(settings):
        run = torch.compile(model, backend=backend)
        run(x)
    return run  # type: ignore[no-any-return]


def checks_only(model: nn.Module, x: Tensor, settings: dict[str, Any]) -> Call:
    """What `torch.compile` checks before each call: a call in which nothing else is done."""
    result = (torch.zeros_like(x),)

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        return lambda *given: result

    run = compiled(model, x, backend, settings)
    return lambda: run(x)


def hands_out(model: nn.Module) -> Call:
    """Gradients that are there, handed to all parameters by a function of PyTorch's own that is written in C++."""
    columns = [[*parameters] for parameters in zip(*(block.parameters() for block in model.children()), strict=True)]
    gradients = [torch.rand(len(column), *column[0].shape) for column in columns]

    def call() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        torch.autograd.backward([torch.stack(column) for column in columns], gradients)

    return call


def calls(length: int, width: int, batch: int) -> Iterator[tuple[str, Call]]:
    """By name what is timed of one setting. All start from the same weights."""
    torch._dynamo.reset()
    model, x = residual_net(length, width), torch.randn(batch, width)
    yield from plain_calls(model, x)
    yield from packed_calls(model, x)
    if (in_jax := jax_calls(model, x)) is not None:
        yield "jax", in_jax[1]
    yield "limit", limit_calls(model, x)[1]


def plain_calls(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Call]]:
    """What has the model's own parameters, each in a copy of the model."""
    eager, stepped, unpacked = (copy.deepcopy(model) for _ in range(3))
    yield "eager", both_ways(eager, list(eager.parameters()), x)
    yield "eager step", whole_step(stepped, adam(stepped), x)
    for name, settings in guards().items():
        plain = copy.deepcopy(model)
        run = compiled(plain, x, "deeppcr", settings)
        check(run, plain, model, x)
        yield name, both_ways(run, list(plain.parameters()), x)
        yield f"{name}, checks", checks_only(copy.deepcopy(model), x, settings)
    fast = pcr_fx.transform(unpacked, x)
    check(fast, unpacked, model, x)
    yield "unpacked", both_ways(fast, list(unpacked.parameters()), x)
    yield "hands out", hands_out(copy.deepcopy(model))
    yield "adam", adam_alone(copy.deepcopy(model))
    yield "fused adam", adam_alone(copy.deepcopy(model), fused=True)


def packed_calls(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Call]]:
    """What has packed parameters, which are copies of the model's."""
    packed = pcr_fx.transform(model, x, pack_parameters=True)
    check(packed, packed, model, x)
    yield "packed", both_ways(packed, list(packed.parameters()), x)
    yield "packed step", whole_step(packed, adam(packed), x)
    plain = copy.deepcopy(model)
    before = adam(plain)
    fast = pcr_fx.transform(plain, x, pack_parameters=True, optimizer=before)
    yield "packed step, optimizer before", whole_step(fast, before, x)


def guards() -> dict[str, dict[str, Any]]:
    """Settings of Dynamo's, by the name of what is compiled with them."""
    return {"compiled": {}} | ({} if RECIPE is None else {"recipe": RECIPE})


def check(run: Run, fast: nn.Module, model: nn.Module, x: Tensor) -> None:
    """A benchmark of wrong results is worth nothing."""
    expected, output = model(x), run(x)
    assert torch.allclose(output, expected, rtol=1e-3, atol=1e-4), "the outputs differ"
    # As one number for each, which is all that packed parameters and the model's own have in common.
    sums = [
        sum(float(g.double().square().sum()) for g in torch.autograd.grad(out.sum(), list(of.parameters())))
        for out, of in ((expected, model), (output, fast))
    ]
    assert abs(sums[0] - sums[1]) <= 1e-3 * sums[0], "gradients differ"


# --- the table --------------------------------------------------------------------------------------------------------


def cells(ms: Mapping[str, float], goals: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """The rows of one setting by name."""

    def time_of(name: str) -> str:
        return f"{ms[name]:.3g}" if name in ms else "-"

    def gain(of: str, over: str, goal: str) -> str:
        return against(ms[of] / ms[over], goals.get(goal)) if of in ms and over in ms else "-"

    yield "eager, forward + backward, ms", time_of("eager")
    for name, words in (("compiled", "`torch.compile`, unchanged"), ("recipe", "the same with the guard recipe")):
        yield f"{words}, ms", time_of(name)
        yield f"{words}, against eager", gain("eager", name, name)
        yield f"{words}: checks before a call, ms", time_of(f"{name}, checks")
        if f"{name}, checks" in ms:
            floor = ms["hands out"] + ms[f"{name}, checks"]
            yield f"{words}: nothing but checks and handing out, against eager", f"{ms['eager'] / floor:.3g}x"
    yield "handing out gradients, ms", time_of("hands out")
    yield "`transform`, not packed, forward + backward, ms", time_of("unpacked")
    floor = ms["hands out"] + ms["packed"]
    yield "the same, times handing out and what it takes packed", within(ms["unpacked"] / floor, goals.get("unpacked"))
    yield "eager, whole step with Adam, ms", time_of("eager step")
    yield "Adam over the model's own parameters, ms", time_of("adam")
    yield "the same with `fused=True`, ms", time_of("fused adam")
    yield "packed, whole step with Adam, ms", time_of("packed step")
    yield "packed, whole step, against eager", gain("eager step", "packed step", "step")
    yield "optimizer made before packing, ms", time_of("packed step, optimizer before")
    yield (
        "optimizer made before packing, of the step made after",
        f"{ms['packed step, optimizer before'] / ms['packed step']:.2f}",
    )
    yield "packed, forward + backward, ms", time_of("packed")
    yield "`jax.lax.scan` + grad, ms", time_of("jax")
    yield "packed against JAX", gain("jax", "packed", "jax")
    yield "C++ by hand, ms", time_of("limit")
    yield "packed, times C++ by hand", within(ms["packed"] / ms["limit"], goals.get("limit"))


def against(ratio: float, goal: float | None) -> str:
    """How many times faster, and where there is a goal, that."""
    return f"{ratio:.3g}x" if goal is None else f"{ratio:.3g}x ({goal:g}x{'' if ratio >= goal else ', missed'})"


def within(ratio: float, goal: float | None) -> str:
    return f"{ratio:.2g}" if goal is None else f"{ratio:.2g} (<= {goal:g}{'' if ratio <= goal else ', missed'})"


NOTES = (
    "The least times of calls that take turns, in one run; what is aimed at stands in brackets. All blocks have four parameters "
    "of their own. The guard recipe is that of docs/performance.md, `use_recursive_dict_tags_for_guards`. Checks before a call "
    "are those of `torch.compile` with a backend that does nothing; gradients are handed out by `torch.stack` of each column of "
    "parameters, "
    "which PyTorch has in C++, and its backward, that makes and assigns views of gradients that are there. No backend for a "
    "model with these parameters does without either, so that a row says how fast one would be that did nothing else. JAX gets "
    "the gradients of all parameters and of the input. C++ by hand is `limit.cpp`."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer blocks, settings and turns")
    parser.add_argument("--write", action="store_true", help="keep the record")
    parser.add_argument("--machine", default="", help="what else is to be said of the machine, for the record")
    chosen = parser.parse_args()
    sizes: Any = QUICK if chosen.quick else ALL
    rows: dict[str, list[str]] = {}
    for width, batch in sizes["settings"]:
        began = time.perf_counter()
        names, turns = zip(*calls(sizes["length"], width, batch), strict=True)
        ms = dict(zip(names, least_ms(turns, sizes["rounds"], TURN_SECONDS), strict=True))
        for name, cell in cells(ms, {} if chosen.quick else SETTINGS[width, batch]):
            rows.setdefault(name, []).append(cell)
        print(f"w={width}, B={batch}: done in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    headers = ["", *(f"w={width}, B={batch}" for width, batch in sizes["settings"])]
    table = [(name, *values) for name, values in rows.items()]
    title = f"A training step of {sizes['length']:,} residual blocks, float32"
    if chosen.write:
        record("training_step", title, headers, table, f"{NOTES} {chosen.machine}".rstrip())
    else:
        print(f"{title}\n\n{tabulate(table, headers, tablefmt='github', disable_numparse=True)}")


if __name__ == "__main__":
    main()
