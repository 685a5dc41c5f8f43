"""Triton source to kernels. No file is needed: Triton asks Python for a function's source, and Python keeps it in memory."""

from __future__ import annotations

import functools
import hashlib
import linecache
import weakref
from types import ModuleType

from pcr_fx.registry import KEPT


@functools.lru_cache(maxsize=KEPT)
def load_module(source: str) -> ModuleType:
    """The module of `source`. What Triton compiles of it, Triton keeps in a cache of its own."""
    name = f"pcr_fx_chain_{hashlib.sha256(source.encode()).hexdigest()[:32]}"
    file = f"<{name}>"
    # Without a time of change, nothing looks for the file.
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = ModuleType(name)
    module.__file__ = file
    weakref.finalize(module, linecache.cache.pop, file, None)
    exec(compile(source, file, "exec"), module.__dict__)
    return module
