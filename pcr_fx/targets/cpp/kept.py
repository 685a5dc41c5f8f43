"""The kernels that are kept on disk, and what they were compiled from: to be looked at, and deleted."""

from __future__ import annotations

import contextlib
import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pcr_fx import disk
from pcr_fx.errors import UnsupportedError

_LARGEST_SOURCE = 2**24  # bytes
_NAME = re.compile(r"[0-9a-f]{32}\.so")
# What a source says of itself: see `source.py`.
_DIRECTION = re.compile(r"^#define (FORWARD|ADJOINT|NEWTON)$", re.MULTILINE)
_REAL = re.compile(r"^#define REAL (float|double)$", re.MULTILINE)
_DIMENSION = re.compile(r"^  static constexpr int dimension = (\d+);$", re.MULTILINE)
_DTYPES = {"float": "float32", "double": "float64"}


@dataclass(frozen=True)
class KeptKernel:
    """A compiled kernel.

    Attributes:
        key: names it.
        made: when it was compiled, in seconds since 1970.
        size: of the library, in bytes.
        what: what it computes, in words: its direction, dtype, and numbers of state a sample.
    """

    key: str
    made: float
    size: int
    what: str


def source_path(library: Path) -> Path:
    """Where the source of a library is kept, packed."""
    return library.with_suffix(".cpp.gz")


def keep_source(library: Path, source: str) -> None:
    """Keep what a library was compiled from, for whoever wants to see it; without a word where that cannot be."""
    with contextlib.suppress(OSError):
        disk.write(source_path(library), gzip.compress(source.encode(), mtime=0))


def kept_kernels() -> list[KeptKernel]:
    """All that are kept, the oldest first.

    Raises:
        OSError: there is no folder for them.
    """
    found = []
    for library in _libraries():
        with contextlib.suppress(OSError):  # another process has deleted it by now
            status = library.stat()
            found.append(KeptKernel(library.stem, status.st_mtime, status.st_size, _in_words(_source(library))))
    return sorted(found, key=lambda kernel: (kernel.made, kernel.key))


def kernel_source(key: str) -> str:
    """The C++ source of the kernel whose key begins like this.

    Raises:
        UnsupportedError: there is none, or several, or its source is not kept.
        OSError: there is no folder for them.
    """
    those = [library for library in _libraries() if library.stem.startswith(key)]
    if len(those) != 1:
        raise UnsupportedError(f"a key must begin like that of one kernel, got {key!r}, like which {len(those)} do")
    source = _source(those[0])
    if not source:
        raise UnsupportedError(f"the source of {those[0].stem} is not kept; a kernel that is compiled anew has one")
    return source


def clear_kernels() -> tuple[int, int]:
    """Delete all kernels that are kept: how many those were, and bytes. Processes that run now go on with theirs.

    Raises:
        OSError: there is no folder for them.
    """
    count = size = 0
    for library in _libraries():
        with contextlib.suppress(OSError):
            size += sum(path.stat().st_size for path in (library, source_path(library)) if path.exists())
        disk.delete(library)
        disk.delete(source_path(library))
        count += 1
    return count, size


def _libraries() -> Iterator[Path]:
    return (path for path in list(disk.cache_directory().glob("*.so")) if _NAME.fullmatch(path.name))


def _source(library: Path) -> str:
    """Nothing where it is not kept, or damaged."""
    try:
        return gzip.decompress(disk.read(source_path(library), _LARGEST_SOURCE)).decode()
    except (OSError, EOFError, ValueError):
        return ""


def _in_words(source: str) -> str:
    if not source:
        return "compiled before sources were kept"
    direction, real, dimension = (each.search(source) for each in (_DIRECTION, _REAL, _DIMENSION))
    if direction is None or real is None or dimension is None:
        return "what kernels have in common"
    return f"{direction[1].lower()}, {_DTYPES[real[1]]}, d = {dimension[1]}"
