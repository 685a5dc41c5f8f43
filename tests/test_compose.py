"""A chain among what else PyTorch does with a model: what sees each op sees those that the model wrote, by both ways in."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from compositions import DEPTH, QUICK, SOLVERS, USES, WAYS, cell, compiled, one_process, some
from models import ResidualNet
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import pcr_fx


class Recurrent(nn.Module):
    """A cell with two states, of which every step leaves something."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = cell = x.new_zeros(x.shape[0], 4)
        every = []
        for step in range(DEPTH):
            gate = torch.sigmoid(self.inner(x * (step + 1)) + self.outer(state))
            cell = gate * cell + (1 - gate) * state.cos()
            state = torch.tanh(cell + state)
            every.append(state.sin())
        return torch.stack(every, 1).sum(1) + cell

    def doubled(self, x: Tensor) -> Tensor:
        return 2 * self(x)


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"layers": ResidualNet(DEPTH).double(), "steps": Recurrent().double()}


ROUTES = {**SOLVERS, "ops": {**QUICK, "kernels": False}}
# Of the table those that look into a chain.
DERIVATIVES = [
    name
    for name in USES
    if any(word in name for word in "func. forward_ad jacobian hessian batched create_graph vmap samples Flop".split())
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name, use in USES.items() if not use.is_slow])
def test_each_row_of_the_table(name: str, way: str) -> None:
    use = USES[name]
    if importlib.util.find_spec(use.needs) is None or way not in use.ways:
        pytest.skip("nothing to try")
    assert cell(use, way, QUICK) == "right"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("use", DERIVATIVES)
def test_what_looks_into_a_chain_with_outputs(use: str, way: str) -> None:
    model, x = models()["steps"], some()
    expected = USES[use].act(model, x)
    for options in ROUTES.values():
        torch.compiler.reset()
        fast = WAYS[way](models()["steps"], options)
        fast(x)
        torch.testing.assert_close(USES[use].act(fast, x), expected, rtol=1e-8, atol=1e-10)


def twice(gradient: Tensor) -> Tensor:
    return 2 * gradient


class Hooked(nn.Module):
    """Doubles the gradient of an inner state."""

    def __init__(self, uses_tensor: bool = False) -> None:
        super().__init__()
        self.net, self.uses_tensor = ResidualNet(2 * DEPTH), uses_tensor

    def forward(self, x: Tensor) -> Tensor:
        state = self.net.stem(x)
        for index, block in enumerate(self.net.blocks):
            state = block(state)
            if index == DEPTH:
                state.register_hook((lambda gradient, x=x: gradient * x.sum()) if self.uses_tensor else twice)
        return state


@pytest.mark.parametrize("way", WAYS)
def test_a_hook_in_the_forward(way: str) -> None:
    gradients = []
    for make in (lambda model: model, lambda model: WAYS[way](model, QUICK)):
        torch.manual_seed(0)
        leaf = some().requires_grad_()
        make(Hooked().double())(leaf).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_hook_that_uses_what_the_forward_made_is_refused() -> None:
    class Counted(ResidualNet):
        def forward(self, x: Tensor) -> Tensor:
            x, calls = self.stem(x), []
            x.register_hook(lambda gradient: calls.append(1))
            return self.blocks(x)

    for model in (Hooked(uses_tensor=True), Counted(DEPTH)):
        with pytest.raises(pcr_fx.CaptureError, match="a hook uses what the forward made"):
            pcr_fx.transform(model.double(), some(), QUICK)


@pytest.mark.parametrize("name", ["data", "grad"])
def test_what_sets_attributes_of_tensors_is_refused(name: str) -> None:
    class Sets(ResidualNet):
        def forward(self, x: Tensor) -> Tensor:
            setattr(self.stem.weight, name, x)
            return super().forward(x)

    with pytest.raises(pcr_fx.CaptureError, match=f"the model sets {name} of a tensor"):
        pcr_fx.transform(Sets(DEPTH).double(), some(), QUICK)


