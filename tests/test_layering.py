"""Rules that no other test would notice broken: which way imports run, and how `passes` is packaged."""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The rooms of the package, lowest floor first. A module may import from its own room and from lower floors;
# rooms that share a floor do not see each other.
FLOORS = (
    {"errors", "disk", "locks", "switches"},
    {"registry", "watched", "artifacts", "frameworks", "progress"},
    {"options", "graphs"},
    {"chain", "call", "stopping", "comparison"},
    {"body"},
    {"codegen"},
    {"targets"},
    {"linear"},
    {"solvers"},
    {"ways"},
    {"planner"},
    {"record"},
    {"texts"},
    {"ops", "unrolled"},
    {"operands", "transformed"},
    {"tangents", "batches"},
    {"derivatives"},
    {"looks"},
    {"straight", "manners"},
    {"sweep", "heads", "routes"},
    {"sweeps"},
    {"node"},
    {"recurrent", "carried"},
    {"reproduction", "pages"},
    {"reports"},
    {"passes"},
    {"packing", "copies", "optimizers", "rehearsal", "compilations", "inner"},
    {"variants", "loop_step"},
    {"loops"},
    {"marks", "exports"},
    {"steps", "counters"},
    {"scans"},
    {"explicit", "backend", "solve", "scan"},
    {"introspect", "doctor", "verification"},
    {"__init__"},
    {"__main__"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: Path) -> str:
    """`pcr_fx/node.py` -> node, `pcr_fx/linear/reduction.py` -> linear, `passes/detect.py` -> passes."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return "passes" if folder == "passes" else rest[0]


def rooms_imported(source: str) -> Iterator[str]:
    """The room of every import of the package, those inside functions included."""
    for statement in ast.walk(ast.parse(source)):
        match statement:
            case ast.Import(names=names):
                modules = [alias.name for alias in names]
            case ast.ImportFrom(module="pcr_fx", names=names):  # each a room, or else a public name
                modules = [f"pcr_fx.{alias.name if alias.name in FLOOR else '__init__'}" for alias in names]
            case ast.ImportFrom(module=str(module), level=0):
                modules = [module]
            case _:
                continue
        for package, *rest in (module.split(".") for module in modules):
            if package == "pcr_fx":
                yield rest[0] if rest else "__init__"


def violations(room: str, source: str) -> list[str]:
    allowed = {room}.union(*FLOORS[: FLOOR[room]])
    return sorted(set(rooms_imported(source)) - allowed)


MODULES = sorted(path for folder in ("pcr_fx", "passes") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_one_way(path: Path) -> None:
    room = room_of(path)
    assert room in FLOOR, f"{room} has no place in the order of imports: give it one in FLOORS"
    assert not violations(room, path.read_text()), f"{room} imports from a room that it may not see"


@pytest.mark.parametrize(
    ("room", "source", "forbidden"),
    [
        ("linear", "from pcr_fx.linear.reduction import reduce", []),
        ("linear", "from pcr_fx.chain import Chain", []),
        ("linear", "from pcr_fx.solvers.newton import Newton", ["solvers"]),
        ("linear", "def late():\n    import pcr_fx.node as node", ["node"]),
        ("passes", "from pcr_fx import body, packing", ["packing"]),
        ("node", "from pcr_fx import Options", ["__init__"]),
        ("node", "import pcr_fx", ["__init__"]),
        ("backend", "from pcr_fx.transform import transform", ["transform"]),
        ("errors", "from pcr_fx.options import Options", ["options"]),
        ("__main__", "from pcr_fx import Options", []),
    ],
)
def test_a_forbidden_import_is_seen(room: str, source: str, forbidden: list[str]) -> None:
    assert violations(room, source) == forbidden


def test_package_list_names_every_package_on_disk() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [path.parent.relative_to(ROOT) for path in MODULES if path.name == "__init__.py"]
    # Setuptools counts a folder of code for another compiler as a package.
    packages = [".".join(folder.parts) for folder in folders] + ["pcr_fx.targets.cpp.native"]
    # The folder passes/ is the package pcr_fx.passes; every other package lies where its name says.
    expected = sorted(name if name.startswith("pcr_fx") else f"pcr_fx.{name}" for name in packages)
    assert sorted(setuptools["packages"]) == expected
    assert setuptools["package-dir"] == {"pcr_fx": "pcr_fx", "pcr_fx.passes": "passes"}


def test_passes_is_linked_into_the_package() -> None:
    link = ROOT / "pcr_fx" / "passes"
    assert link.is_symlink()
    assert os.readlink(link) == "../passes"


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_passes_refuses_to_be_a_top_level_package() -> None:
    done = run_python("import passes")
    assert done.returncode != 0
    assert "ImportError: this package is called pcr_fx.passes" in done.stderr


def test_import_loads_nothing_that_only_some_users_have() -> None:
    # What PyTorch itself loads is not ours to answer for.
    code = (
        "import sys, torch, torch._dynamo; before = set(sys.modules); import pcr_fx; "
        "print({'matplotlib', 'sklearn', 'triton'} & (set(sys.modules) - before) or '')"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
