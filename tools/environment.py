"""Makes the virtual environment that the Makefile works in, with the Python that runs this file.

    python tools/environment.py .venv [--installer /usr/bin/uv] [--system-torch]

PyTorch comes first and decides for the rest: its builds for NVIDIA GPUs bring a Triton of their own, which nothing here may
contradict; where a build brings none, one is installed whose interpreter runs the kernels. A first set-up that fails is
removed; a later one that fails leaves the environment without its mark, so that the next call tries again.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
# What PyTorch 2.13 brings itself where it is built for GPUs. Before 3.7 the interpreter does not work with NumPy 2.4.
TRITON = "triton==3.7.1"
# The first that reads what a package needs without downloading the package.
PIP = "pip>=23.2"
_LINES_OF_A_FAILURE = 25


class SetupError(Exception):
    """The environment cannot be made; the message says why."""


class Environment:
    """A virtual environment in `folder`, and what installs into it: `installer`, a path of uv, or pip without one."""

    def __init__(self, folder: Path, installer: str | None) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.pip = [str(self.python), "-m", "pip", "--disable-pip-version-check", "install"]
        self.install_command = [installer, "pip", "install", "--python", str(self.python)] if installer else self.pip

    def install(self, *requirements: str) -> None:
        """Install, or raise with what could not be, below the installer's own words."""
        result = self._run(*requirements)
        if result.returncode:
            print(*result.stdout.splitlines()[-_LINES_OF_A_FAILURE:], sep="\n", file=sys.stderr)
            name = "pip" if self.install_command is self.pip else "uv"
            raise SetupError(
                f"{name} could not install {' '.join(requirements)} for Python {platform.python_version()} on "
                f"{platform.system()} {platform.machine()}; what it says of it stands above."
            )

    def would_install(self, *requirements: str) -> str:
        """What the installer prints of what it would do; nothing is downloaded but descriptions of packages."""
        return self._run("--dry-run", *requirements).stdout

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*self.install_command, *arguments]
        return subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def version(self, distribution: str) -> str | None:
        """The version that is installed in the environment, or that it sees."""
        code = "import importlib.metadata as m; print(next((d.version for d in m.distributions(name={!r})), ''))"
        return self._ask(code.format(distribution)) or None

    def site_packages(self) -> Path:
        """Where the environment's own packages lie."""
        return Path(self._ask("import sysconfig; print(sysconfig.get_path('purelib'))"))

    def _ask(self, code: str) -> str:
        return subprocess.run([self.python, "-c", code], check=True, text=True, stdout=subprocess.PIPE).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the virtual environment that the Makefile works in.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--installer", help="a path of uv, to be used instead of pip")
    parser.add_argument("--system-torch", action="store_true", help="use the PyTorch that this Python has")
    given = parser.parse_args()
    try:
        set_up(given.folder.absolute(), given.installer or None, given.system_torch)
    except SetupError as error:
        sys.exit(f"The set-up failed: {error}")


def set_up(folder: Path, installer: str | None, system_torch: bool) -> None:
    """Make the environment, or bring one that is there up to date."""
    unfinished, ready = folder / ".unfinished", folder / ".ready"
    if unfinished.exists():  # a first set-up that was killed
        shutil.rmtree(folder)
    is_new = not folder.exists()
    if not is_new and not (folder / "bin" / "python").exists():
        raise SetupError(
            f"{folder} is there, but has no Python that runs: remove it, or name another folder by VENV=..."
        )
    # uv does not see packages outside of the environment.
    environment = Environment(folder, None if system_torch else installer)
    try:
        if is_new:
            folder.mkdir(parents=True)
            unfinished.touch()
            venv.create(folder, with_pip=True, symlinks=True)
        ready.unlink(missing_ok=True)
        fill(environment, system_torch)
        ready.touch()
    except BaseException:
        if is_new:
            shutil.rmtree(folder)
        raise
    unfinished.unlink(missing_ok=True)


def fill(environment: Environment, system_torch: bool) -> None:
    """Install everything that is not there yet."""
    if environment.install_command is environment.pip:
        environment.install(PIP)
    if system_torch:
        borrow_torch(environment)
    else:
        announce_download(environment)
        environment.install(tested_torch())
    if platform.system() == "Linux" and environment.version("triton") is None:
        environment.install(TRITON)
    environment.install("--editable", f"{PROJECT}[docs,examples,test]", f"torch=={environment.version('torch')}")
    if subprocess.run([str(environment.python), "-c", "import pcr_fx"], check=False).returncode:
        raise SetupError("everything is installed, but cannot be imported; the reason stands above.")


def tested_torch() -> str:
    """The requirement that constraints.txt puts on PyTorch."""
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch"))


def announce_download(environment: Environment) -> None:
    """Say so where PyTorch comes with gigabytes of libraries for GPUs."""
    if "nvidia-" in environment.would_install(tested_torch()):
        print(
            "PyTorch's build for NVIDIA GPUs is installed: some 3 GB to download, 6 GB on disk. To use a PyTorch that is "
            "there, stop this and say SYSTEM_TORCH=1 (and PYTHON=... for the Python that has it).",
            flush=True,
        )


def borrow_torch(environment: Environment) -> None:
    """Let the environment see the folder of packages in which the PyTorch of this Python lies."""
    found = importlib.util.find_spec("torch")
    if environment.version("torch") is None and found is not None and found.origin is not None:
        packages = str(Path(found.origin).parents[1])
        file = environment.site_packages() / "system_torch.pth"
        file.write_text(f"import site; site.addsitedir({packages!r})\n")
    if environment.version("torch") is None:
        raise SetupError(f"{sys.executable} has no PyTorch: name the Python that has one, by PYTHON=...")


if __name__ == "__main__":
    main()
