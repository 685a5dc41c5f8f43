"""Models with hooks: whether a graph of one does what the model does, found out by running that as it was written.

A graph runs hooks at their places. What they do to the model while it runs, to a number that it reads behind them say, it does not
see. So the first call is left to the model, and watched. If hooks turn out to do such things, all later calls are, too.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pcr_fx.body.isolation import tracing
from pcr_fx.graphs.hooks import difference, has_hooks, numbers_of_hooks
from pcr_fx.passes.facts import Facts

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Rehearsal:
    """That of one graph.

    Attributes:
        facts: what the graph takes for granted of the model.
        hooked: the modules with hooks.
        notes: gets what there is to say of the outcome.
        is_over: whether it is known what hooks do.
        reason: why the model is to run as it was written; empty if its graph is right, as far as is known.
    """

    facts: Facts
    hooked: list[nn.Module]
    notes: list[str]
    is_over: bool = False
    reason: str = ""
    _at_fault: list[Any] | None = None

    @property
    def binds(self) -> bool:
        """Whether no other graph is worth a try: these hooks, which it has still, would not leave that alone either."""
        return self._at_fault is not None and self._at_fault == list(map(numbers_of_hooks, self.hooked))

    @property
    def takes_over(self) -> bool:
        """Whether a call is left to the model: to find out, or because it has to be.

        Not to find out in a checkpoint, which compares what is saved with that of a later call.
        """
        disturbs = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        return bool(self.reason) or not (self.is_over or disturbs)

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns, run as it was written."""
        if self.is_over:
            return forward(*args, **kwargs)
        watcher = _Watcher(self.facts)
        with watcher.watching():
            result = forward(*args, **kwargs)
        watcher.look()
        self.is_over = True
        if watcher.found:
            self.blame(f"hooks change {watcher.found}")
        return result

    def changed(self) -> str:
        return self.facts.changed()

    def leave_alone(self, reason: str) -> None:
        """Have the model run as it was written from now on, without a word."""
        self._at_fault = list(map(numbers_of_hooks, self.hooked))
        self.reason, self.is_over = reason, True

    def blame(self, reason: str) -> None:
        """Have the model run as it was written from now on, because of what hooks do."""
        self.leave_alone(reason)
        self.notes.append(f"{reason}: the model runs as it was written")
        log.warning("%s: the model runs as it was written", reason)


@dataclass(eq=False)
class _Running:
    """A module with hooks that is called: what it was given, and what its own forward returned."""

    module: nn.Module
    given: Any
    results: list[Any] = field(default_factory=list)
    is_on_its_way: bool = False


@dataclass(eq=False)
class _Watcher:
    """Watches one thread run a model.

    Attributes:
        found: what hooks changed first, in words.
        running: the modules with hooks that run now, the innermost last.
    """

    facts: Facts
    found: str = ""
    running: list[_Running] = field(default_factory=list)

    def look(self) -> None:
        self.found = self.found or self.facts.changed()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While modules of this thread are called, by patches of a class as FX has them, which one thread at a time may make."""
        call, here = nn.Module.__call__, threading.get_ident()

        def watched_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != here or not has_hooks(module):
                return call(module, *args, **kwargs)
            running = _Running(module, (args, kwargs))
            self.running.append(running)
            try:
                result = call(module, *args, **kwargs)
            finally:
                self.running.pop()
            self.look()
            self.found = self.found or (difference(running.results[0], result) if running.results else "")
            return result

        def get(module: nn.Module, name: str) -> Any:
            found = object.__getattribute__(module, name)
            if name != "forward" or threading.get_ident() != here or not self.running:
                return found
            running = self.running[-1]
            if running.module is not module or running.is_on_its_way:
                return found
            running.is_on_its_way = True  # it is `Module.__call__` that asks first
            return self._between_hooks(running, found)

        with tracing():
            nn.Module.__call__, nn.Module.__getattribute__ = watched_call, get  # type: ignore[method-assign,assignment]
            try:
                yield
            finally:
                nn.Module.__call__ = call  # type: ignore[method-assign]
                del nn.Module.__getattribute__  # type: ignore[misc]

    def _between_hooks(self, running: _Running, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward around which it is looked at what hooks did."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.look()
            self.found = self.found or difference(running.given, (args, kwargs))
            result = forward(*args, **kwargs)
            running.results.append(result)
            return result

        return run
