"""Every error of the ways in is raised once: it says what was wrong, what was got, and what is allowed."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import plain_mlp
from torch import Tensor, nn

import pcr_fx
from pcr_fx.backend import deeppcr
from pcr_fx.chain import Chain
from pcr_fx.reports import ChainEntry
from pcr_fx.reproduction import _constant, _lines, _word

ROOT = Path(pcr_fx.__file__).parent
FILES = (
    "options",
    "scan",
    "solve",
    "explicit",
    "introspect",
    "verification",
    "comparison",
    "reports",
    "reproduction",
    "backend",
)
# What callers never see: it is caught, and said in other words.
INTERNAL = {"ValueError", "NotCaptured"}
X = torch.ones(3)
XS = torch.ones(5, 3)


class Uncopied(nn.Module):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("it holds a socket")

    def forward(self, x: Tensor) -> Tensor:
        return x


def keep(carry: Any, x: Any) -> Any:
    return carry, x


def scan(step: Any = keep, init: Any = X, xs: Any = XS, **given: Any) -> Callable[[], Any]:
    return lambda: pcr_fx.scan(step, init, xs, **given)


def chain(step: Any = lambda z, *_: z, x0: Any = X, operands: Any = XS, **given: Any) -> Callable[[], Any]:
    return lambda: pcr_fx.solve_chain(step, x0, operands, **given)


def options(**given: Any) -> Callable[[], Any]:
    return lambda: pcr_fx.Options.of(given)


def transform(model: Any = None, *given: Any, **named: Any) -> Callable[[], Any]:
    return lambda: pcr_fx.transform(nn.Linear(3, 3) if model is None else model, *given, **named)


def ys_that_change() -> Callable[..., Any]:
    count = iter(range(9))
    return lambda carry, x: (carry, [x] * (1 + next(count)))


def packed() -> Any:
    return pcr_fx.transform(plain_mlp(9), torch.ones(2, 4), {"kernels": False}, pack_parameters=True)


def closing_over_under_a_transform() -> Any:
    closed = torch.ones(3)
    return torch.func.jvp(lambda x: pcr_fx.solve_chain(lambda z, *_: z * closed, x, XS).final, (X,), (X,))


def with_a_graph_within(z: Tensor, *_: Any) -> Tensor:
    return torch.cond(z.sum() > 0, lambda z: z.sin(), lambda z: z.cos(), (z,))


def branching(z: Tensor, *_: Any) -> Tensor:
    return z if z.sum() > 0 else -z


def backend(**given: Any) -> Callable[[], Any]:
    return lambda: deeppcr(torch.fx.symbolic_trace(nn.Linear(1, 1)), [], **given)


def of_graph(*nodes: Any) -> Any:
    """A graph of one call of a function, or of one attribute."""
    graph = torch.fx.Graph()
    graph.call_function(*nodes)
    return graph


# What is raised, by what, and what it says of that.
CASES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: pcr_fx.Options.of(3), pcr_fx.OptionError, "a dict or None, got int"),  # type: ignore[arg-type]
    (options(solver="euler"), pcr_fx.OptionError, "solver='euler' is not allowed; it must be one of 'auto', 'newton'"),
    (options(window=1), pcr_fx.OptionError, "window=1 is not allowed; it must be a whole number >= 2 or None"),
    (
        options(tolerance=-1.0),
        pcr_fx.OptionError,
        "tolerance=-1.0 is not allowed; it must be a positive number or None",
    ),
    (options(kernels=1), pcr_fx.OptionError, "kernels=1 is not allowed; it must be True or False"),
    (options(diagonal_probes=3), pcr_fx.OptionError, 'None with solver="auto": only "quasi-newton" has them'),
    (options(solver="sequential", damping=0.5), pcr_fx.OptionError, "which does not iterate"),
    (options(inner_backend="deeppcr"), pcr_fx.OptionError, "other than 'deeppcr' itself"),
    (options(inner_backend=3), pcr_fx.OptionError, "inner_backend=3 is not allowed"),
    (options(pace=3), pcr_fx.OptionError, "unknown option 'pace'; valid options are solver"),
    (
        backend(options={"inner_backend": "none"}),
        pcr_fx.OptionError,
        "inner_backend='none' is not allowed; it must be one of",
    ),
    (backend(mode="max-autotune", options={"inner_backend": "eager"}), pcr_fx.OptionError, "this one is 'eager'"),
    (scan(3), pcr_fx.UnsupportedError, "combine_fn must be callable, got int"),
    (scan(reverse=1), pcr_fx.UnsupportedError, "reverse must be True or False, got 1"),
    (scan(dim=0.5), pcr_fx.UnsupportedError, "dim must be a whole number, got 0.5"),
    (scan(init=None), pcr_fx.UnsupportedError, "init holds no tensor"),
    (scan(init=[X, "a"]), pcr_fx.UnsupportedError, "all leaves of init must be tensors, got str 'a'"),
    (scan(dim=2), pcr_fx.UnsupportedError, "along dimension 2, got a tensor of shape [5, 3]"),
    (scan(xs=[XS, X], dim=1), pcr_fx.UnsupportedError, "along dimension 1, got a tensor of shape [3]"),
    (scan(length=-1), pcr_fx.UnsupportedError, "at least 0, got -1"),
    (scan(xs=None), pcr_fx.UnsupportedError, "length says so"),
    (scan(length=4), pcr_fx.UnsupportedError, "must agree on the number of steps, got 5 and 4"),
    (scan(lambda *given: X), pcr_fx.UnsupportedError, "must return a pair, the new carry and ys, got Tensor"),
    (scan(lambda c, x: (None, x)), pcr_fx.UnsupportedError, "must have the structure of init"),
    (scan(lambda c, x: (c[:2], x)), pcr_fx.UnsupportedError, "[3] torch.float32 became [2] torch.float32"),
    (scan(lambda c, x: (c, "a")), pcr_fx.UnsupportedError, "all leaves of ys must be tensors or None, got str 'a'"),
    (scan(ys_that_change()), pcr_fx.UnsupportedError, "ys must have one structure in all steps"),
    (chain(start=XS, options={"solver": "sequential"}), pcr_fx.UnsupportedError, "does not iterate"),
    (chain(x0=[]), pcr_fx.UnsupportedError, "x0 holds no tensor"),
    (chain(shared=3), pcr_fx.UnsupportedError, "shared must be tensors, got int"),
    (chain(x0=torch.ones(3, dtype=torch.int64)), pcr_fx.UnsupportedError, "or a complex one, got torch.int64"),
    (chain(length=2.5), pcr_fx.UnsupportedError, "length must be a whole number, got 2.5"),
    (chain(operands=torch.tensor(1.0)), pcr_fx.UnsupportedError, "got a tensor without dimensions"),
    (chain(length=4), pcr_fx.UnsupportedError, "must agree on one L, got 4, 5"),
    (chain(operands=torch.ones(0, 3)), pcr_fx.UnsupportedError, "at least 1 block, got length 0"),
    (chain(lambda z, *_: [z]), pcr_fx.UnsupportedError, "must return a state of the structure of x0"),
    (chain(lambda z, *_: 3), pcr_fx.UnsupportedError, "step must return tensors, got int"),
    (
        chain(lambda z, *_: z[:1]),
        pcr_fx.BodyError,
        "of the shape and dtype of x0, [3] torch.float32, got [1] torch.float32",
    ),
    (transform(torch.tanh), pcr_fx.UnsupportedError, "transform takes a torch.nn.Module, got builtin"),
    (transform(torch.compile(nn.Linear(1, 1))), pcr_fx.UnsupportedError, "got a OptimizedModule: give it the model"),
    (transform(pack_parameters=1), pcr_fx.UnsupportedError, "pack_parameters must be True or False, got 1"),
    (
        transform(optimizer=torch.optim.SGD([torch.ones(1)])),
        pcr_fx.UnsupportedError,
        "optimizer goes with pack_parameters=True",
    ),
    (lambda: pcr_fx.report(3), pcr_fx.UnsupportedError, "report takes what pcr_fx.transform returned"),  # type: ignore[arg-type]
    (lambda: pcr_fx.explain(3), pcr_fx.UnsupportedError, "explain takes a module or a function, got int"),  # type: ignore[arg-type]
    (lambda: pcr_fx.verify(3), pcr_fx.UnsupportedError, "verify takes a torch.nn.Module, got int"),  # type: ignore[arg-type]
    (lambda: pcr_fx.verify(nn.Identity(), X, through="x"), pcr_fx.OptionError, "'transform', 'compile', got 'x'"),
    (lambda: pcr_fx.verify(Uncopied(), X), pcr_fx.UnsupportedError, "Uncopied has none: it holds a socket"),
    (lambda: pcr_fx.RewriteReport().repro(1), pcr_fx.UnsupportedError, "report's 0 chains, got 1"),
    (
        lambda: pcr_fx.RewriteReport([ChainEntry(Chain(nn.Identity(), 8), pcr_fx.Options())]).repro(),  # type: ignore[arg-type]
        pcr_fx.UnsupportedError,
        "this one has no plan: not run",
    ),
    (lambda: _lines(of_graph(print), [], 0), pcr_fx.UnsupportedError, "this chain calls <built-in function print>"),
    (lambda: _constant(nn.Identity()), pcr_fx.UnsupportedError, "this chain holds a Identity"),
    (lambda: _word(object(), {}), pcr_fx.UnsupportedError, "this chain holds a object"),
]
# The same where chains are read: the others are plain loops, which no step has to be captured for.
READ: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (closing_over_under_a_transform, pcr_fx.UnsupportedError, "pass them in shared"),
    (chain(with_a_graph_within), pcr_fx.BodyError, "as torch.cond makes"),
    (chain(branching), pcr_fx.BodyError, "step cannot be traced: "),
    (
        chain(lambda z, *_: torch.tanh(z), start=X, options={"solver": "newton", "kernels": False}),
        pcr_fx.UnsupportedError,
        "with the shapes [(5, 3)], in the form of x0, got [(3,)]",
    ),
    (
        scan(lambda c, x: (c if x.sum() > 0 else -c, x), xs=XS[:0]),
        pcr_fx.UnsupportedError,
        "cannot be traced, and without a step it is not known what ys it returns",
    ),
    (
        lambda: pcr_fx.transform(packed(), torch.ones(2, 4)),
        pcr_fx.UnsupportedError,
        "those of this one are packed",
    ),
    (
        lambda: torch.compile(packed(), backend="eager", fullgraph=True)(torch.ones(2, 4)),
        Exception,  # Dynamo says it in words of its own
        "with packed parameters cannot be read by another compiler",
    ),
]


def raised(case: tuple[Callable[[], Any], type[Exception], str]) -> str:
    call, kind, words = case
    with pytest.raises(kind) as caught:
        call()
    said = str(caught.value)
    assert words in said
    return said


def sites() -> Iterator[tuple[str, str]]:
    """Where an error is raised, and a pattern of what it says."""
    for file in FILES:
        for node in ast.walk(ast.parse((ROOT / f"{file}.py").read_text())):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call) or not node.exc.args:
                continue
            if ast.unparse(node.exc.func) in INTERNAL:
                continue
            text = node.exc.args[0]
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            pattern = "".join(re.escape(str(one.value)) if isinstance(one, ast.Constant) else ".*" for one in parts)
            assert len(pattern) > 20, "an error says what was wrong"
            yield f"{file}.py:{node.lineno}", pattern


def test_each_error_says_what_was_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    said = list(map(raised, READ))
    monkeypatch.setattr("pcr_fx.introspect.last_report", lambda: None)
    said.append(raised((pcr_fx.report, pcr_fx.PcrFxError, "nothing was compiled")))
    monkeypatch.setenv("PCR_FX_DISABLE", "1")
    said += map(raised, CASES)
    places = dict(sites())
    assert len(places) > 50
    missing = [
        place for place, pattern in places.items() if not any(re.search(pattern, one, re.DOTALL) for one in said)
    ]
    assert not missing, "these errors are raised by no case above"


def test_all_errors_are_of_one_family() -> None:
    errors = [one for one in vars(pcr_fx.errors).values() if isinstance(one, type) and issubclass(one, Exception)]
    assert len(errors) > 7 and all(issubclass(one, pcr_fx.PcrFxError) for one in errors)
