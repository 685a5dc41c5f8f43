"""Exported programs: that they hold chains, compute what the model computes, and that a text from anybody does no harm."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ResidualNet
from torch import Tensor, nn

import pcr_fx
from pcr_fx import TextError
from pcr_fx.texts import read_text

ROOT = Path(__file__).parent.parent
QUICK = {"plan_cache": False, "planning": "estimated"}
CPU = torch.device("cpu")


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


class Readouts(nn.Module):
    """A recurrence of two states, with a number of its own at each step, all of whose readouts are returned."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2 * width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, c = torch.zeros_like(x[:, 0]), x[:, 0].sin()
        seen, states = [], []
        for step in range(9):
            new = torch.tanh(self.inner(torch.cat([x[:, step], h], -1))) + 0.1 * step * c
            h, c = new, c * 0.5 + new.cos()
            seen.append(self.outer(h).sigmoid())
            states.append(h)
        return torch.stack(seen, 1), torch.stack(states), c


class Views(nn.Module):
    """Blocks that take apart and join dimensions, behind one whose size may be any."""

    def __init__(self, depth: int = 9) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            heads = layer(x).unflatten(-1, (2, 2))
            x = x + 0.1 * torch.softmax(heads, -1).transpose(-1, -2).flatten(-2).tanh()
        return x


