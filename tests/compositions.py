"""What else PyTorch does with a model, each with a chain in it, by every way in and with two solvers: a table.

    PYTHONPATH=.:tests python -m compositions [--row TEXT] [--write]

A cell compares with the model as it is: "right" if values and gradients agree, "refused" if the package says in its own words
why not, and otherwise what went wrong. `--write` keeps the table in benchmarks/results.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import functools
import importlib.util
import io
import logging
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import ResidualNet
from tabulate import tabulate
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import pcr_fx

DEPTH = 10
QUICK = {"plan_cache": False, "planning": "estimated"}
SOLVERS = {"auto": QUICK, "newton": {**QUICK, "solver": "newton"}}


def model() -> nn.Module:
    torch.manual_seed(0)
    return ResidualNet(DEPTH).double()


def some(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def transformed(model: nn.Module, options: dict[str, Any], **how: Any) -> Any:
    return pcr_fx.transform(model, some(), options, **how)


def compiled(model: nn.Module, options: dict[str, Any]) -> Any:
    return torch.compile(model, backend="deeppcr", options={**options, "inner_backend": "eager"})


WAYS: dict[str, Callable[..., Any]] = {
    "transform": transformed,
    "packed": functools.partial(transformed, pack_parameters=True),
    "compile": compiled,
}


# --- what is done: `(run, x) -> tensors`, for the model and for what was made of it --------------------------------------


def tangent(run: Any, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(run(forward_ad.make_dual(x, x.cos()))).tangent


def tangent_of_a_gradient(run: Any, x: Tensor, **how: Any) -> Any:
    leaf = x.clone().requires_grad_()
    found = run(leaf)
    with forward_ad.dual_level():
        cotangent = forward_ad.make_dual(found.detach().cos(), found.detach().sin())
        (gradient,) = torch.autograd.grad(found, leaf, cotangent, **how)
        return tuple(forward_ad.unpack_dual(gradient))


def batched_gradients(run: Any, x: Tensor) -> Any:
    leaf = x.clone().requires_grad_()
    found = run(leaf)
    each = torch.eye(found.numel(), dtype=x.dtype).view(-1, *found.shape)
    return torch.autograd.grad(found, leaf, each, is_grads_batched=True)


def flops(run: Any, x: Tensor) -> Any:
    run(x)
    with FlopCounterMode(display=False) as counter:
        run(x)
    return torch.tensor(counter.get_total_flops())


def flops_of_the_backward(run: Any, x: Tensor) -> Any:
    leaf = x.clone().requires_grad_()
    run(leaf)
    found = run(leaf)
    with FlopCounterMode(display=False) as counter:
        found.sum().backward()
    return torch.tensor(counter.get_total_flops()), leaf.grad


def gradients(run: Any, x: Tensor, **how: Any) -> Any:
    """The value and the gradient of the input, of parameters their sum: packed, they are others."""
    leaf = x.clone().requires_grad_()
    run.zero_grad()
    found = run(leaf)
    found.square().sum().backward(**how)
    return found, leaf.grad, sum(one.grad.sum() for one in run.parameters() if one.grad is not None)


def second_derivatives(run: Any, x: Tensor) -> Any:
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(run(leaf).sin().sum(), leaf, create_graph=True)
    return first, *torch.autograd.grad(first.square().sum(), leaf)


def checkpointed(run: Any, x: Tensor, **how: Any) -> Any:
    leaf = x.clone().requires_grad_()
    found = checkpoint(run, leaf, **how)
    found.sum().backward()
    return found, leaf.grad


def selectively_checkpointed(run: Any, x: Tensor) -> Any:
    kept = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    return checkpointed(run, x, use_reentrant=False, context_fn=kept)


def with_saved_tensors_elsewhere(run: Any, x: Tensor) -> Any:
    with torch.autograd.graph.save_on_cpu():
        return gradients(run, x)


def in_bfloat16(run: Any, x: Tensor) -> Any:
    run.float()
    with torch.autocast("cpu", torch.bfloat16):
        return run(x.float()).float().round(decimals=1)


def under(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Callable[[Any, Tensor], Any]:
    def use(run: Any, x: Tensor) -> Any:
        with context():
            return run(x).clone()

    return use


def profiled(run: Any, x: Tensor) -> Any:
    run(x)
    with torch.profiler.profile() as profile:
        found = run(x)
    names = {event.key for event in profile.key_averages()}
    if isinstance(run, pcr_fx.TransformedModule):
        assert any(name.startswith("pcr_fx: blocks") for name in names), f"no chain among {sorted(names)}"
    return found


def another_dtype(run: Any, x: Tensor) -> Any:
    run(x)
    return run.float()(x.float())


def swapped(run: Any, x: Tensor) -> Any:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return another_dtype(run, x)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def pickled(run: Any, x: Tensor) -> Any:
    return gradients(pickle.loads(pickle.dumps(run)), x)


def saved_states(run: Any, x: Tensor) -> Any:
    other = copy.deepcopy(run)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    buffer = io.BytesIO()
    torch.save(run.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    return other(x)


def by_safetensors(run: Any, x: Tensor) -> Any:
    from safetensors.torch import load_model, save_model

    with tempfile.TemporaryDirectory() as folder:
        save_model(run, folder + "/model")
        other = copy.deepcopy(run)
        load_model(other, folder + "/model")
    return other(x)


def trained(run: Any, x: Tensor, step: Callable[[Any], Any] = lambda run: run) -> Any:
    optimiser = torch.optim.AdamW(run.parameters(), lr=1e-2, weight_decay=0.01)

    def once() -> Tensor:
        optimiser.zero_grad()
        loss: Tensor = run(x).square().mean()
        loss.backward()
        optimiser.step()
        return loss.detach()

    once = step(once)
    return [once() for _ in range(4)]


def trained_compiled(run: Any, x: Tensor) -> Any:
    return trained(run, x, lambda step: torch.compile(step, backend="deeppcr", options={"inner_backend": "eager"}))


def clipped(run: Any, x: Tensor) -> Any:
    run(x).sum().backward()
    return nn.utils.clip_grad_norm_(run.parameters(), 0.1)


def averaged(run: Any, x: Tensor) -> Any:
    average = torch.optim.swa_utils.AveragedModel(run)
    average.update_parameters(run)
    return average(x)


def with_other_parameters(run: Any, x: Tensor) -> Any:
    return torch.func.functional_call(run, {name: 2 * value for name, value in run.named_parameters()}, (x,))


def in_one_graph(run: Any, x: Tensor) -> Any:
    return torch.compile(run, backend="aot_eager", fullgraph=True)(x)


def compiled_around(run: Any, x: Tensor) -> Any:
    return torch.compile(lambda x: run(x.sin()).cos(), backend="aot_eager")(x)


def exported(run: Any, x: Tensor, strict: bool = False) -> Any:
    sizes = {0: torch.export.Dim("batch", min=2, max=64)}
    return torch.export.export(run, (x,), dynamic_shapes=(sizes,), strict=strict).module()(some(9))


def exported_elsewhere(run: Any, x: Tensor) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        torch.export.save(torch.export.export(run, (x,)), folder + "/model.pt2")
        torch.save(x, folder + "/x")
        script = "import torch, pcr_fx; torch.save(torch.export.load('model.pt2').module()(torch.load('x')), 'y')"
        environment = {**os.environ, "PYTHONPATH": str(Path(pcr_fx.__file__).parent.parent)}
        subprocess.run([sys.executable, "-c", script], cwd=folder, check=True, capture_output=True, env=environment)
        return torch.load(folder + "/y")


def ahead_of_time(run: Any, x: Tensor) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(torch.export.export(run, (x,)), package_path=folder + "/m.pt2")
        return torch._inductor.aoti_load_package(path)(x)


def in_a_data_loader(run: Any, x: Tensor) -> Any:
    class Samples(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Tensor:
            with torch.no_grad():
                return run(x + index)  # type: ignore[no-any-return]

    run(x)
    loader = torch.utils.data.DataLoader(Samples(), batch_size=None, num_workers=1, multiprocessing_context="fork")
    return list(loader)


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """A group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def data_parallel(run: Any, x: Tensor) -> Any:
    with one_process():
        return trained(nn.parallel.DistributedDataParallel(run), x)


