"""The floors of the house: imports only go down, and each heavy library has one room."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE_ROOTS = (ROOT, ROOT / "kernels", ROOT / "eval")

# From the ground up. A module may import what lies on lower floors, and its own package.
FLOORS: tuple[set[str], ...] = (
    {"llmprune.errors", "llmprune.structure", "llmprune_kernels"},
    {"llmprune.team"},
    {"llmprune.kernels", "llmprune.progress"},
    {"llmprune.selection", "llmprune.environment"},
    {"llmprune.patterns"},
    {"llmprune.statistics", "llmprune.allocation", "llmprune.refit"},
    {"llmprune.methods"},
    {"llmprune.checkpoint", "llmprune.hub", "llmprune.documents", "llmprune.datafiles", "llmprune.determinism"},
    {"llmprune.model", "llmprune.data", "llmprune.calibration", "llmprune.locate", "llmprune.runfile"},
    {"llmprune.presets", "llmprune.overrides", "llmprune.options"},
    {"llmprune.recipe"},
    {"llmprune.recipefiles", "llmprune.planning", "llmprune.retrying"},
    {"llmprune.solving"},
    {"llmprune.budget", "llmprune.tuning", "llmprune.single"},
    {"llmprune.inspection", "llmprune.runs", "llmprune.uploading", "llmprune.batching"},
    {"llmprune.cardheader", "llmprune.privacy"},
    {"llmprune.card", "llmprune.page"},
    {"llmprune.publishing"},
    {"llmprune.report"},
    {"llmprune.storing", "llmprune.forecast", "llmprune.portions"},
    {"llmprune.thrift"},
    {"llmprune.feeding", "llmprune.opening"},
    {"llmprune.branch", "llmprune.sparse"},
    {"llmprune.run"},
    {"llmprune.branches", "llmprune.reverse"},
    {"llmprune.apart", "llmprune.together"},
    {"llmprune.several"},
    {"llmprune.pruning", "llmprune.preview"},
    {"llmprune_eval"},
    {"llmprune.commands"},
    {"llmprune.cli"},
    {"llmprune.__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Stricter than the floors: what each room below the line of a run needs.
MAY_IMPORT: dict[str, set[str]] = {
    "llmprune.errors": set(),
    "llmprune.structure": set(),
    "llmprune.runfile": {"llmprune.checkpoint", "llmprune.errors", "llmprune.structure"},
    "llmprune.team": {"llmprune.errors"},
    "llmprune.progress": {"llmprune.team"},
    "llmprune_kernels": set(),
    "llmprune.kernels": {"llmprune_kernels"},
    "llmprune.selection": {"llmprune.kernels"},
    "llmprune.environment": {"llmprune.kernels"},
    "llmprune.patterns": {"llmprune.errors", "llmprune.selection"},
    "llmprune.statistics": {"llmprune.errors", "llmprune.kernels", "llmprune.patterns"},
    "llmprune.refit": {"llmprune.kernels", "llmprune.patterns"},
    "llmprune.methods": {
        "llmprune.errors",
        "llmprune.kernels",
        "llmprune.patterns",
        "llmprune.refit",
        "llmprune.statistics",
    },
    "llmprune.allocation": {"llmprune.errors", "llmprune.patterns"},
    "llmprune.checkpoint": {"llmprune.errors", "llmprune.progress", "llmprune_kernels"},
    "llmprune.hub": {"llmprune.errors"},
    "llmprune.determinism": {"llmprune.errors"},
    "llmprune.documents": {"llmprune.errors"},
    "llmprune.datafiles": {"llmprune.errors"},
    "llmprune.data": {"llmprune.errors", "llmprune.hub", "llmprune.documents", "llmprune.datafiles"},
    "llmprune.calibration": {"llmprune.errors", "llmprune.documents", "llmprune.progress"},
    "llmprune.locate": {"llmprune.errors", "llmprune.hub", "llmprune.checkpoint"},
    "llmprune.model": {
        "llmprune.errors",
        "llmprune.checkpoint",
        "llmprune.kernels",
        "llmprune.statistics",
        "llmprune.team",
    },
    "llmprune.presets": {"llmprune.errors", "llmprune.methods", "llmprune.statistics"},
    "llmprune.options": {"llmprune.errors"},
    "llmprune.overrides": {"llmprune.errors", "llmprune.patterns"},
    "llmprune.recipe": {
        "llmprune.options",
        "llmprune.overrides",
        "llmprune.presets",
        "llmprune.errors",
        "llmprune.methods",
        "llmprune.patterns",
        "llmprune.locate",
        "llmprune.statistics",
    },
    "llmprune.recipefiles": {"llmprune.errors", "llmprune.recipe"},
    "llmprune.sparse": {
        "llmprune.checkpoint",
        "llmprune.environment",
        "llmprune.errors",
        "llmprune.locate",
        "llmprune.model",
        "llmprune.options",
        "llmprune.page",
        "llmprune.planning",
        "llmprune.progress",
        "llmprune_kernels",
    },
}


def sources() -> dict[str, Path]:
    """Return every module of the three packages by its name."""
    found = {}
    for root in SOURCE_ROOTS:
        for path in sorted(root.glob("llmprune*/**/*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = sources()
MODULES = sorted(SOURCES.keys() - {"llmprune"})  # the package's own file imports its rooms lazily


def room_of(module: str) -> str:
    """Return the room of a module: the first two parts of its name, one for the packages beside llmprune."""
    return ".".join(module.split(".")[: 2 if module.startswith("llmprune.") else 1])


def imports(path: Path) -> Iterator[str]:
    """Yield the full name of all that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def rooms_imported(module: str) -> set[str]:
    names = {
        name
        for name in imports(SOURCES[module])
        if name.split(".")[0] in ("llmprune", "llmprune_kernels", "llmprune_eval")
    }
    return {room_of(name) for name in names} - {room_of(module)}


def importers_of(library: str) -> set[str]:
    return {module for module, path in SOURCES.items() if library in {name.split(".")[0] for name in imports(path)}}


def test_every_room_has_a_floor() -> None:
    assert {room_of(module) for module in MODULES} == FLOOR.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module: str) -> None:
    floor = FLOOR[room_of(module)]
    assert {room for room in rooms_imported(module) if FLOOR[room] >= floor} == set()


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) in MAY_IMPORT])
def test_the_lower_rooms_import_what_they_need_only(module: str) -> None:
    assert rooms_imported(module) <= MAY_IMPORT[room_of(module)]


def test_only_one_module_imports_datasets() -> None:
    assert importers_of("datasets") == {"llmprune.data"}


@pytest.mark.parametrize("library", ["transformers", "accelerate", "greenlet"])
def test_only_the_model_room_imports_the_libraries_of_models(library: str) -> None:
    plugin = {"llmprune.sparse.quantizer", "llmprune.sparse.running"} if library == "transformers" else set()
    assert {room_of(module) for module in importers_of(library) - plugin} == {"llmprune.model"}


def test_only_triton_files_of_the_kernels_import_triton() -> None:
    allowed = {module for module in SOURCES if room_of(module) == "llmprune_kernels" and ".triton" in module}
    assert importers_of("triton") <= allowed


@pytest.mark.parametrize("folder", ["kernels", "eval", "scripts", "tests"])
def test_a_source_root_is_no_package(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_root_has_no_conftest() -> None:
    assert not (ROOT / "conftest.py").exists()


def test_transformers_imports_from_the_root() -> None:
    """Transformers imports a package called `kernels` where it finds one; our folder of that name must not be one."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import transformers; from transformers import LlamaForCausalLM"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
