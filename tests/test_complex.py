"""Complex numbers within blocks: as states, operands and on the way, by their real and imaginary parts."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import pcr_fx
from pcr_fx.body.reals import by_parts, holds_complex

pytestmark = pytest.mark.usefixtures("kernel_cache")
LENGTH = 12
COMPLEX = torch.complex128


def drawn(*shape: int, dtype: torch.dtype = COMPLEX) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


# --- rules --------------------------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "angle": torch.angle,
    "sgn": torch.sgn,
    "exp": torch.exp,
    "log": lambda z: torch.log(z + 3),
    "sqrt": lambda z: torch.sqrt(z + 0.1),
    "rsqrt": lambda z: torch.rsqrt(z + 3),
    "pow 2": lambda z: z**2,
    "pow -3": lambda z: (z + 3) ** -3,
    "pow 2.5": lambda z: (z + 0.5) ** 2.5,
    "a complex exponent": lambda z: (z + 3) ** (1 + 2j),
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "square": torch.square,
    "reciprocal": lambda z: torch.reciprocal(z + 3),
    "divided": lambda z: z.flip(0) / (z + 3),
    "dividing a real one": lambda z: z.real / (z - 2j),
    "by a real one": lambda z: z / (2 + z.imag),
    "a scalar": lambda z: (1 - 2j) * z + 1j - z / (2 + 1j),
    "polar": lambda z: torch.polar(z.real.square(), z.imag),
    "complex": lambda z: torch.complex(z.imag, z.real),
    "conj": lambda z: z.conj() * z.imag,
    "matmul": lambda z: z.mT.conj() @ z,
    "a matrix of reals": lambda z: z.real.mT.to(z.dtype) @ z,
    "einsum": lambda z: torch.einsum("ij,kj->ik", z, z.conj()),
    "kron": lambda z: torch.kron(z, z[:2]),
    "vdot": lambda z: torch.vdot(z[0], z[1]),
    "addmm": lambda z: torch.addmm(z.mT @ z, z.mT, z, beta=0.5, alpha=2),
    "sum": lambda z: z.sum(0),
    "mean": lambda z: z.mean(-1, keepdim=True),
    "prod": lambda z: z.prod(-1),
    "cumsum": lambda z: z.cumsum(-1),
    "cumprod": lambda z: z.cumprod(-1),
    "norm": lambda z: torch.linalg.vector_norm(z, dim=-1),
    "where": lambda z: torch.where(z.real > 0, z, 2.0),
    "masked": lambda z: z.masked_fill(z.imag > 0, 1j),
    "cat": lambda z: torch.cat([z, z[:1].conj()]),
    "a real row": lambda z: torch.stack([z, z.real.to(z.dtype)]),
    "index": lambda z: z[:, [2, 0]],
    "roll": lambda z: z.roll(1, -1),
    "diag": lambda z: torch.diag_embed(z),
    "padded": lambda z: torch.nn.functional.pad(z, (1, 2)),
    "padded with ones": lambda z: torch.nn.functional.pad(z, (0, 1), value=1.0),
    "a number scattered": lambda z: torch.scatter(z, 1, torch.tensor([[1], [0], [3]]), 2.0),
    "cat of whole numbers": lambda z: torch.cat([z, torch.ones(1, 4, dtype=torch.int64)]),
    "stack of truth values": lambda z: torch.stack([z, torch.ones(3, 4, dtype=torch.bool)]),
    "index_add with a complex factor": lambda z: z.index_add(0, torch.tensor([2, 0]), z[:2], alpha=2j),
    "complex of parts that broadcast": lambda z: torch.complex(z.real * torch.ones(2, 1, 1), z.imag).sum(0),
    "added to nothing": lambda z: torch.add(z[0], z, alpha=0),
    "truth": lambda z: torch.complex(torch.zeros_like(z.imag), z.imag).to(torch.bool) * z,
    "pow 0": lambda z: z**0 + z,
    "pow -4": lambda z: (z + 3) ** -4,
    "fft": lambda z: torch.fft.fft(z),
    "ifft of a part": lambda z: torch.fft.ifft(z, n=3, norm="ortho"),
    "fft2": lambda z: torch.fft.fft2(z),
    "rfft": lambda z: torch.fft.rfft(z.real),
    "irfft, even": lambda z: torch.fft.irfft(z, n=6),
    "irfft, odd": lambda z: torch.fft.irfft(z, n=5),
    "rfft2": lambda z: torch.fft.irfft2(torch.fft.rfft2(z.real) * 1j, s=(3, 4)),
}


def flat(values: Tensor) -> Tensor:
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rules_compute_what_the_ops_do(name: str) -> None:
    """Values and pullbacks, of pairs."""

    def of_pairs(pairs: Tensor) -> Tensor:
        return flat(FUNCTIONS[name](torch.view_as_complex(pairs)))

    def pullback(pairs: Tensor, cotangent: Tensor) -> Tensor:
        return torch.func.vjp(of_pairs, pairs)[1](cotangent)[0]

    pairs = torch.view_as_real(drawn(3, 4))
    cotangent = torch.randn_like(of_pairs(pairs))
    for function, inputs in ((of_pairs, (pairs,)), (pullback, (pairs, cotangent))):
        graph = make_fx(torch.func.functionalize(function))(*inputs)
        assert holds_complex(graph.graph)
        real = make_fx(by_parts(graph))(*inputs)
        real.graph.eliminate_dead_code()
        assert not holds_complex(real.graph)
        assert_close(real(*inputs), function(*inputs))


@pytest.mark.parametrize("name", ["abs", "sgn", "angle", "exp", "tanh", "square"])
def test_rules_at_zeros_and_large_numbers(name: str) -> None:
    values = torch.tensor([0, 1e-200, 1e200, 1e200j, -0.5, 2j, 300 + 1j], dtype=COMPLEX)
    pairs = torch.view_as_real(values)
    graph = make_fx(lambda pairs: flat(FUNCTIONS[name](torch.view_as_complex(pairs))))(pairs)
    got, expected = by_parts(graph)(pairs), flat(FUNCTIONS[name](values))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-250, equal_nan=True)


def test_no_power_of_zero_is_taken_for_zero() -> None:
    pairs = torch.zeros(3, 2, dtype=torch.float64)
    for exponent in (-4, -2.5, 2.5, 5):
        graph = make_fx(
            functools.partial(lambda exponent, pairs: flat(torch.view_as_complex(pairs) ** exponent), exponent)
        )(pairs)
        got, expected = by_parts(graph)(pairs), flat(torch.zeros(3, dtype=COMPLEX) ** exponent)
        assert torch.equal(got.isfinite().all(-1), expected.isfinite().all(-1)), exponent


# --- chains -------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """`block(z, p)` for each of some parameters; what `read` makes of all states leaves it."""

    def __init__(
        self,
        block: Callable[..., Tensor],
        shape: tuple[int, ...] = (6,),
        dtype: torch.dtype = torch.float64,
        read: Callable[[list[Tensor]], Any] = lambda states: states[-1],
    ) -> None:
        super().__init__()
        self.block, self.read = block, read
        self.p = nn.ParameterList(0.3 * drawn(*shape, index, dtype=dtype)[..., 0] for index in range(1, LENGTH + 1))

    def forward(self, z: Tensor) -> Any:
        states = []
        for p in self.p:
            z = self.block(z, p)
            states.append(z)
        return self.read(states)


BLOCKS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], torch.dtype]] = {
    "phases": (lambda z, p: z * torch.exp(1j * p) + 0.1, (6,), torch.float64),
    "a diffractive layer": (lambda z, p: torch.fft.ifft(torch.fft.fft(z) * torch.exp(1j * p)), (6,), torch.float64),
    "an activation": (lambda z, p: torch.tanh(0.5 * z) + p, (6,), torch.float64),
    "a complex matrix": (lambda z, p: (z @ p) / (1 + (z @ p).abs()), (6, 6), COMPLEX),
    "a conjugate": (lambda z, p: z.conj() * p + 0.2 * z, (6,), COMPLEX),
    "a Kerr phase": (lambda z, p: z * torch.exp(1j * p * z.abs() ** 2), (6,), torch.float64),
    "parts": (lambda z, p: torch.complex(torch.tanh(z.real + p), 0.9 * z.imag), (6,), torch.float64),
    "a choice": (lambda z, p: torch.where(z.real > 0, 0.9 * z, 0.5 * z.conj() + p), (6,), torch.float64),
    "a normalised state": (
        lambda z, p: (z + 1j * p) / torch.linalg.vector_norm(z, dim=-1, keepdim=True),
        (6,),
        COMPLEX,
    ),
}


def results_and_gradients(run: Callable[..., Any], model: nn.Module, given: Tensor) -> list[Tensor]:
    given = given.clone().requires_grad_()
    found = run(given)
    found = [found] if isinstance(found, Tensor) else list(found)
    weights = (torch.linspace(0.5, 1.5, flat(one).numel(), dtype=flat(one).dtype) for one in found)
    loss = sum((flat(one).reshape(-1) * weight).sum() for one, weight in zip(found, weights, strict=True))
    assert isinstance(loss, Tensor)
    leaves = [given, *model.parameters()]
    return [*found, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def check(model: nn.Module, given: Tensor, compiled: bool = False, kernel: bool = True, **options: Any) -> str:
    """Both ways in compute what the model does; the report."""
    if compiled:
        torch._dynamo.reset()
        run: Any = torch.compile(model, backend="deeppcr", options={"inner_backend": "eager", **options})
    else:
        run = pcr_fx.transform(model, example_inputs=given, options=options)
    expected = results_and_gradients(model, model, given)
    for _ in range(2):
        for one, wanted in zip(results_and_gradients(run, model, given), expected, strict=True):
            assert_close(one, wanted)
    report = pcr_fx.report() if compiled else pcr_fx.report(run)
    assert [chain["length"] for chain in report.to_dict()["chains"]] == [LENGTH], report
    assert ("native kernel)" in str(report) and "no kernel" not in str(report)) == kernel, report
    return str(report)


@pytest.mark.parametrize("name", BLOCKS)
def test_chains_of_complex_states(name: str) -> None:
    block, shape, dtype = BLOCKS[name]
    check(Model(block, shape, dtype), drawn(3, 6))


@pytest.mark.parametrize("name", ["a diffractive layer", "a complex matrix", "a conjugate"])
def test_chains_of_complex_states_through_the_compiler(name: str) -> None:
    block, shape, dtype = BLOCKS[name]
    check(Model(block, shape, dtype), drawn(3, 6), compiled=True)


READS: dict[str, Callable[[list[Tensor]], Any]] = {
    "all states": lambda states: torch.stack(states, -1),
    "joined": lambda states: torch.cat(states[::-1]),
    "real outputs": lambda states: torch.stack([one.abs() for one in states], 1),
    "complex outputs": lambda states: (torch.stack([(one * 2j).sum(-1) for one in states]), states[-1]),
    "some of them": lambda states: states[3] * states[7] + states[-1],
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", READS)
def test_what_leaves_chains_of_complex_states(name: str, compiled: bool) -> None:
    block, shape, dtype = BLOCKS["phases"]
    check(Model(block, shape, dtype, READS[name]), drawn(3, 6), compiled)


def test_complex_numbers_between_real_states() -> None:
    """A Fourier layer: complex weights, and a complex output."""

    def layer(x: Tensor, p: Tensor) -> Tensor:
        return torch.tanh(torch.fft.irfft(torch.fft.rfft(x) * p, n=6)) + 0.1 * x

    given = drawn(3, 6, dtype=torch.float64)
    check(Model(layer, (4,), COMPLEX), given)
    check(Model(layer, (4,), COMPLEX, lambda states: torch.stack([one * 1j for one in states])), given, compiled=True)


def test_single_precision_and_states_without_a_batch() -> None:
    block, shape, _ = BLOCKS["phases"]
    check(Model(block, shape, torch.float32), drawn(3, 6, dtype=torch.complex64))
    check(Model(block, shape, torch.float64), drawn(6))


def test_newtons_method_solves_for_real_and_imaginary_parts() -> None:
    block, shape, dtype = BLOCKS["an activation"]
    assert "newton" in check(Model(block, shape, dtype), drawn(3, 6), solver="newton")


def test_an_op_without_a_rule_is_named_and_runs() -> None:
    def layer(z: Tensor, p: Tensor) -> Tensor:
        return torch.fft.ifft(torch.fft.fft(z) * torch.exp(1j * p))

    report = check(Model(layer, (66,)), drawn(2, 66), kernel=False)
    assert "no kernel is printed for aten._fft_c2c.default of complex numbers" in " ".join(
        report.replace("|", " ").split()
    )


def test_that_states_are_complex_has_to_be_known() -> None:
    block, shape, dtype = BLOCKS["phases"]
    model, given = Model(block, shape, dtype), drawn(3, 6)
    run = pcr_fx.transform(model)
    assert_close(run(given), model(given))
    assert "without example inputs" in " ".join(str(run.report).replace("|", " ").split())


def test_loops_of_complex_carries() -> None:
    def step(z: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        z = z * torch.exp(1j * p) * 0.9 + 0.1
        return z, z * p

    given, xs = drawn(3, 6).requires_grad_(), drawn(LENGTH, 6, dtype=torch.float64).requires_grad_()
    final, outputs = pcr_fx.scan(step, given, xs)
    state, each = given, []
    for x in xs:
        state, output = step(state, x)
        each.append(output)
    expected = state, torch.stack(each)
    assert_close(final, expected[0])
    assert_close(outputs, expected[1])
    for one, wanted in zip(
        torch.autograd.grad(flat(final).sum() + flat(outputs).square().sum(), [given, xs]),
        torch.autograd.grad(flat(expected[0]).sum() + flat(expected[1]).square().sum(), [given, xs]),
        strict=True,
    ):
        assert_close(one, wanted)
    assert "native kernel" in str(pcr_fx.report(step))