def sharded(run: Any, x: Tensor) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with one_process():
        mesh = init_device_mesh("cpu", (1,))
        for block in run.blocks:
            fully_shard(block, mesh=mesh)
        return trained(fully_shard(run, mesh=mesh), x)


def accelerated(run: Any, x: Tensor) -> Any:
    from accelerate import Accelerator

    return trained(Accelerator(cpu=True).prepare(run), x)


@dataclass(frozen=True)
class Use:
    """One row.

    Attributes:
        act: `(run, x) -> tensors`.
        ways: the ways in that it is meant for.
        needs: a package, which is not one of the tests' own.
        is_slow: whether it takes seconds a cell.
    """

    act: Callable[[Any, Tensor], Any]
    ways: tuple[str, ...] = tuple(WAYS)
    needs: str = "torch"
    is_slow: bool = False


_MODULE = ("transform", "packed")
USES: dict[str, Use] = {
    "backward": Use(gradients),
    "`torch.func.jvp`": Use(lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))),
    "`forward_ad`": Use(tangent),
    "`torch.func.jacfwd`": Use(lambda f, x: torch.func.jacfwd(f)(x)),
    "`torch.func.jacrev`": Use(lambda f, x: torch.func.jacrev(f)(x)),
    "`torch.func.hessian`": Use(lambda f, x: torch.func.hessian(lambda y: f(y).sin().sum())(x)),
    "`jacobian(vectorize=True)`": Use(lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True)),
    "`jacobian`, forward mode": Use(
        lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True, strategy="forward-mode")
    ),
    "`hessian(vectorize=True)`": Use(
        lambda f, x: torch.autograd.functional.hessian(lambda y: f(y).sin().sum(), x, vectorize=True)
    ),
    "`forward_ad` of a gradient": Use(tangent_of_a_gradient),
    "`forward_ad` of a gradient, `create_graph`": Use(functools.partial(tangent_of_a_gradient, create_graph=True)),
    "`is_grads_batched`": Use(batched_gradients),
    "`create_graph`": Use(second_derivatives),
    "`torch.vmap`": Use(lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x]))),
    "gradients of samples": Use(
        lambda f, x: torch.func.vmap(torch.func.grad(lambda y: f(y).sum()))(x[:, None]),
    ),
    "`functional_call`": Use(with_other_parameters, _MODULE),
    "checkpoint": Use(functools.partial(checkpointed, use_reentrant=False)),
    "checkpoint, reentrant": Use(functools.partial(checkpointed, use_reentrant=True)),
    "checkpoint, selective": Use(selectively_checkpointed, _MODULE),
    "`save_on_cpu`": Use(with_saved_tensors_elsewhere),
    "autocast": Use(in_bfloat16),
    "`inference_mode`": Use(under(torch.inference_mode)),
    "`no_grad`": Use(under(torch.no_grad)),
    "anomaly mode": Use(lambda f, x: under(torch.autograd.detect_anomaly)(f, x)),
    "`FlopCounterMode`": Use(flops),
    "`FlopCounterMode`, backward alone": Use(flops_of_the_backward),
    "profiler": Use(profiled),
    "`.float()`": Use(another_dtype),
    "`.float()`, parameters swapped": Use(swapped, _MODULE),
    "`deepcopy`": Use(lambda f, x: gradients(copy.deepcopy(f), x), _MODULE),
    "`pickle`": Use(pickled, _MODULE),
    "`state_dict`": Use(saved_states, _MODULE),
    "safetensors": Use(by_safetensors, _MODULE, "safetensors"),
    "AdamW": Use(trained),
    "a compiled training step": Use(trained_compiled, _MODULE),
    "`clip_grad_norm_`": Use(clipped),
    "`AveragedModel`": Use(averaged, _MODULE),
    "`torch.compile` around it": Use(compiled_around, _MODULE),
    "`fullgraph=True` around it": Use(in_one_graph, _MODULE),
    "`torch.export`": Use(exported, _MODULE),
    "`torch.export`, strict": Use(functools.partial(exported, strict=True), _MODULE),
    "`torch.export`, loaded elsewhere": Use(exported_elsewhere, _MODULE, is_slow=True),
    "AOTInductor": Use(ahead_of_time, _MODULE, is_slow=True),
    "`DataLoader` with fork": Use(in_a_data_loader, _MODULE, is_slow=True),
    "`DistributedDataParallel`": Use(data_parallel, _MODULE),
    "`fully_shard` of blocks": Use(sharded, ("transform",)),
    "accelerate": Use(accelerated, _MODULE, "accelerate"),
}


