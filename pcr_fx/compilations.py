"""What Dynamo made of a compiled function: its graphs, where it broke them, what it runs outside of any, and why.

A backend is only called with graphs. Of what has none, and of why, Dynamo says something to those who ask it to be called when it
compiles, and keeps a list of graph breaks and one of what it compiled last.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from traceback import FrameSummary
from types import CodeType, FrameType
from typing import Any

import torch
from torch._dynamo import graph_break_hints
from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler
from torch._dynamo.eval_frame import innermost_backend
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
from torch._dynamo.utils import get_compilation_metrics, graph_break_reasons
from torch._guards import CompileContext

from pcr_fx.reports import RewriteReport, merge_reports

log = logging.getLogger(__name__)

_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_OPTIMISERS = os.path.join(_TORCH, "optim") + os.sep
_LIMIT = re.compile(r"exceeding the (\w+) cache size limit \(currently set to (\d+)\)")
# The parts of what Dynamo says of a graph break.
_EXPLANATION = re.compile(r"Explanation: (.*?)(?=\n  Hint:|\n\n|\Z)", re.DOTALL)
_HINT = re.compile(r"Hint: (.*?)(?=\n  Hint:|\n\n|\Z)", re.DOTALL)
_CONTEXT = re.compile(r"Developer debug context: (.*)")
# Hints that are given with many graph breaks, and say nothing of this one.
_GENERAL = {
    " ".join(hint.split()) for hints in vars(graph_break_hints).values() if isinstance(hints, list) for hint in hints
}
_MOST_CHARACTERS = 300


@dataclass(frozen=True)
class _Place:
    """What Dynamo is compiling: which function or rest of one, for which call of what `torch.compile` was given; and by whom."""

    code: CodeType | None
    whole: Any
    call: Any
    backend: Any

    @classmethod
    def of_now(cls) -> _Place:
        frame: FrameType | None = sys._getframe()
        code, whole, call, backend = None, None, None, None
        while frame is not None:
            name, file = frame.f_code.co_name, frame.f_code.co_filename
            if file.endswith("convert_frame.py"):
                if code is None and isinstance(frame.f_locals.get("code"), CodeType):
                    code = frame.f_locals["code"]
                if backend is None and name == "_compile":
                    backend = _unwrapped(frame.f_locals.get("compiler_fn"))
            if name == "compile_wrapper" and file.endswith("eval_frame.py"):
                # The outermost. A list that each call makes for itself tells calls apart.
                whole, call = frame.f_locals.get("fn", whole), frame.f_locals.get("cleanups")
            frame = frame.f_back
        return cls(code, whole, call, backend)


def _unwrapped(backend: Any) -> Any:
    """The function that a user named, of what Dynamo and `torch.compile` made of it."""
    if backend is None:
        return None
    backend = innermost_backend(backend)
    backend = getattr(backend, "compiler_fn", backend)
    while isinstance(backend, functools.partial):
        backend = backend.func
    return backend


@dataclass(eq=False)
class Compiled:
    """A function as Dynamo compiled it: the model's, one that it calls, or the rest of one behind a graph break.

    Attributes:
        code: the function.
        call: tells apart the calls of the whole in which functions were compiled.
        number: Dynamo's, of the function and of how often it was compiled.
        began: when, in microseconds.
        reports: of its graphs.
        outside: what runs outside of them, and why, in words.
    """

    code: CodeType | None
    call: Any
    number: str
    began: int
    reports: list[RewriteReport] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    @property
    def is_of_model(self) -> bool:
        """Whether it is no optimiser's and none of this package, which have graphs of their own in a training step."""
        return self.code is None or not self.code.co_filename.startswith((_OPTIMISERS, _PACKAGE))

    @property
    def name(self) -> str:
        """As its author knows it."""
        if self.code is None or self.code.co_filename.startswith(_TORCH):
            return "the model"
        return f"{self.code.co_name} ({_file(self.code.co_filename)}:{self.code.co_firstlineno})"