def test_what_a_forward_sets_to_require_gradients_does() -> None:
    class Starting(ResidualNet):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            start = torch.zeros_like(x)
            start.requires_grad = True
            return super().forward(x + start), start

    model, x = Starting(DEPTH).double(), some()
    found = []
    for run in (pcr_fx.transform(model, x, QUICK), model):
        y, start = run(x)
        y.sum().backward()
        assert start.is_leaf
        found.append(start.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "draw", [random.random, lambda: random.choice([1, 2]), np.random.rand, np.random.standard_normal]
)
def test_random_numbers_of_others_are_refused(draw: Any) -> None:
    class Draws(ResidualNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * draw()

    with pytest.raises(pcr_fx.CaptureError, match="random numbers of Python or NumPy"):
        pcr_fx.transform(Draws(DEPTH).double(), some(), QUICK)


def test_a_generator_is_refused_in_words() -> None:
    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(0)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn(x.shape, generator=self.generator)

    with pytest.raises(pcr_fx.CaptureError, match=r"draws from a torch\.Generator at .*test_compose\.py"):
        pcr_fx.transform(Drawing(), torch.randn(3))


def test_random_numbers_that_another_thread_draws_are_no_hindrance() -> None:
    ended = threading.Event()

    def draw() -> None:
        while not ended.is_set():
            random.random()

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        assert pcr_fx.transform(models()["layers"], some(), QUICK).report.chains
    finally:
        ended.set()
        thread.join()


class Doubled(TorchFunctionMode):
    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        return 2 * found if function is torch.tanh else found


@pytest.mark.parametrize("way", ["transform", "packed"])  # "eager" in a compiler's place is wrong here by itself
def test_a_mode_that_changes_functions_changes_those_of_blocks(way: str) -> None:
    fast = WAYS[way](models()["layers"], QUICK)
    fast(some())
    with Doubled():
        got, expected = fast(some()), models()["layers"](some())
    torch.testing.assert_close(got, expected)


def test_an_ensemble() -> None:
    base = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(DEPTH)))
    each = [nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(DEPTH))) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(each)

    def run(parameters: Any, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda one: torch.func.functional_call(base, one, (x,)))(parameters)

    x = torch.randn(4, 8)
    torch.testing.assert_close(torch.compile(run, backend="deeppcr")(parameters, x), run(parameters, x))


# --- compilers and exporters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("name", ["layers", "steps"])
def test_one_graph(name: str, pack: bool) -> None:
    model, x = models()[name], some()
    fast = pcr_fx.transform(models()[name], x, QUICK, pack_parameters=pack)
    whole = torch.compile(fast, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(x), model(x))
    # Where the graph may break, the chain runs as it does alone.
    calls = fast.report.chains[0].node.record.forward_calls
    torch.testing.assert_close(torch.compile(fast, backend="eager")(x), model(x))
    assert fast.report.chains[0].node.record.forward_calls == calls + 1


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("name", ["layers", "steps"])
def test_export_with_a_dynamic_batch(name: str, pack: bool, strict: bool) -> None:
    model = models()[name]
    fast = pcr_fx.transform(models()[name], some(), QUICK, pack_parameters=pack)
    sizes = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(fast, (some(),), dynamic_shapes=(sizes,), strict=strict)
    torch.testing.assert_close(program.module()(some(9)), model(some(9)))


def test_a_whole_training_step_is_one_report(caplog: pytest.LogCaptureFixture) -> None:
    model, x = ResidualNet(DEPTH), torch.randn(4, 3)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> Tensor:
        optimiser.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimiser.step()
        return loss

    run = torch.compile(step, backend="deeppcr", options={"inner_backend": "eager"})
    assert run() > run()
    assert [chain["length"] for chain in pcr_fx.report().to_dict()["chains"]] == [DEPTH]
    assert "no chain found" not in caplog.text


def test_a_profiler_is_told_of_a_chain_by_name() -> None:
    fast = pcr_fx.transform(models()["layers"], some(), QUICK)
    fast(some())
    with torch.profiler.profile() as profile:
        fast(some())
    assert f"pcr_fx: blocks.0..{DEPTH - 1}" in {event.key for event in profile.key_averages()}


# --- classes, devices, tensors of other classes ----------------------------------------------------------------------


