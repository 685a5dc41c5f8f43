"""The cache folder: who may write to it, what is believed of what lies in it, and where things go without it."""

import json
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from pcr_fx import disk

STRANGER = 65534
needs_root = pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root may give files away")


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said once in a process is said again."""
    monkeypatch.setattr(disk, "_said", set())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is meant, which is not there yet."""
    monkeypatch.setenv("PCR_FX_CACHE_DIR", str(tmp_path / "above" / "cache"))
    return tmp_path / "above" / "cache"


def test_folders_are_made_for_the_user_alone(folder: Path) -> None:
    before = os.umask(0)
    try:
        assert disk.cache_directory() == folder
        disk.write(folder / "file", b"content")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent, folder / "file")]
    assert modes == [0o700, 0o700, 0o600]


def test_an_existing_folder_is_taken_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True, mode=0o755)
    assert disk.cache_directory() == folder
    link = folder.parent / "link"
    link.symlink_to(folder)
    monkeypatch.setenv("PCR_FX_CACHE_DIR", str(link))
    assert disk.cache_directory() == folder


def refused(folder: Path, caplog: pytest.LogCaptureFixture) -> bool:
    """Whether a private folder is used in place of `folder`, which one line says."""
    with caplog.at_level(logging.WARNING, "pcr_fx"):
        used = [disk.cache_directory() for _ in range(3)]
    assert len(set(used)) == 1
    assert stat.S_IMODE(used[0].stat().st_mode) & 0o022 == 0 and used[0].stat().st_uid == os.geteuid()
    assert [str(folder) in record.getMessage() for record in caplog.records] == [True] * (used[0] != folder)
    return used[0] != folder


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775, 0o770, 0o720, 0o702, 0o2775])
def test_a_folder_that_others_may_write_to_is_refused(
    mode: int, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir(parents=True)
    folder.chmod(mode)
    assert refused(folder, caplog)


@needs_root
@pytest.mark.parametrize("mode", [0o700, 0o755, 0o777])
def test_another_users_folder_is_refused(mode: int, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir(parents=True)
    folder.chmod(mode)
    os.chown(folder, STRANGER, STRANGER)
    assert refused(folder, caplog)


@needs_root
@pytest.mark.parametrize(
    ("owner", "mode", "is_safe"),
    [(0, 0o755, True), (0, 0o1777, True), (0, 0o777, False), (STRANGER, 0o755, False), (STRANGER, 0o1777, False)],
)
def test_nobody_may_exchange_a_folder_from_above(
    owner: int, mode: int, is_safe: bool, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir(parents=True)
    folder.parent.chmod(mode)
    os.chown(folder.parent, owner, owner)
    assert refused(folder, caplog) is not is_safe


@needs_root
def test_a_group_may_write_above_only_if_it_is_the_users_own(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir(parents=True)
    folder.parent.chmod(0o775)
    assert not refused(folder, caplog)
    os.chown(folder.parent, 0, STRANGER)
    assert refused(folder, caplog)


@pytest.mark.parametrize(
    "where",
    [
        "/dev/null",
        "/dev/null/in",
        "/proc/none",
        "~no such user/cache",
        "x" * 300,
        "a/" * 3000,
        "file",
        "file/in",
        "loop/in",
    ],
)
def test_where_no_folder_can_be_a_private_one_is_used(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PCR_FX_CACHE_DIR", where)
    with caplog.at_level(logging.WARNING, "pcr_fx"):
        private = [disk.cache_directory() for _ in range(2)]
    assert private[0] == private[1] and private[0].is_dir()
    assert len(caplog.records) == 1, caplog.text


def test_without_a_home_a_private_folder_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def unknown(user: int) -> None:
        raise KeyError(user)

    for name in ("PCR_FX_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert disk.cache_directory().is_dir()
    monkeypatch.setattr(disk.tempfile, "mkdtemp", lambda **_: (_ for _ in ()).throw(FileNotFoundError("no folder")))
    disk._private.cache_clear()
    with pytest.raises(OSError, match="no folder"):
        disk.cache_directory()
    disk._private.cache_clear()


def test_a_private_folder_that_was_cleared_away_is_made_again(folder: Path) -> None:
    folder.parent.mkdir()
    folder.touch()
    private = disk.cache_directory()
    private.rmdir()
    assert disk.cache_directory() == private and private.is_dir()


# --- files --------------------------------------------------------------------------------------------------------------


def as_directory(path: Path) -> None:
    path.mkdir()
    (path / "something").touch()


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a folder": as_directory,
    "a pipe": os.mkfifo,
    "a link": lambda path: path.symlink_to("/etc/passwd"),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_only_files_are_read_and_anything_is_replaced(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    NO_FILES[kind](path)
    with pytest.raises(disk.DamagedError):
        disk.read(path, 100)
    disk.write(path, b"content")
    assert disk.read(path, 100) == b"content"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("mode", [0o666, 0o664, 0o620, 0o602])
def test_a_file_that_others_may_write_to_is_not_read(mode: int, tmp_path: Path) -> None:
    disk.write(tmp_path / "file", b"content")
    (tmp_path / "file").chmod(mode)
    with pytest.raises(disk.DamagedError, match="others may write"):
        disk.read(tmp_path / "file", 100)


@needs_root
def test_another_users_file_is_not_read(tmp_path: Path) -> None:
    disk.write(tmp_path / "file", b"content")
    os.chown(tmp_path / "file", STRANGER, 0)
    with pytest.raises(disk.DamagedError, match=f"belongs to user {STRANGER}"):
        disk.read(tmp_path / "file", 100)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    disk.write(tmp_path / "file", b"content")
    with pytest.raises(disk.DamagedError, match="7 bytes, and at most 6"):
        disk.read(tmp_path / "file", 6)
    with pytest.raises(FileNotFoundError):
        disk.read(tmp_path / "none", 6)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.write(tmp_path / "file", b"before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        disk.write(tmp_path / "file", b"after")
    assert disk.read(tmp_path / "file", 100) == b"before"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_workshop_is_cleared_away_with_what_killed_processes_left(tmp_path: Path) -> None:
    for name, age in (("unfinished_old", 4000), ("unfinished_new", 0), ("else", 4000)):
        as_directory(tmp_path / name)
        os.utime(tmp_path / name, times=(0, (tmp_path / name).stat().st_mtime - age))
    with disk.workshop(tmp_path) as workshop:
        (workshop / "file").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["else", "unfinished_new"]


PAGES = bytes(range(256)) * 64  # four pages
DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "empty": lambda path, _: path.write_bytes(b""),
    "half": lambda path, _: path.write_bytes(PAGES[: len(PAGES) // 2]),
    "without its last page": lambda path, _: path.write_bytes(PAGES[:-4096]),
    "a page and zeros": lambda path, _: path.write_bytes(PAGES[:4096] + bytes(len(PAGES) - 4096)),
    "another file": lambda path, other: path.write_bytes(other.read_bytes()),
    "another file with its record": lambda path, other: [
        Path(f"{path}{end}").write_bytes(Path(f"{other}{end}").read_bytes()) for end in ("", ".json")
    ],
    "a byte differs": lambda path, _: path.write_bytes(PAGES[:9000] + b"!" + PAGES[9001:]),
    "a byte more": lambda path, _: path.write_bytes(PAGES + b"!"),
    "a record of nothing": lambda path, _: Path(f"{path}.json").write_bytes(b""),
    "half a record": lambda path, _: Path(f"{path}.json").write_bytes(Path(f"{path}.json").read_bytes()[:30]),
    "a record of another form": lambda path, _: Path(f"{path}.json").write_text(json.dumps([1, 2])),
    "a record of numbers": lambda path, _: Path(f"{path}.json").write_text('{"name": NaN, "size": 1e999, "sha256": 3}'),
    "a deep record": lambda path, _: Path(f"{path}.json").write_text("[" * 2000 + "]" * 2000),
    "a record of no text": lambda path, _: Path(f"{path}.json").write_bytes(b"\xff\xfe\x00"),
    "a large record": lambda path, _: Path(f"{path}.json").write_bytes(b" " * 10**6),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_seen(damage: str, tmp_path: Path) -> None:
    path, other = tmp_path / "one", tmp_path / "other"
    disk.keep(path, PAGES)
    disk.keep(other, PAGES[::-1])
    disk.verify(path)
    DAMAGES[damage](path, other)
    with pytest.raises(disk.DamagedError):
        disk.verify(path)
    disk.keep(path, PAGES)
    disk.verify(path)


@pytest.mark.parametrize("name", ["one", "one.json"])
def test_half_of_what_was_kept_is_nothing(name: str, tmp_path: Path) -> None:
    """A process that is killed between the two leaves that."""
    disk.keep(tmp_path / "one", PAGES)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError):
        disk.verify(tmp_path / "one")
