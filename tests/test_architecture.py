"""The house: imports only ever point down, rooms on a floor do not meet, the package opens fast."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_sketch"
FLOORS = [
    {"_private", "_arguments", "_example_files", "_files", "_eigenvalue_axes"},
    {"_lightning", "plots", "operators"},
    {"linalg"},
    {"autodiff"},
    {"per_example", "store"},
    {"curvature", "attribution", "subspace", "metrics"},
    {"callbacks"},
    {"cli", "testing"},
    {"__main__"},
]
HEIGHT = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} imports relatively, which the floors cannot see"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def modules():
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room != "__init__":
            yield path, room


def test_imports_point_down_and_neighbors_do_not_meet():
    wrong = []
    for path, here in modules():
        for name in imports(path):
            top, _, rest = name.partition(".")
            there = rest.split(".")[0]
            if top == "lightning_sketch" and there and there != here and HEIGHT[there] >= HEIGHT[here]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, wrong


def test_lightning_is_imported_in_three_rooms_only():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path, room in modules()
        if room not in {"_lightning", "callbacks", "subspace"}
        for name in imports(path)
        if name.split(".")[0] in LIGHTNING
    ]
    assert not wrong, wrong


def loaded_after(statement):
    code = f"{statement}\nimport sys; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_the_package_alone_imports_nothing_heavy():
    assert not loaded_after("import lightning_sketch") & ({"torch", "wandb", "transformers", "numpy"} | LIGHTNING)


def test_the_mathematics_never_meets_lightning():
    """Of two rooms, the one that brings Lightning in is found by a run with one of them."""
    rooms = ["operators", "linalg", "autodiff", "per_example", "store", "curvature"]
    loaded = loaded_after(f"import lightning_sketch; from lightning_sketch import {', '.join(rooms)}")
    assert not loaded & ({"wandb", "transformers", "matplotlib"} | LIGHTNING)


ROOMS = ["lightning_sketch"] + [
    f"lightning_sketch.{'.'.join(path.parent.relative_to(PACKAGE).parts)}"
    for path in sorted(PACKAGE.rglob("__init__.py"))
    if path.parent != PACKAGE
]


@pytest.mark.parametrize("room", ROOMS)
def test_a_star_import_binds_public_names_only(room):
    """No submodules, no names of other packages."""
    bound: dict = {}
    exec(f"from {room} import *", bound)
    del bound["__builtins__"]
    public = sys.modules[room].__all__
    assert set(bound) == set(public)
    assert sorted(public) == sorted(set(public))
    assert not any(isinstance(value, ModuleType) for value in bound.values())


def test_the_table_of_private_names_imports_nothing():
    assert not list(imports(PACKAGE / "_private.py"))


def test_every_public_name_can_be_reached():
    import lightning_sketch

    for name in lightning_sketch.__all__:
        assert getattr(lightning_sketch, name).__name__ == name
        assert name in dir(lightning_sketch)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = lightning_sketch.Nothing


def test_lint_and_pre_commit_use_one_version_of_ruff():
    wanted = re.search(r"ruff==(\S+)", (ROOT / "requirements-dev.txt").read_text())[1]
    assert f"rev: v{wanted} " in (ROOT / ".pre-commit-config.yaml").read_text()