def test_it_is_a_model_of_its_class() -> None:
    model, x = models()["steps"], some()
    fast = pcr_fx.transform(models()["steps"], x, QUICK)
    assert isinstance(fast, Recurrent)
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)
    calls = fast.report.chains[0].node.record.forward_calls
    torch.testing.assert_close(fast.doubled(x), 2 * model(x))
    assert fast.report.chains[0].node.record.forward_calls == calls + 1


class Sealed(type):
    def __new__(cls, name: str, bases: tuple[type, ...], body: Any, **how: Any) -> Any:
        if any(isinstance(base, Sealed) for base in bases):
            raise TypeError("no classes are made of it")
        return super().__new__(cls, name, bases, body, **how)


def test_a_class_that_may_not_be_inherited_from() -> None:
    class Final(ResidualNet, metaclass=Sealed):
        pass

    model = Final(DEPTH).double()
    torch.testing.assert_close(pcr_fx.transform(model, some(), QUICK)(some()), model(some()))


def test_a_class_with_a_report_and_a_list_of_its_subclasses() -> None:
    known: list[type] = []

    class Listed(ResidualNet):
        def __init_subclass__(cls) -> None:
            known.append(cls)

        def report(self) -> str:
            return "mine"

    fast = pcr_fx.transform(Listed(DEPTH).double(), some(), QUICK)
    assert fast.report() == "mine" and len(pcr_fx.report(fast).chains) == 1
    assert not known


def test_a_packed_sequential_has_no_more_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(DEPTH) for layer in (nn.Linear(3, 3), nn.Tanh()))).double()
    fast = pcr_fx.transform(model, some(), QUICK, pack_parameters=True)
    torch.testing.assert_close(copy.deepcopy(fast)(some()), model(some()))
    assert not isinstance(fast, nn.Sequential)
    torch.testing.assert_close(torch.export.export(fast, (some(),)).module()(some()), model(some()))
    with pytest.raises(Exception, match="packed parameters"):
        torch.export.export(fast, (some(),), strict=True)


