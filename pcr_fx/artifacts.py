"""What is kept on disk, as `torch.compiler.save_cache_artifacts` gathers it for other machines and processes."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

from torch.compiler._cache import CacheArtifact, CacheArtifactFactory, CacheArtifactManager

from pcr_fx import disk

log = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{32}\.so|plans/[0-9a-f]{32}\.json")
_DIGEST_BYTES = 32


@CacheArtifactFactory.register
class KeptFile(CacheArtifact):
    """A file of the cache folder.

    Args:
        key: its place there.
        content: its bytes behind their SHA-256; or its path, for it to be read once it is asked for.
    """

    def __init__(self, key: str, content: bytes | Path) -> None:
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "_given", content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeptFile) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def content(self) -> bytes:  # type: ignore[override]
        """Nothing if the file is gone by now, or damaged."""
        given: bytes | Path = self._given  # type: ignore[attr-defined]
        if isinstance(given, bytes):
            return given
        try:
            if given.suffix == ".so":
                disk.verify(given)
            found = disk.read(given, disk.LARGEST_FILE)
        except OSError:
            return b""
        return hashlib.sha256(found).digest() + found

    def populate_cache(self) -> None:
        """Keep the file here. What kernels are for is in their names, and what plans hold is checked whenever they are read."""
        digest, found = self.content[:_DIGEST_BYTES], self.content[_DIGEST_BYTES:]
        if not _NAME.fullmatch(self.key) or hashlib.sha256(found).digest() != digest:
            log.warning("a cache artifact is none of this package's, or damaged, and is not kept: %r", self.key)
            return
        folder = None
        try:
            folder = disk.cache_directory()
            path = folder / self.key
            path.parent.mkdir(mode=0o700, exist_ok=True)
            (disk.keep if path.suffix == ".so" else disk.write)(path, found)
        except OSError as error:
            disk.give_up(folder, error)

    @staticmethod
    def encode(content: Any) -> Any:
        return content

    @staticmethod
    def type() -> str:
        return "pcr_fx"


def record(folder: Path, key: str) -> None:
    """Have the file `key` of a cache folder, which was made or used, be among the artifacts."""
    CacheArtifactManager.record_artifact(KeptFile.type(), key, folder / key)
