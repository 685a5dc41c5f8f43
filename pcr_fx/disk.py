"""What is kept on disk: in which folder, and which of its files are believed.

Compiled code is loaded from that folder, so that whoever may write there may have this process do anything. It is used only
where nobody but the user and root may: neither the folder, nor what lies in it, nor a folder above by which it could be
exchanged. Files are written apart, synced and moved into place: who reads sees all of one or nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

# How the names of files and folders begin that are still being written, or that a killed process left behind. After so
# many seconds it is the latter: nothing here takes as long.
_UNFINISHED = "unfinished_"
_LONGEST_SECONDS = 3600.0
# In bytes.
_LARGEST_RECORD, LARGEST_FILE = 2**12, 2**28


class DamagedError(OSError):
    """A file does not hold what was kept in it."""


# --- where --------------------------------------------------------------------------------------------------------------


def cache_directory() -> Path:
    """The first of `directories`.

    Raises:
        OSError: there is none.
    """
    return next(directories())


def directories() -> Iterator[Path]:
    """The folders to keep things in, the best first: the one that is meant for it, and a private one that goes with the process.

    The one meant is `PCR_FX_CACHE_DIR`, or a folder in the user's cache. It is made if need be, and left out, which one
    line says, where it cannot be made or others could write to it.

    Raises:
        OSError: there is no further one.
    """
    folder, error = meant_folder()
    if error is not None:
        give_up(folder, error)
    elif folder is not None:
        yield folder
    yield _usable(_private(os.getpid()))


def meant_folder() -> tuple[Path | None, OSError | None]:
    """The folder that things are meant to be kept in, and why they are not."""
    meant = None
    try:
        meant = _meant()
        return _usable(meant), None
    except OSError as error:
        return meant, error


def reason_in(error: Exception) -> str:
    """What an error says, without number and path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def give_up(folder: Path | None, error: Exception) -> None:
    """Say why nothing is kept in a folder, once for each."""
    reason = reason_in(error)
    _say_once(
        folder, f"nothing is kept in {folder or 'a folder'}, and each process compiles and measures anew: {reason}"
    )


_said: set[Path | None] = set()


def _say_once(about: Path | None, message: str) -> None:
    if about not in _said:
        _said.add(about)
        log.warning(message)


def _meant() -> Path:
    try:
        given = os.environ.get("PCR_FX_CACHE_DIR")
        if given:
            return Path(given).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pcr_fx"
    except RuntimeError as error:
        raise OSError(f"{error} (PCR_FX_CACHE_DIR names a folder)") from error


@functools.cache
def _private(process: int) -> Path:
    """A folder of this process alone; a fork has another, since this one is deleted with its process."""
    folder = tempfile.mkdtemp(prefix="pcr_fx_")

    def delete() -> None:
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(delete)
    return Path(folder)


def _usable(folder: Path) -> Path:
    """`folder` by its real path, made if need be.

    Raises:
        OSError: it cannot be made, or others could write to it.
    """
    real = Path(os.path.realpath(folder))
    for missing in reversed([place for place in (real, *real.parents) if not place.exists()]):
        with contextlib.suppress(FileExistsError):  # another process was faster
            missing.mkdir(mode=0o700)
    if not real.is_dir():
        raise NotADirectoryError(f"{real} is not a folder")
    objection = _objection(real)
    if objection:
        raise PermissionError(objection)
    return real


# --- who ----------------------------------------------------------------------------------------------------------------


def _objection(folder: Path) -> str:
    """What lets somebody else change what lies in `folder`; nothing where only the user and root may.

    It is their own, and written by nobody else. Those above are so too, or are sticky, where nobody may move what is
    another's; and one that only a group may write to will do where that is the user's own group.
    """
    if not hasattr(os, "geteuid"):  # systems without owners and modes in this sense
        return ""
    if objection := _file_objection(folder, folder.stat()):
        return objection
    # Where only some users are mapped into a container, root is nobody there, and owns the root folder still.
    owners = {os.geteuid(), 0, Path("/").stat().st_uid}
    for place in folder.parents:
        status = place.stat()
        if status.st_uid not in owners:
            return f"{place} belongs to user {status.st_uid}"
        others = 0o002 if _is_own_group(status.st_gid) else 0o022
        if status.st_mode & others and not status.st_mode & stat.S_ISVTX:
            return f"others may write to {place} (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def _file_objection(path: Path, status: os.stat_result) -> str:
    if not hasattr(os, "geteuid"):
        return ""
    if status.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to user {status.st_uid}"
    if status.st_mode & 0o022:
        return f"others may write to {path} (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def _is_own_group(group: int) -> bool:
    """Whether a group has one member, the user, as many systems give each user one of the same name."""
    import grp
    import pwd

    try:
        user, named = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return named.gr_name == user and set(named.gr_mem) <= {user}


# --- what ---------------------------------------------------------------------------------------------------------------


def read(path: Path, limit: int) -> bytes:
    """The content of a file that only the user and root may write to.

    Args:
        limit: the largest number of bytes that it may have.

    Raises:
        FileNotFoundError: there is none.
        DamagedError: there is something else in its place, which is not to be believed.
    """
    try:
        # What is no file must neither be followed nor waited for.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror}") from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError(f"{path} is not a file")
        if objection := _file_objection(path, status):
            raise DamagedError(objection)
        if status.st_size > limit:
            raise DamagedError(f"{path} has {status.st_size} bytes, and at most {limit} were expected")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(limit + 1)
    finally:
        os.close(handle)


def write(path: Path, content: bytes) -> None:
    """Keep `content` in a file, in place of whatever is there.

    Raises:
        OSError: it cannot be written.
    """
    handle, name = tempfile.mkstemp(prefix=_UNFINISHED, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        os.replace(name, path)
    except BaseException:
        delete(Path(name))
        raise


def delete(path: Path) -> None:
    """Remove a file, with its record, or a folder, if it is there and may be removed."""
    for each in (path, _record_path(path)):
        with contextlib.suppress(OSError):
            each.unlink()
    shutil.rmtree(path, ignore_errors=True)


def keep(path: Path, content: bytes) -> None:
    """`write`, with a record beside it by which `verify` knows `content` again.

    Raises:
        OSError: it cannot be written.
    """
    write(path, content)
    write(_record_path(path), json.dumps(_record(path, content)).encode())


def verify(path: Path) -> None:
    """Check that a file is what `keep` kept under its name: nobody else's, and neither damaged nor exchanged.

    Raises:
        FileNotFoundError: nothing was kept.
        DamagedError: it is something else.
    """
    try:
        record = json.loads(read(_record_path(path), _LARGEST_RECORD))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"the record of {path} cannot be read") from error
    if record != _record(path, read(path, LARGEST_FILE)):
        raise DamagedError(f"{path} is not what was kept under this name")


def _record(path: Path, content: bytes) -> dict[str, str | int]:
    return {"name": path.name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


@contextlib.contextmanager
def workshop(folder: Path) -> Iterator[Path]:
    """A folder in `folder` to make something in, deleted at the end; those that killed processes left behind are, too.

    Raises:
        OSError: there can be none.
    """
    for path in folder.glob(f"{_UNFINISHED}*"):
        with contextlib.suppress(OSError):
            if path.lstat().st_mtime < time.time() - _LONGEST_SECONDS:
                delete(path)
    with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=folder, ignore_cleanup_errors=True) as made:
        yield Path(made)
