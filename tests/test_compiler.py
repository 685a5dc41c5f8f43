"""Whatever the compiler and the cache folder do, there is a library, or a clear reason why there is none."""

import ctypes
import itertools
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from torch._inductor import config

from pcr_fx import disk
from pcr_fx.body.isolation import apart
from pcr_fx.registry import Registry
from pcr_fx.targets.cpp import build
from pcr_fx.targets.cpp.build import CompilerError

GXX = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(GXX is None or os.name != "posix", reason="there is no compiler to do as if")

SOURCE = 'extern "C" __attribute__((visibility("default"))) void run(const void*) {}\n'
_numbers = itertools.count()


@pytest.fixture(autouse=True)
def nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder without anything in it, and no compiler seen so far."""
    monkeypatch.setenv("PCR_FX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_hanging", set())
    build._toolchain.cache_clear()
    with config.patch({"cpp.cxx": (None, GXX)}):
        yield
    build._toolchain.cache_clear()


def use(command: str) -> None:
    """Compile by `command` until the test ends, as `CXX` would have it."""
    config.cpp.cxx = (None, command)
    build._toolchain.cache_clear()


def script(path: Path, text: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def load(number: int | None = None) -> ctypes.CDLL:
    """A library, by its number; without one a library that was not loaded before."""
    library = build.load(f"// {next(_numbers) if number is None else number} of {os.getpid()}\n{SOURCE}")
    library.run(b"")
    return library


# --- compilers ----------------------------------------------------------------------------------------------------------

WRITES = 'while [ $# -gt 1 ]; do [ "$1" = -o ] && out=$2; shift; done'
FAILING = {
    "fails": ("echo 'chain.cpp:1: error: no' >&2; exit 1", "chain.cpp:1: error: no"),
    "fails without a word": ("exit 3", "it ends with code 3"),
    "dies": ("kill -9 $$", "signal 9 ended it"),
    "makes nothing": ("exit 0", "made no library"),
    "makes an empty file": (f"{WRITES}; : > $out", "made no library"),
    "makes text": (f"{WRITES}; echo text > $out", "invalid ELF header|file too short"),
    "makes half a library": (f'{GXX} "$@"; {WRITES}; head -c 8000 $out > half; mv half $out', "made no library"),
    "makes another library": (
        f"{WRITES}; echo 'void walk(){{}}' > a.c; {GXX} -shared -fPIC -o $out a.c",
        "no function `run`",
    ),
    "hangs": ("sleep 300", "did not end within 1 s"),
    "hangs while another holds its output": ("sleep 300 & wait", "did not end within 1 s"),
}


@pytest.mark.parametrize("kind", FAILING)
def test_a_compiler_that_fails(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    does, reason = FAILING[kind]
    if "hangs" in kind:
        monkeypatch.setattr(build, "_COMPILE_SECONDS", 1.0)
    use(script(tmp_path / "bin" / "g++", f"case $1 in --version) echo 1;; *) {does};; esac"))
    build.check_compiler()
    began = time.monotonic()
    with pytest.raises(CompilerError, match=reason):
        load()
    if "hangs" in kind:  # and is not waited for again
        with pytest.raises(CompilerError, match="did not end in time before"):
            load()
        assert time.monotonic() - began < 100
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("does", ["exit 1", "sleep 300", "sleep 300 & sleep 300"])
def test_a_compiler_that_does_not_even_tell_its_version(
    does: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_VERSION_SECONDS", 1.0)
    use(script(tmp_path / "bin" / "g++", does))
    with pytest.raises(CompilerError, match=r"no C\+\+ compiler was found: .*bin/g\+\+"):
        build.check_compiler()


@pytest.mark.parametrize("command", ["no-such-compiler", "no-such-compiler -m64", "'", '"g++', " ", "/dev/null", "/"])
def test_no_compiler(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(command)
    with pytest.raises(CompilerError, match=r"no C\+\+ compiler was found"):
        build.check_compiler()


def test_commands_with_flags_launchers_and_blanks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = script(tmp_path / "a folder's" / "my g++", f'exec {GXX} "$@"')
    launcher = script(tmp_path / "bin" / "launcher", f'echo "$1" >> {tmp_path}/launched; exec "$@"')
    quoted = here.replace(" ", "\\ ").replace("'", "\\'")
    for command in (here, f"{GXX} -DFLAG -O1", f"{launcher} {GXX} -DFLAG", f"{launcher} {quoted} '-DNAME=\"a b\"'"):
        use(command)
        load()
    assert set((tmp_path / "launched").read_text().splitlines()) == {GXX, here}
    monkeypatch.chdir(tmp_path)
    use("bin/launcher g++")
    load()


# --- folders ------------------------------------------------------------------------------------------------------------

NAMES = [
    "with space",
    "it's",
    'a "quote"',
    "Fünf Äpfel",
    "$(touch executed)",
    "; touch executed",
    "`touch executed`",
    "new\nline",
    "-o",
    "%s",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_may_have_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PCR_FX_CACHE_DIR", str(tmp_path / name))
    load()
    assert len(list((tmp_path / name).glob("*.so"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_kept_library_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    name = load(-1)._name
    monkeypatch.setattr(build, "_loaded", Registry())
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert load(-1)._name == name


def test_a_damaged_library_is_compiled_anew(tmp_path: Path) -> None:
    """Of another process: this one has it in memory."""
    code = f"from pcr_fx.targets.cpp import build; build.load({SOURCE!r}).run(b'')"
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r}); {code}"]
    assert subprocess.run(command).returncode == 0
    (path,) = (tmp_path / "cache").glob("*.so")
    kept = path.read_bytes()
    path.write_bytes(kept[:4096] + bytes(len(kept) - 4096))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "compiled anew" in done.stderr, done.stderr
    assert path.read_bytes() == kept


def planted(path: Path, mark: Path) -> None:
    """Put a library into the cache, with its record, that leaves a mark when it is opened."""
    source = path.parent / "planted.c"
    source.write_text(
        f'''#include <stdio.h>
        __attribute__((constructor)) static void open_mark(void) {{ fclose(fopen("{mark}", "w")); }}
        void run(const void *call) {{}}'''
    )
    made = source.with_suffix(".made")
    subprocess.run(["g++", "-x", "c", "-shared", "-fPIC", "-o", made, source], check=True)
    disk.keep(path, made.read_bytes())
    source.unlink(), made.unlink()


# What keeps a planted library from being opened, each alone.
REFUSED: dict[str, Callable[[Path], object]] = {
    "of another user": lambda path: os.chown(path, 65534, 65534),
    "that others may write to": lambda path: path.chmod(0o666),
    "in a folder of another user": lambda path: os.chown(path.parent, 65534, 65534),
    "in a folder that others may write to": lambda path: path.parent.chmod(0o1777),
    "below a folder that others may write to": lambda path: path.parents[1].chmod(0o777),
    "without a record": lambda path: Path(f"{path}.json").unlink(),
    "with a record that others may write to": lambda path: Path(f"{path}.json").chmod(0o622),
    "with the record of what was there": lambda path: Path(f"{path}.json").write_bytes(
        path.with_suffix(".before").read_bytes()
    ),
    "that is a link": lambda path: path.symlink_to(path.rename(path.with_suffix(".elsewhere"))),
}


@pytest.mark.parametrize("kind", [*REFUSED, "of the user"])
def test_a_planted_library_is_not_opened(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "another user" in kind and os.getuid() != 0:
        pytest.skip("only root may give files away")
    monkeypatch.setattr(disk, "_said", set())
    (tmp_path / "above").mkdir(mode=0o755)
    monkeypatch.setenv("PCR_FX_CACHE_DIR", str(tmp_path / "above" / "cache"))
    number, mark = next(_numbers), tmp_path / "mark"
    with monkeypatch.context() as patch:  # a library that is open is not opened again
        patch.setattr(build, "_opened", lambda path: Mock(_name=str(path)))
        path = Path(load(number)._name)
    shutil.copy(f"{path}.json", path.with_suffix(".before"))
    planted(path, mark)
    REFUSED.get(kind, lambda _: None)(path)
    monkeypatch.setattr(build, "_loaded", Registry())
    load(number)
    # What the user has put there is opened, which shows that the others could have been.
    assert mark.exists() is (kind == "of the user")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with room for 32 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("file systems may not be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("kind", ["full", "read-only", "without execution"])
def test_a_file_system_that_keeps_nothing(
    kind: str, small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PCR_FX_CACHE_DIR", str(small_disk / "cache"))
    (small_disk / "cache").mkdir(mode=0o700)
    if kind == "full":
        with pytest.raises(OSError, match="No space"):
            (small_disk / "else").write_bytes(bytes(2**16))
    else:
        option = {"read-only": "ro", "without execution": "noexec,size=8m"}[kind]
        subprocess.run(["mount", "-o", f"remount,{option}", small_disk], check=True)
    with caplog.at_level(logging.WARNING, "pcr_fx"):
        load(), load()
    assert len(caplog.records) == 1 and str(small_disk) in caplog.text, caplog.text
    assert list((small_disk / "cache").iterdir()) == []


def test_a_read_only_folder_is_read(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCR_FX_CACHE_DIR", str(small_disk / "cache"))
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    name = load(-2)._name
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    monkeypatch.setattr(build, "_loaded", Registry())
    assert load(-2)._name == name


@pytest.mark.parametrize("limit", [0, 100, 4096])
def test_a_limit_of_the_size_of_files(limit: int, tmp_path: Path) -> None:
    import resource

    number = next(_numbers)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(CompilerError, match=r"File too large|error|signal|fails") as raised:
            load(number)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(raised.value)
    assert [path for path in (tmp_path / "cache").iterdir() if path.name.startswith("unfinished")] == []
    load(number)


def test_no_folder_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCR_FX_CACHE_DIR", "/dev/null")
    monkeypatch.setattr(disk, "_private", lambda _: Path("/dev/null/private"))
    with pytest.raises(CompilerError, match=r"/dev/null is not a folder|Not a directory"):
        load()


# --- interruptions ------------------------------------------------------------------------------------------------------


def test_an_interrupt_ends_the_compiler_and_does_not_count_as_its_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stress.interrupts import be_interruptible, interrupted_after

    be_interruptible()
    does = f"case $1 in --version) echo 1;; *) echo $$ > {tmp_path}/process; sleep 300;; esac"
    use(script(tmp_path / "bin" / "g++", does))
    build.check_compiler()
    for call in (load, apart(load)):
        (tmp_path / "process").unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt), interrupted_after(0.5):
            call()
        if (tmp_path / "process").exists():
            with pytest.raises(ProcessLookupError):
                os.kill(int((tmp_path / "process").read_text()), 0)
    use(str(GXX))
    load()