class Compilations:
    """What was compiled for one backend of what `torch.compile` was called with last.

    Attributes:
        whole: a reference to that.
        functions: by code. A function that is compiled anew in a later call takes the place of what it was compiled to before;
            in one call a function may be compiled for several modules.
        lengths: of chains, by what their blocks compute.
    """

    def __init__(self) -> None:
        self.whole: Callable[[], Any] = lambda: None
        self.functions: dict[CodeType | None, list[Compiled]] = {}
        self.lengths: dict[Any, set[int]] = {}
        self._compiling: Compiled | None = None
        self._known_breaks = 0
        self._handled: BaseException | None = None

    @property
    def reports(self) -> list[RewriteReport]:
        """Those of all graphs, of the model's alone where there are others."""
        return [report for function in self._functions() for report in function.reports]

    def add(self, report: RewriteReport) -> None:
        """Take in the report of a graph that is being compiled."""
        place, found = _Place.of_now(), self._compiling
        if found is None or found.code is not place.code or found.number != _number():
            found = self._begin(place)
        found.reports.append(report)

    def merged(self) -> RewriteReport | None:
        """One report of all that; `None` where nothing was compiled."""
        if not self.functions:
            return None
        reports = self.reports
        whole = merge_reports(reports) if reports else RewriteReport()
        counts = Counter(words for function in self._functions() for words in function.outside)
        outside = [words + (f" ({count} times)" if count > 1 else "") for words, count in counts.items()]
        outside = [*dict.fromkeys(self._beyond_limits()), *outside]
        if not reports and not outside:
            outside = ["Dynamo found nothing to compile in it"]
        return replace(whole, outside=outside)

    def _functions(self) -> list[Compiled]:
        every = [function for functions in self.functions.values() for function in functions]
        return [function for function in every if function.is_of_model] or every

    def _begin(self, place: _Place) -> Compiled:
        if self.whole() is not place.whole or place.whole is None:
            self.functions.clear()
            self.lengths.clear()
        self.whole = (lambda: None) if place.whole is None else weakref.ref(place.whole)
        made = self._compiling = Compiled(place.code, place.call, _number(), time.time_ns() // 1000)
        same_call = (one for one in self.functions.get(place.code, ()) if one.call is place.call is not None)
        self.functions[place.code] = [*same_call, made]
        self._known_breaks, self._handled = len(graph_break_reasons), sys.exc_info()[1]
        _at_work.append(self)
        return made

    def _end(self) -> None:
        made, self._compiling = self._compiling, None
        error, self._handled = sys.exc_info()[1], self._handled
        if made is None:
            return
        for found in graph_break_reasons[self._known_breaks :]:
            made.outside.append(f"{_where(found.user_stack) or made.name}: {_in_words(found.reason)}")
        is_new = isinstance(error, TorchDynamoException) and error is not self._handled
        if is_new and isinstance(error, BackendCompilerFailed):
            made.reports.clear()  # of graphs that nobody will run
        if is_new and not made.reports:
            where = _where(getattr(error, "real_stack", ()) or ()) or made.name
            made.outside.append(f"{where}: {_in_words(str(getattr(error, 'msg', error)))}")
            if not self.reports:
                log.warning("Dynamo has no graph of %s, which runs as it was: %s", made.name, made.outside[-1])
        self._handled = None

    def _beyond_limits(self) -> Iterator[str]:
        """The functions that Dynamo compiles no more, in words."""
        known = {function.number.rpartition("/")[0]: function for function in self._functions()}
        for tried in get_compilation_metrics():
            limit = _LIMIT.search(tried.fail_reason or "")
            function = known.get(str(tried.compile_id).rpartition("/")[0])
            if limit is None or function is None or (tried.start_time_us or 0) < function.began:
                continue
            reason = " ".join((tried.recompile_reason or "").split())
            since = f"; the first did not fit since {reason}" if reason else ""
            yield (
                f"{function.name} was compiled as often as torch._dynamo.config.{limit[1]} = {limit[2]} allows: calls that fit "
                f"none of that run the model as it was, in eager{since}. Raise it, or call the model with fewer kinds of "
                "arguments, as with sequences padded to a few lengths"
            )


def _number() -> str:
    """Dynamo's, of what it is compiling."""
    return str(CompileContext.current_compile_id())


# Who is told, with the backend that it is told of; and those that something is being compiled for.
_kept: list[tuple[Any, Compilations]] = []
_at_work: list[Compilations] = []


def keep(backend: Any, compilations: Compilations) -> None:
    """Have it told what is compiled for a backend from now on."""
    _kept.append((backend, compilations))
    _listen()


@contextlib.contextmanager
def kept(backend: Any) -> Iterator[Compilations]:
    """What is compiled for a backend meanwhile."""
    compilations = Compilations()
    keep(backend, compilations)
    try:
        yield compilations
    finally:
        _kept.remove((backend, compilations))


class _Lasting(list[Any]):
    """Dynamo's callbacks, of which `torch._dynamo.reset` leaves these here."""

    def clear(self) -> None:
        self[:] = [callback for callback in self if callback in (_began, _ended)]


def _listen() -> None:
    """Ask Dynamo to be called when it compiles."""
    if _began not in callback_handler.start_callbacks:
        callback_handler.start_callbacks = _Lasting([*callback_handler.start_callbacks, _began])
        callback_handler.end_callbacks = _Lasting([*callback_handler.end_callbacks, _ended])


def _began(args: CallbackArgs) -> None:
    del _at_work[:]
    if args.callback_trigger is CallbackTrigger.DYNAMO:
        place = _Place.of_now()
        for backend, compilations in _kept:
            if backend is place.backend:
                compilations._begin(place)


def _ended(_: CallbackArgs) -> None:
    while _at_work:
        _at_work.pop()._end()


def _where(stack: Sequence[FrameSummary]) -> str:
    """The line that Dynamo stopped at, in that of the function that it was compiling; nothing where all are PyTorch's own."""
    frames = [frame for frame in stack if not frame.filename.startswith(_TORCH)]
    lines = [f"{_file(frame.filename)}:{frame.lineno}" for frame in frames]
    return " in ".join(dict.fromkeys((lines[-1], lines[0]))) if lines else ""


def _file(path: str) -> str:
    """A file as its author knows it: with its package where it is somebody else's."""
    folder, name = os.path.split(path)
    is_library = "site-packages" in path or os.path.exists(os.path.join(folder, "__init__.py"))
    return f"{os.path.basename(folder)}/{name}" if is_library else name


def _in_words(message: str) -> str:
    """What Dynamo says of a graph break, in a line."""
    message, *then = message.split("*** While handling this graph break", 1)
    lines = [*message.strip().splitlines(), ""]
    kind = lines[0] or "for no reason that it gives"
    if kind.endswith("raised:"):  # a backend, what follows
        kind += f" {_cut(lines[1])}"
    found = _EXPLANATION.search(message)
    context = _CONTEXT.search(message)
    hints = [" ".join(hint.split()) for hint in _HINT.findall(message)]
    words = kind + (f" ({_cut(context[1])})" if context is not None and context[1].strip() else "")
    if found is not None:
        words += f": {_cut(found[1])}"
    hint = next((hint for hint in hints if hint not in _GENERAL), None)
    words += f" {_cut(hint)}" if hint else ""
    return words + (
        "; it is in a loop, so that the whole function runs in Python" if "in loop" in "".join(then) else ""
    )


def _cut(text: str) -> str:
    """A text in one line, of not too many characters."""
    line = " ".join(text.split())
    return line if len(line) <= _MOST_CHARACTERS else line[: _MOST_CHARACTERS - 3] + "..."
