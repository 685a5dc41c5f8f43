"""A set-up that fails says what it could not do, and leaves nothing that the next one takes for an environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "environment.py"
# pip looks for packages nowhere.
NOWHERE = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}


def failed(folder: Path, *options: str) -> str:
    """What a set-up in `folder` says that cannot succeed."""
    command = [sys.executable, SCRIPT, folder, *options]
    result = subprocess.run(command, env={**os.environ, **NOWHERE}, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    return result.stderr


@pytest.mark.parametrize("was_killed", [False, True])
def test_a_first_set_up_that_fails_leaves_nothing(was_killed: bool, tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    if was_killed:
        folder.mkdir()
        (folder / ".unfinished").touch()
    said = failed(folder)
    assert "pip could not install torch==" in said and f"for Python {sys.version.split()[0]}" in said
    assert not folder.exists()


def test_an_environment_that_was_there_stays_but_is_not_ready(tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (folder / ".ready").touch()
    failed(folder)
    assert (folder / "bin" / "python").exists() and not (folder / ".ready").exists()


def test_what_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "has no Python that runs" in failed(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
