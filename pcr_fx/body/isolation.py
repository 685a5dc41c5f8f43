"""Tracing apart from the caller: what is traced is kept, so it must not depend on where it was first asked for."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_lock = threading.Lock()
_here = threading.local()

# PyTorch 2.11 as built for CUDA crashes, where there is no GPU, if threads alone make fake tensors.
with FakeTensorMode():
    pass


def apart(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """`function`, run in a thread of its own.

    A new thread starts without the caller's `torch.func` transforms, saved-tensor hooks, inference mode, autocast and
    `torch.jit.trace`, under which tracing fails or crashes.
    """

    @functools.wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        result: Future[Result] = Future()

        def fulfil() -> None:
            try:
                result.set_result(function(*args, **kwargs))
            except BaseException as error:
                result.set_exception(error)

        thread = threading.Thread(target=fulfil, name=f"pcr_fx {function.__name__}")
        thread.start()
        thread.join()
        return result.result()

    return run


def isolated(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """`function` for tracing: apart, and one such call at a time, since two of FX's tracers at once break both.

    It may take no lock that is held where an isolated function is called: each would wait for the other.
    """

    def marked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        _here.is_isolated = True
        return function(*args, **kwargs)

    inner = apart(functools.wraps(function)(marked))

    @functools.wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        # A chain within a block of a chain: the lock is held for it already.
        nested = getattr(_here, "is_isolated", False)
        with contextlib.nullcontext() if nested else _lock:
            return inner(*args, **kwargs)

    return run


def is_undisturbed() -> bool:
    """Whether the calling thread has nothing on that `apart` keeps away."""
    return not (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or torch.is_inference_mode_enabled()
        or torch._C._is_any_autocast_enabled()
        or torch.jit.is_tracing()
    )


def is_plain_call() -> bool:
    """Whether nothing looks on that wants to see operators: no compiler, function transform, mode or autocast."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch.is_autocast_enabled("cpu")
    )