class Strict(ResidualNet):
    """Allows no attributes that it does not know."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("stem", "blocks", "head", "training") and not name.startswith("_parameters"):
            raise AttributeError(f"no {name}")
        super().__setattr__(name, value)


@pytest.mark.parametrize("pack", [False, True])
def test_a_class_with_attributes_of_its_own_only(pack: bool) -> None:
    model = Strict(DEPTH).double()
    fast = pcr_fx.transform(model, some(), QUICK, pack_parameters=pack)
    torch.testing.assert_close(fast(some()), model(some()))
    torch.testing.assert_close(copy.deepcopy(fast).eval()(some()), model(some()))


def test_twice() -> None:
    fast = pcr_fx.transform(pcr_fx.transform(models()["layers"], some(), QUICK), some(), {"solver": "newton", **QUICK})
    torch.testing.assert_close(fast(some()), models()["layers"](some()))
    assert fast.report.chains[0].node.record.solver_forward == "newton"
    packed = pcr_fx.transform(fast, some(), QUICK, pack_parameters=True)
    torch.testing.assert_close(packed(some()), models()["layers"](some()))
    with pytest.raises(pcr_fx.UnsupportedError, match="packed"):
        pcr_fx.transform(packed, some())


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(2, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x.sin()))


@pytest.mark.parametrize("later", [False, True])
def test_within_another(later: bool) -> None:
    torch.manual_seed(0)
    model = Around(models()["layers"])
    twin = copy.deepcopy(model)
    if not later:
        twin.inner = pcr_fx.transform(twin.inner, some(), QUICK)
    fast = pcr_fx.transform(twin, some(), QUICK)
    if later:
        fast.inner = pcr_fx.transform(fast.inner, some(), QUICK)
    torch.testing.assert_close(USES["backward"].act(fast, some()), USES["backward"].act(model, some()))
    assert [chain["length"] for chain in fast.report.to_dict()["chains"]] == [DEPTH]
    for module in (fast, model):
        module.inner.blocks[3].inner = nn.Identity()
    torch.testing.assert_close(fast(some()), model(some()))
    torch.testing.assert_close(fast.inner(some()), model.inner(some()))
    for module in (fast, model):
        module.inner.register_forward_hook(lambda module, given, result: 2 * result)
    torch.testing.assert_close(fast(some()), model(some()))


def test_blocks_that_are_transformed() -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double() for _ in range(DEPTH)]
    fast = pcr_fx.transform(nn.Sequential(*(pcr_fx.transform(block, some(), QUICK) for block in blocks)), some(), QUICK)
    torch.testing.assert_close(fast(some()), nn.Sequential(*blocks)(some()))
    assert [chain["length"] for chain in fast.report.to_dict()["chains"]] == [DEPTH]


def test_one_with_packed_parameters_within_another_is_refused() -> None:
    with pytest.raises(pcr_fx.CaptureError, match="inner is a transformed module with packed parameters"):
        pcr_fx.transform(
            Around(pcr_fx.transform(models()["layers"], some(), QUICK, pack_parameters=True)), some(), QUICK
        )


@pytest.mark.parametrize("make", [torch.jit.script, torch.compile])
def test_what_is_compiled_already_is_refused(make: Any) -> None:
    with pytest.raises(pcr_fx.UnsupportedError, match="the model that this was made of"):
        pcr_fx.transform(make(nn.Linear(3, 3)), some())


def test_on_no_device_until_it_is_loaded() -> None:
    with torch.device("meta"):
        model = ResidualNet(DEPTH).double()
    fast = pcr_fx.transform(model, some().to("meta"), QUICK)
    assert len(fast.report.chains) == 1
    fast.to_empty(device="cpu")
    fast.load_state_dict(models()["layers"].state_dict())
    torch.testing.assert_close(fast(some()), models()["layers"](some()))
    assert len(fast.report.chains) == 1


class Scaled(Tensor):
    """Weights kept as whole numbers with a scale: all that can be done with them is `linear`."""

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: float) -> Scaled:
        made = Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float64, requires_grad=False)
        made.numbers, made.scale = numbers, scale
        return made

    numbers: Tensor
    scale: float
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __tensor_flatten__(self) -> tuple[list[str], float]:
        return ["numbers"], self.scale

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], scale: float, size: Any, stride: Any) -> Scaled:
        return Scaled(inner["numbers"], scale)

    @classmethod
    def __torch_dispatch__(cls, op: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten.detach.default:
            return Scaled(args[0].numbers, args[0].scale)
        if op is torch.ops.aten.t.default:
            return Scaled(args[0].numbers.t(), args[0].scale)
        if op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            *others, weight = args
            return op(*others, weight.numbers.double() * weight.scale)
        raise NotImplementedError(f"{op} of scaled numbers")


def scaled() -> nn.Module:
    model = nn.Sequential(*(layer for _ in range(DEPTH) for layer in (nn.Linear(3, 3), nn.Tanh()))).double()
    for layer in model[::2]:
        weight = Scaled((layer.weight.detach() * 100).round().to(torch.int8), 0.01)
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return model


@pytest.mark.parametrize("way", ["transform", "compile"])
def test_tensors_with_ops_of_their_own_are_left_to_these(way: str) -> None:
    torch.manual_seed(0)
    model, x = scaled(), some()
    fast = WAYS[way](model, QUICK)
    torch.testing.assert_close(fast(x), model(x))
    [chain] = (fast.report if way == "transform" else pcr_fx.report()).chains
    assert "Scaled, a class of tensors with ops of its own" in chain.reason


def test_weights_that_get_ops_of_their_own_later() -> None:
    model, x = nn.Sequential(*(layer for _ in range(DEPTH) for layer in (nn.Linear(3, 3), nn.Tanh()))).double(), some()
    fast = pcr_fx.transform(model, x, QUICK)
    fast(x)
    other = scaled()
    assert type(fast[::2]) is nn.Sequential
    for ours, layer in zip(fast[::2], other[::2], strict=True):
        ours.weight, ours.bias = layer.weight, layer.bias
    torch.testing.assert_close(fast(x), other(x))


@pytest.mark.parametrize("splits", [True, False])
def test_advice_on_buckets_is_given_where_it_helps(splits: bool) -> None:
    torch.compiler.reset()
    with one_process(), torch._dynamo.config.patch(optimize_ddp=splits):
        compiled(nn.parallel.DistributedDataParallel(models()["layers"]), QUICK)(some())
        assert ("optimize_ddp = False" in str(pcr_fx.report())) is splits
