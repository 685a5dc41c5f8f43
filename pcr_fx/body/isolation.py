"""Tracing apart from the caller: what is traced is kept, so it must not depend on where it was first asked for."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import torch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from pcr_fx.locks import fork_safe_lock

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class _Here(threading.local):
    """Of this thread.

    Attributes:
        is_tracing: whether it is the one that may trace, or works for that one.
        abandoned: set once nobody waits for what it does.
    """

    is_tracing = False
    abandoned: threading.Event | None = None


_here = _Here()
_lock = fork_safe_lock()

# PyTorch 2.11 as built for CUDA crashes, where there is no GPU, if threads alone make fake tensors.
with FakeTensorMode():
    pass


def apart(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """`function`, run in a thread of its own.

    A new thread starts without the caller's `torch.func` transforms, saved-tensor hooks, inference mode, autocast and
    `torch.jit.trace`, under which tracing fails or crashes. And it is not interrupted, by Ctrl-C or otherwise: the caller,
    who may be, waits until it has ended or got to a place where it may stop, and is interrupted then.
    """

    @functools.wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        result: Future[Result] = Future()
        abandoned = _here.abandoned or threading.Event()

        def fulfil() -> None:
            if not result.set_running_or_notify_cancel():
                return  # the caller was interrupted before this began
            _here.abandoned = abandoned
            try:
                result.set_result(function(*args, **kwargs))
            except BaseException as error:
                result.set_exception(error)

        # PyTorch's settings are of a context.
        run_here = contextvars.copy_context().run
        thread = threading.Thread(target=run_here, args=(fulfil,), name=f"pcr_fx {function.__name__}")
        try:
            thread.start()
            thread.join()
            return result.result()
        finally:
            _see_off(result, abandoned)

    return run


def _see_off(result: Future[Any], abandoned: threading.Event) -> None:
    """Let a thread not begin, or wait for its end, however often the waiting is interrupted."""
    if result.done() or result.cancel():
        return
    abandoned.set()
    try:
        wait([result])
    finally:
        _see_off(result, abandoned)


def stop_if_abandoned() -> None:
    """Where a thread of `apart` may stop half-way: it does if its caller was interrupted."""
    if _here.abandoned is not None and _here.abandoned.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """One thread at a time: FX patches classes while it traces, and two of its tracers at once break both.

    Nor is it interrupted. No lock may be taken in here that is held where this is asked for: each would wait for the other.
    """
    if _here.is_tracing:
        yield
        return
    with _lock, _uninterrupted():
        _here.is_tracing = True
        try:
            yield
        finally:
            _here.is_tracing = False


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the end; who cannot wait interrupts a second time.

    Where it takes effect while FX takes its patches back, no module can be called any more, and where PyTorch's C++ has
    called Python for what a fake tensor does, the process ends.
    """
    before, waiting = signal.getsignal(signal.SIGINT), list[int]()
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def wait_first(number: int, frame: FrameType | None) -> None:
        waiting.append(number)
        if len(waiting) > 1:
            before(number, frame)

    signal.signal(signal.SIGINT, wait_first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if len(waiting) == 1:
            signal.raise_signal(signal.SIGINT)


def isolated(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """`function` for tracing: apart, and while nobody else traces."""

    @functools.wraps(function)
    def alone(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with tracing():
            return function(*args, **kwargs)

    @functools.wraps(function)
    def nested(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        _here.is_tracing = True
        return function(*args, **kwargs)

    ways = {False: apart(alone), True: apart(nested)}

    @functools.wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        # A chain within a block of a chain: this thread may trace, and lets another do so for it.
        return ways[_here.is_tracing](*args, **kwargs)

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


def is_traced_or_transformed() -> bool:
    """Whether a compiler, a function transform or a mode sees each op in the place of its results."""
    return bool(
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
    )


def is_plain_call() -> bool:
    """Whether nothing looks on that wants to see operators: no compiler, function transform, mode or autocast."""
    return not (
        is_traced_or_transformed()
        or torch.is_autocast_enabled("cpu")
        or forward_ad._current_level >= 0
        or (torch._C._is_torch_function_mode_enabled() and _is_watched_by_a_function_mode())
    )


def is_transformed() -> bool:
    """Whether tangents or batches are pushed through ops; to ask for a gradient only needs their backward."""
    return forward_ad._current_level >= 0 or any(
        one.key() in (TransformType.Vmap, TransformType.Jvp) for one in get_interpreter_stack() or ()
    )


def allows_hooks() -> bool:
    """Whether saved tensors may have hooks, as those of checkpoints do: function transforms of PyTorch's allow none."""
    return not get_interpreter_stack()


def wants_every_op() -> bool:
    """Whether something looks on that has to see each op of the model: counts them, or writes them down for another process.

    A compiler takes operators as they are.
    """
    return torch.compiler.is_exporting() or is_watched_by_a_mode()


def is_watched_by_a_mode() -> bool:
    """Whether a mode is on that is told of ops or functions, and neither belongs to a compiler nor is run by one."""
    modes = _get_current_dispatch_mode_stack()
    if any(isinstance(mode, ProxyTorchDispatchMode | FunctionalTensorMode) for mode in modes):
        return False
    return any(not isinstance(mode, FakeTensorMode) for mode in modes) or _is_watched_by_a_function_mode()


def _is_watched_by_a_function_mode() -> bool:
    """As `is_watched_by_a_mode`, of functions; the mode of a default device only asks for new tensors."""
    modes = _get_current_function_mode_stack() if torch._C._is_torch_function_mode_enabled() else []
    return any(not isinstance(mode, DeviceContext) for mode in modes)
