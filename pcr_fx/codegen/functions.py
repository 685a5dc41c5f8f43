"""The scalar functions of the language of kernels: what each computes, and how every target spells it.

A new function is a row here, and a rule in `pcr_fx.codegen.aten` that lowers to it. Truth values are 0 and 1, and
anything but 0 is true. NaN and infinities go where they go in PyTorch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScalarFunction:
    """A function of real numbers. Its spellings are templates, with `{0}`, `{1}`, ... for the arguments.

    Attributes:
        name: as `Apply` has it.
        arity: how many arguments it takes.
        twin: the same in PyTorch; where it gives truth values, these stand for 0 and 1.
        cpp: in C++, where each argument is a number, or a vector of them.
        triton: in Triton, where each argument is a name, or a number of the kernel's dtype, as `{zero}` and `{one}` are.
        infix: whether the spellings are an operator between the arguments: inside of others it takes parentheses.
        fold: the same of Python's floats, for what is computed before printing where all arguments are constants.
        libdevice: what CUDA's library calls it, where Triton has it from there. Kernels then call it by its own name,
            from `pcr_fx.targets.triton.functions`.
    """

    name: str
    arity: int
    twin: Callable[..., Tensor]
    cpp: str
    triton: str
    infix: bool = False
    fold: Callable[..., float] | None = None
    libdevice: str | None = None

    def evaluate(self, *arguments: Tensor) -> Tensor:
        """The function of tensors of one dtype, each number for itself; they broadcast."""
        return self.twin(*arguments).to(arguments[0].dtype)


@dataclass(frozen=True)
class Reduction:
    """How numbers are combined along axes, by a function of two.

    Attributes:
        function: what combines two.
        start: of no numbers.
        triton: of a tensor `{0}` along its axis `{1}`.
        twin: of a tensor along some axes, in PyTorch.
    """

    function: ScalarFunction
    start: float
    triton: str
    twin: Callable[[Tensor, tuple[int, ...]], Tensor]


def _row(
    name: str, arity: int, twin: Callable[..., Tensor], triton: str, cpp: str | None = None, **others: object
) -> ScalarFunction:
    """A function that targets/cpp/native/numbers.h defines, unless it has another spelling in C++."""
    return ScalarFunction(name, arity, twin, cpp or _call(f"k_{name}", arity), triton, **others)  # type: ignore[arg-type]


def _call(name: str, arity: int) -> str:
    return f"{name}({', '.join(f'{{{position}}}' for position in range(arity))})"


def _operator(
    name: str, sign: str, twin: Callable[..., Tensor], fold: Callable[..., float] | None = None
) -> ScalarFunction:
    spelling = f"{{0}} {sign} {{1}}"
    return ScalarFunction(name, 2, twin, spelling, spelling, infix=True, fold=fold)


def _library(name: str, arity: int, twin: Callable[..., Tensor], libdevice: str | None = None) -> ScalarFunction:
    return _row(name, arity, twin, _call(name, arity), libdevice=libdevice or name)


def _truth(name: str, arity: int, twin: Callable[..., Tensor], condition: str) -> ScalarFunction:
    return _row(name, arity, twin, f"tl.where({condition}, {{one}}, {{zero}})")


FUNCTIONS = {
    function.name: function
    for function in (
        _operator("add", "+", torch.add, operator.add),
        _operator("sub", "-", torch.sub, operator.sub),
        _operator("mul", "*", torch.mul, operator.mul),
        _operator("div", "/", torch.div),
        _row("copy", 1, torch.clone, "{0}"),
        # Triton before 3.8 takes `-x` for `0 - x`, which has the wrong sign at zero.
        _row("neg", 1, torch.neg, "{0} * -1.0", fold=operator.neg),
        _row("abs", 1, torch.abs, "tl.abs({0})"),
        _row("square", 1, torch.square, "{0} * {0}"),
        _row("cube", 1, lambda x: x * x * x, "{0} * {0} * {0}"),
        _row("reciprocal", 1, torch.reciprocal, "1 / {0}"),
        _library("sqrt", 1, torch.sqrt),
        _library("rsqrt", 1, torch.rsqrt),
        _library("pow", 2, torch.pow),
        # Of a whole number, or in which direction.
        _row("floor", 1, torch.floor, "tl.floor({0})"),
        _row("ceil", 1, torch.ceil, "tl.ceil({0})"),
        _library("round", 1, torch.round, libdevice="rint"),
        _library("trunc", 1, torch.trunc),
        _library("fmod", 2, torch.fmod),
        # Exponentials and logarithms.
        _row("exp", 1, torch.exp, "tl.exp({0})"),
        _library("exp2", 1, torch.exp2),
        _library("expm1", 1, torch.expm1),
        _row("log", 1, torch.log, "tl.log({0})"),
        _row("log2", 1, torch.log2, "tl.log2({0})"),
        _library("log10", 1, torch.log10),
        _library("log1p", 1, torch.log1p),
        # Circular and hyperbolic functions.
        _row("sin", 1, torch.sin, "tl.sin({0})"),
        _row("cos", 1, torch.cos, "tl.cos({0})"),
        _library("tan", 1, torch.tan),
        _library("asin", 1, torch.asin),
        _library("acos", 1, torch.acos),
        _library("atan", 1, torch.atan),
        _library("atan2", 2, torch.atan2),
        _library("sinh", 1, torch.sinh),
        _library("cosh", 1, torch.cosh),
        _library("tanh", 1, torch.tanh),
        _library("asinh", 1, torch.asinh),
        _library("acosh", 1, torch.acosh),
        _library("atanh", 1, torch.atanh),
        # Others that are smooth.
        _row("sigmoid", 1, torch.sigmoid, "1 / (1 + tl.exp(-{0}))"),
        _row("erf", 1, torch.erf, "tl.erf({0})"),
        _library("erfc", 1, torch.erfc),
        _library("erfinv", 1, torch.erfinv),
        # Choices. Comparisons with NaN are false, so that relu keeps it; so do maximum and minimum of either argument.
        _row("relu", 1, torch.relu, "tl.where({0} < 0, {zero}, {0})"),
        _row("sign", 1, torch.sign, "tl.where({0} > 0, {one}, tl.where({0} < 0, -{one}, {zero}))"),
        _row("maximum", 2, torch.maximum, "tl.maximum({0}, {1}, tl.PropagateNan.ALL)"),
        _row("minimum", 2, torch.minimum, "tl.minimum({0}, {1}, tl.PropagateNan.ALL)"),
        _row("where", 3, lambda truth, yes, no: torch.where(truth != 0, yes, no), "tl.where({0} != 0, {1}, {2})"),
        # Truth values.
        _truth("eq", 2, torch.eq, "{0} == {1}"),
        _truth("ne", 2, torch.ne, "{0} != {1}"),
        _truth("lt", 2, torch.lt, "{0} < {1}"),
        _truth("le", 2, torch.le, "{0} <= {1}"),
        _truth("gt", 2, torch.gt, "{0} > {1}"),
        _truth("ge", 2, torch.ge, "{0} >= {1}"),
        _truth("logical_and", 2, torch.logical_and, "({0} != 0) & ({1} != 0)"),
        _truth("logical_or", 2, torch.logical_or, "({0} != 0) | ({1} != 0)"),
        _truth("logical_not", 1, torch.logical_not, "{0} == 0"),
    )
}

# By the name of the function that combines. `largest` is of `pcr_fx.targets.triton.functions`: `tl.max` loses NaN.
REDUCTIONS = {
    "add": Reduction(FUNCTIONS["add"], 0, "tl.sum({0}, {1})", torch.sum),
    "maximum": Reduction(FUNCTIONS["maximum"], -math.inf, "largest({0}, {1})", torch.amax),
    "minimum": Reduction(FUNCTIONS["minimum"], math.inf, "-largest(-({0}), {1})", torch.amin),
}
