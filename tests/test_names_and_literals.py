"""Names, numbers and texts of a model never run as code, nor reach a compiler as they are."""

import enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pcr_fx
from pcr_fx.errors import CaptureError
from pcr_fx.targets.cpp import build

pytestmark = pytest.mark.usefixtures("kernel_cache")

# Each would make a file called `executed` if it ran as Python, C++ or a command.
PYTHON = "__import__('pathlib').Path('executed').touch()"
NAMES = [
    "a b",
    'a"b',
    "a'b",
    "a\\",
    "a\nb",
    "Größe",
    "class",
    "-1",
    "$(touch executed)",
    "`touch executed`",
    "; touch executed",
    "*/ system('touch executed'); /*",
    'x"); open("executed", "w"); ("',
    'x", open("executed", "w"))  #',
]


class Said:
    """Of a number or text that prints itself as code."""

    def __repr__(self) -> str:
        return PYTHON

    __str__ = __format__ = __repr__  # type: ignore[assignment]


class Real(Said, float): ...


class Whole(Said, int): ...


class Text(Said, str): ...


class Unprintable(float):
    def __repr__(self) -> str:
        raise ZeroDivisionError("it has no repr")


class Words(float):
    def __repr__(self) -> str:
        return "one half"


class Level(enum.IntEnum):
    TWO = 2


NUMBERS = [Real(0.5), Whole(2), Unprintable(0.25), Words(0.5), Level.TWO, np.float64(0.5), np.float32(0.5), np.int64(2)]
# One for each, so that no part of a block repeats.
FUNCTIONS = [torch.tanh, torch.sin, torch.cos, torch.sigmoid, torch.erf, torch.relu, torch.atan, torch.abs]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            self.register_parameter(name, nn.Parameter(torch.randn(3)))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.tanh(x * sum(getattr(self, name) for name in NAMES[1:]) + getattr(self, NAMES[0]))


class Named(nn.Module):
    """Blocks, and around them modules and buffers, of such names; its result has them, too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(8))
        for name in NAMES:
            self.register_module(name, nn.Linear(3, 3))
            self.register_buffer(f"{name} buffer", torch.randn(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for name in NAMES:
            x = torch.tanh(getattr(self, name)(x)) + getattr(self, f"{name} buffer")
        for block in self.blocks:
            x = block(x)
        return {name: x * number for number, name in enumerate(NAMES)}


class Numbered(nn.Module):
    def __init__(self, numbers: list[Any], text: str) -> None:
        super().__init__()
        self.numbers, self.text = numbers, text
        self.scales = nn.ParameterList(torch.ones(3) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.scales:
            for number, function in zip(self.numbers, FUNCTIONS, strict=False):
                x = function(torch.add(x, x * scale, alpha=number) * number - number)
            x = nn.functional.gelu(x, approximate=self.text)
        return x


def fast(way: str, model: nn.Module, x: Tensor) -> tuple[Any, Any]:
    """The model's result made one way, and the report."""
    if way == "transform":
        transformed = pcr_fx.transform(model, x, options={"solver": "sequential"})
        return transformed(x), transformed.report
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="deeppcr", options={"solver": "sequential", "inner_backend": "eager"})
    return compiled(x), pcr_fx.report()


@pytest.fixture(autouse=True)
def nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Also, no source that is compiled has anything of the model in it."""
    monkeypatch.chdir(tmp_path)
    sources, compile_source = list[str](), build._compile
    monkeypatch.setattr(
        build, "_compile", lambda source, folder: [sources.append(source), compile_source(source, folder)][1]
    )
    yield
    assert list(tmp_path.iterdir()) == []
    assert not [source for source in sources if "executed" in source or __file__ in source]


@pytest.mark.parametrize("way", ["transform", "compile"])
def test_names_are_only_names(way: str) -> None:
    torch.manual_seed(0)
    model, x = Named(), torch.randn(2, 3)
    with torch.no_grad():
        result, report = fast(way, model, x)
        torch.testing.assert_close(result, model(x))
    assert "native kernel)" in str(report)
    assert pcr_fx.transform(model).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("way", ["transform", "compile"])
def test_numbers_and_texts_are_only_what_they_are_worth(way: str) -> None:
    torch.manual_seed(0)
    # Dynamo makes tensors of NumPy's numbers, and reads a text as it prints itself; before PyTorch 2.12 it has no graph of numbers
    # of other classes.
    is_dynamo = way == "compile"
    others = (np.generic, Real, Whole, Unprintable, Words) if torch.__version__ < "2.12" else np.generic
    numbers = [number for number in NUMBERS if not (is_dynamo and isinstance(number, others))]
    model, x = Numbered(numbers, "tanh" if is_dynamo else Text("tanh")), torch.randn(2, 3)
    with torch.no_grad():
        result, report = fast(way, model, x)
        torch.testing.assert_close(result, model(x))
    assert "native kernel)" in str(report)


def test_what_is_no_number_is_refused_in_words() -> None:
    class Key:
        __hash__ = object.__hash__
        __repr__ = Said.__repr__

    class Mapped(nn.Module):
        def forward(self, x: Tensor) -> dict[Key, Tensor]:
            return {Key(): x}

    with pytest.raises(CaptureError, match="a dict with a key of type Key"):
        pcr_fx.transform(Mapped(), torch.randn(2))

    class Stepped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.add(x, x, alpha=Key())

    with pytest.raises(CaptureError, match="Stepped cannot be traced"):
        pcr_fx.transform(Stepped(), torch.randn(2))