class AsksForItsBatch(ResidualNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if x.shape[0] > 5 else 1.0)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (lambda: ResidualNet(10), (3, 3)),
    "readouts": (Readouts, (4, 9, 3)),
    "views": (Views, (3, 5, 4)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, shape = MODELS[name]
    return model().double(), some(*shape)


def chains_of(program: torch.export.ExportedProgram) -> list[Any]:
    return [node for node in program.graph.nodes if node.target is torch.ops.pcr_fx.chain.default]


def exported(model: nn.Module, x: Tensor, dynamic: bool = False, **how: Any) -> torch.export.ExportedProgram:
    sizes = {0: torch.export.Dim("batch", min=2, max=64)} if dynamic else None
    return torch.export.export(model, (x,), dynamic_shapes=(sizes,), **how)


def values_and_gradients(run: Any, x: Tensor) -> list[Tensor]:
    """The results, and the gradients of the input and of the parameters' sum."""
    leaf = x.clone().requires_grad_()
    found = run(leaf)
    found = list(found) if isinstance(found, (tuple, list)) else [found]
    run.zero_grad()
    sum(one.square().sum() for one in found).backward()
    return [*found, leaf.grad, sum(one.grad.sum() for one in run.parameters() if one.grad is not None)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", MODELS)
def test_exported_programs_hold_chains_and_compute_what_the_model_does(name: str, dynamic: bool) -> None:
    model, x = made(name)
    program = exported(pcr_fx.transform(model, x, QUICK), x, dynamic)
    assert len(chains_of(program)) == 1
    for batch in (2, 3, 11) if dynamic else (len(x),):
        given = some(batch, *x.shape[1:])
        expected = values_and_gradients(model, given)
        torch.testing.assert_close(values_and_gradients(program.module(), given), expected)


@pytest.mark.parametrize("how", [{"solver": "newton"}, {"kernels": False}, {"solver": "sequential"}], ids=str)
def test_options_are_in_the_program(how: dict[str, Any]) -> None:
    model, x = made("readouts")
    program = exported(pcr_fx.transform(model, x, {**QUICK, **how}), x)
    (chain,) = chains_of(program)
    assert read_text(chain.args[3], CPU).options == pcr_fx.Options(**QUICK, **how)
    torch.testing.assert_close(values_and_gradients(program.module(), x), values_and_gradients(model, x))


def test_packed_parameters_are_exported_as_one() -> None:
    model, x = made("residual")
    program = exported(pcr_fx.transform(model, x, QUICK, pack_parameters=True), x, dynamic=True)
    assert len(chains_of(program)) == 1
    assert len(dict(program.module().named_parameters())) == 8
    given = some(7, 3)
    torch.testing.assert_close(values_and_gradients(program.module(), given), values_and_gradients(model, given))


def test_without_example_inputs_and_after_calls_of_other_sizes() -> None:
    model, x = made("residual")
    fast = pcr_fx.transform(model, options=QUICK)
    fast(some(5, 3))
    program = exported(fast, x, dynamic=True)
    assert len(chains_of(program)) == 1
    torch.testing.assert_close(program.module()(some(9, 3)), model(some(9, 3)))


def test_decomposed_programs_keep_their_chains() -> None:
    model, x = made("readouts")
    program = exported(pcr_fx.transform(model, x, QUICK), x, dynamic=True).run_decompositions()
    assert len(chains_of(program)) == 1
    given = some(6, 9, 3)
    torch.testing.assert_close(program.module()(given), model(given))


def test_low_precision_is_that_of_the_model() -> None:
    model, x = made("residual")
    model, x = model.bfloat16(), x.bfloat16()
    fast = pcr_fx.transform(model, x, QUICK)
    program = exported(fast, x)
    assert len(chains_of(program)) == 1
    torch.testing.assert_close(program.module()(x), fast(x))


def test_a_graph_that_asked_for_a_size_that_may_be_another_is_not_exported() -> None:
    torch.manual_seed(0)
    model, x = AsksForItsBatch(10).double(), some(8, 3)
    fast = pcr_fx.transform(model, x, QUICK)
    assert len(chains_of(exported(fast, x))) == 1
    sizes = ({0: torch.export.Dim("batch", min=6, max=64)},)
    program = torch.export.export(fast, (x,), dynamic_shapes=sizes)
    assert not chains_of(program)
    torch.testing.assert_close(program.module()(some(9, 3)), model(some(9, 3)))


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round(decimals=1)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent


class Hooked(ResidualNet):
    def __init__(self) -> None:
        super().__init__(10)
        self.blocks[4].register_forward_hook(lambda module, args, result: result * 2)


class WithOwnDerivative(ResidualNet):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = Rounded.apply(block(x))
        return self.head(x)


@pytest.mark.parametrize("model", [Hooked, lambda: WithOwnDerivative(10)], ids=["hooks", "own derivative"])
def test_what_a_text_cannot_say_is_exported_as_it_is_written(model: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    plain = model().double()
    x = some(3, 3)
    program = exported(pcr_fx.transform(plain, x, QUICK), x)
    assert not chains_of(program)
    torch.testing.assert_close(program.module()(x), plain(x))


class Loop(nn.Module):
    """A loop over all of its input, whose steps close over modules, a tensor and a number."""

    def __init__(self, kernels: bool = False, **how: Any) -> None:
        super().__init__()
        self.cell, self.out, self.how = nn.Linear(7, 4), nn.Linear(4, 2), how
        self.options = {**QUICK, "kernels": kernels}

    def forward(self, x: Tensor) -> Any:
        scale, shift = x.mean(), 0.5

        def step(carry: tuple[Tensor, Tensor], x: Tensor) -> Any:
            h, total = carry
            h = torch.tanh(self.cell(torch.cat([h, x], -1)) + shift) * scale
            return (h, total + h.sum(-1)), {"seen": self.out(h).sigmoid(), "state": h, "nothing": None}

        batch = x.shape[1 - self.how.get("dim", 0)]
        first = x.new_zeros(batch, 4), x.new_ones(batch)
        (h, total), ys = pcr_fx.scan(step, first, x, options=self.options, **self.how)
        return h, total, ys["seen"], ys["state"]


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize(
    "how", [{}, {"reverse": True, "dim": 1}, {"kernels": True}], ids=["forwards", "backwards", "kernels"]
)
def test_loops_of_any_length_and_batch(how: dict[str, Any], strict: bool) -> None:
    torch.manual_seed(0)
    model, x = Loop(**how).double(), some(6, 5, 3)
    sizes = ({0: torch.export.Dim("a", min=2, max=64), 1: torch.export.Dim("b", min=2, max=64)},)
    program = torch.export.export(model, (x,), dynamic_shapes=sizes, strict=strict)
    assert len(chains_of(program)) == 1
    for shape in ((6, 5, 3), (2, 9, 3), (40, 3, 3)):
        expected = values_and_gradients(model, some(*shape))
        torch.testing.assert_close(values_and_gradients(program.module(), some(*shape)), expected)


class Branching(Loop):
    def forward(self, x: Tensor) -> Any:
        def step(h: Tensor, x: Tensor) -> Any:
            with torch.no_grad():
                seen = h.sin()
            return torch.tanh(self.cell(torch.cat([h, x], -1))) + seen, None

        return pcr_fx.scan(step, x.new_zeros(x.shape[1], 4), x, options=self.options)[0]


def test_a_step_that_a_text_cannot_say_is_exported_step_by_step() -> None:
    torch.manual_seed(0)
    model, x = Branching().double(), some(6, 5, 3)
    program = exported(model, x)
    assert not chains_of(program)
    torch.testing.assert_close(values_and_gradients(program.module(), x), values_and_gradients(model, x))


# --- what else is done with a program -----------------------------------------------------------------------------------

USES: dict[str, Callable[[Any, Tensor], Any]] = {
    "no gradients": lambda run, x: torch.no_grad()(run)(x),
    "inference mode": lambda run, x: torch.inference_mode()(run)(x).clone(),
    "jvp": lambda run, x: torch.func.jvp(run, (x,), (x.cos(),)),
    "jacfwd": lambda run, x: torch.func.jacfwd(run)(x),
    "jacrev": lambda run, x: torch.func.jacrev(run)(x),
    "hessian": lambda run, x: torch.func.hessian(lambda y: run(y).sin().sum())(x),
    "second derivatives": lambda run, x: torch.autograd.functional.hessian(lambda y: run(y).sin().sum(), x),
    "compiled": lambda run, x: values_and_gradients(torch.compile(run, backend="aot_eager", fullgraph=True), x),
}


@pytest.mark.parametrize("use", USES)
def test_programs_in_transforms_and_compilers(use: str) -> None:
    model, x = made("residual")
    run = exported(pcr_fx.transform(model, x, QUICK), x).module()
    torch.testing.assert_close(USES[use](run, x), USES[use](model, x))


def test_the_operator_meets_what_compilers_expect_of_one() -> None:
    model, x = made("readouts")
    (chain,) = chains_of(exported(pcr_fx.transform(model, x, QUICK), x))
    text, meta = chain.args[3], lambda nodes: [some(*node.meta["val"].shape).requires_grad_() for node in nodes]
    arguments = (*map(meta, chain.args[:3]), text)
    torch.library.opcheck(torch.ops.pcr_fx.chain.default, arguments)


LOADED = """
import torch
import pcr_fx
from pcr_fx import carried
for name in ("residual", "readouts"):
    x, expected, gradient = torch.load(name + ".tensors")
    run = torch.export.load(name + ".pt2").module()
    leaf = x.clone().requires_grad_()
    found = run(leaf)
    every = found if isinstance(found, tuple) else (found,)
    sum(one.square().sum() for one in every).backward()
    torch.testing.assert_close((found, leaf.grad), (expected, gradient))
records = [node.record for told in carried._told._held.values() for node in told.nodes._held.values()]
assert len(records) == 2 and all(record.forward_calls and record.backward_calls for record in records)
"""


def test_another_process_loads_programs_and_trains_them(tmp_path: Path) -> None:
    for name in ("residual", "readouts"):
        model, x = made(name)
        torch.export.save(exported(pcr_fx.transform(model, x, QUICK), x, dynamic=True), tmp_path / f"{name}.pt2")
        given = some(5, *x.shape[1:]).requires_grad_()
        found = model(given)
        every = found if isinstance(found, tuple) else (found,)
        (gradient,) = torch.autograd.grad(sum(one.square().sum() for one in every), given)
        detached = tuple(one.detach() for one in every) if isinstance(found, tuple) else found.detach()
        torch.save((given.detach(), detached, gradient), tmp_path / f"{name}.tensors")
    environment = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", LOADED], cwd=tmp_path, check=True, env={**os.environ, **environment})


# --- texts from anybody -------------------------------------------------------------------------------------------------


def good() -> dict[str, Any]:
    """z + operand * number, twice."""
    ops = [
        ["aten.mul.Tensor", [{"value": 1}, {"value": 2}], {}],
        ["aten.add.Tensor", [{"value": 0}, {"value": 3}], {"alpha": 1}],
    ]
    return {
        "format": "pcr_fx chain 1",
        "length": 2,
        "states": 1,
        "operands": 1,
        "shared": 0,
        "literals": [[2.0, 3.0]],
        "is_checkpoint": False,
        "name": ["a chain", ""],
        "whole": [0],
        "taps": [[0, 1]],
        "options": QUICK,
        "graphs": {"body": {"inputs": 3, "ops": ops, "outputs": [{"value": 4}]}},
    }


def test_a_text_written_by_hand_is_a_chain() -> None:
    state, operand = some(3).requires_grad_(), some(2, 3).requires_grad_()
    whole, last = torch.ops.pcr_fx.chain([state], [operand], [], json.dumps(good()))
    first = state + 2 * operand[0]
    expected = torch.stack([first, first + 3 * operand[1]])
    torch.testing.assert_close((whole, last), (expected, expected[1]))
    (whole.sum() + last.sum()).backward()
    torch.testing.assert_close(state.grad, torch.full((3,), 3.0, dtype=torch.float64))
    torch.testing.assert_close(operand.grad, torch.tensor([[6.0], [6.0]], dtype=torch.float64).expand(2, 3))


def with_op(name: Any, args: Any = ({"value": 0},), kwargs: Any = None) -> Callable[[dict[str, Any]], None]:
    def change(said: dict[str, Any]) -> None:
        said["graphs"]["body"]["ops"][1] = [name, list(args), kwargs or {}]

    return change


def with_entry(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda said: said.update({name: value})


REFUSED: dict[str, Callable[[dict[str, Any]], None]] = {
    "another format": with_entry("format", "pcr_fx chain 9"),
    "no length": with_entry("length", 0),
    "a length that is a text": with_entry("length", "2"),
    "endless": with_entry("length", 10**18),
    "a literal too few": with_entry("literals", [[2.0]]),
    "a literal that is none": with_entry("literals", [[2.0, "3"]]),
    "a state too many": with_entry("states", 2),
    "no states": with_entry("states", 0),
    "a tap beyond the end": with_entry("taps", [[0, 2]]),
    "a tap of no state": with_entry("taps", [[1, 0]]),
    "an option that is none": with_entry("options", {"colour": "red"}),
    "an inner backend": with_entry("options", {"inner_backend": "inductor"}),
    "no graphs": with_entry("graphs", {}),
    "graphs that are none": with_entry("graphs", {"body": 3}),
    "a head without graphs": with_entry("head", {"outputs": 1, "operands": 0, "shared": 0, "literals": []}),
    "a value to come": with_op("aten.sin.default", [{"value": 4}]),
    "no such value": with_op("aten.sin.default", [{"value": -1}]),
    "no such kind": with_op("aten.sin.default", [{"file": "x"}]),
    "two kinds": with_op("aten.sin.default", [{"value": 0, "dtype": "torch.float32"}]),
    "no such dtype": with_op("aten.to.dtype", [{"value": 0}, {"dtype": "os.system"}]),
    "a function of Python's": with_op("os.system", ["true"]),
    "code": with_op("__import__('os').system('true')"),
    "a name that is none": with_op(3),
    "a part of a module": with_op("aten.__class__.default"),
    "no such op": with_op("aten.sinn.default"),
    "no such overload": with_op("aten.sin.Tensor"),
    "a write": with_op("aten.sin_.default"),
    "a write into an argument": with_op("aten.sin.out", [{"value": 0}], {"out": {"value": 1}}),
    "random numbers": with_op("aten.rand_like.default"),
    "a file": with_op("aten.from_file.default", ["/etc/passwd"]),
    "memory that nobody wrote to": with_op("aten.empty_like.default"),
    "memory elsewhere": with_op("aten.as_strided.default", [{"value": 0}, [99], [1]]),
    "an op for internal use": with_op("aten._sparse_coo_tensor_unsafe.default"),
    "an op of another library": with_op("inductor.accumulate_grad_.default"),
    "another loop": with_op("pcr_fx.solve.default"),
    "no result": with_op("aten._assert_async.default"),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_a_text_that_says_what_it_may_not_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    said = good()
    change(said)
    with pytest.raises(TextError, match="text of a chain"):
        torch.ops.pcr_fx.chain([some(3)], [some(2, 3)], [], json.dumps(said))


@pytest.mark.parametrize(
    "text", ["", "{", "3", "null", "[]", "[" * 100_000, "import os", '{"format": 1}'], ids=range(8)
)
def test_what_is_no_text_of_a_chain_is_refused(text: str) -> None:
    with pytest.raises(TextError, match="text of a chain"):
        read_text(text, CPU)


@pytest.mark.parametrize(
    "given", [([], [some(2, 3)], []), ([some(3)], [], []), ([some(3)], [some(2, 3)], [some(3)])], ids=range(3)
)
def test_other_tensors_than_the_text_says_are_refused(given: Any) -> None:
    with pytest.raises(TextError, match="states, operands and shared operands was given"):
        torch.ops.pcr_fx.chain(*given, json.dumps(good()))


def test_operands_of_another_length_are_refused() -> None:
    with pytest.raises(TextError, match="a chain of 2 blocks was given operands of 3"):
        torch.ops.pcr_fx.chain([some(3)], [some(3, 3)], [], json.dumps(good()))