def cell(use: Use, way: str, options: dict[str, Any]) -> str:
    """What comes of it."""
    if way not in use.ways:
        return ""
    if importlib.util.find_spec(use.needs) is None:
        return "not installed"
    torch.compiler.reset()
    try:
        expected = use.act(model(), some())
    except Exception as error:
        return f"not in eager either: {_line(error)}"
    try:
        torch.testing.assert_close(use.act(WAYS[way](model(), options), some()), expected, rtol=1e-6, atol=1e-8)
    except pcr_fx.PcrFxError as error:
        return f"refused: {_line(error)}"
    except AssertionError as error:
        return f"WRONG: {_line(error)}"
    except Exception as error:
        logging.getLogger(__name__).debug("%s", traceback.format_exc())
        return f"CRASHED: {type(error).__name__}: {_line(error)}"
    return "right"


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:120]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m compositions", description=__doc__)
    parser.add_argument("--row", default="", help="only rows whose names contain this")
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    rows = []
    for name, use in USES.items():
        if given.row in name:
            found = [[cell(use, way, options) for options in SOLVERS.values()] for way in WAYS]
            rows.append([name, *(pair[0] if len(set(pair)) == 1 else " / ".join(pair) for pair in found)])
            print(" | ".join(rows[-1]), flush=True)
    bad = [row for row in rows if "WRONG" in str(row) or "CRASHED" in str(row)]
    if given.write:
        versions = f"PyTorch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"
        text = (
            f"# Among what else PyTorch does\n\n{datetime.date.today()}, {versions}. Made by `PYTHONPATH=.:tests python -m "
            f"compositions --write`: a residual network of {DEPTH} blocks, `solver` auto and newton (two entries where they "
            f"differ).\n\n{tabulate(rows, ('with', *WAYS), 'github')}\n"
        )
        (Path(__file__).parent.parent / "benchmarks" / "results" / "compositions.md").write_text(text)
    print(f"{len(rows)} rows, {len(bad)} with something wrong")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
