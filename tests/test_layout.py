"""The layout of the code: which module may import which."""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, SOURCES, WINGS

# From the top. Imports point down: never up, and never to another place on the same floor.
# Within a folder any import is fine that makes no cycle.
FLOORS = (
    {"ollprox"},
    {"proxy"},
    {"gate", "watch"},
    {"startup"},
    {"answers"},
    {"wire"},
    {"keystore"},
    {"access"},
    {"cache", "settings", "record"},
)
FLOOR = {place: number for number, places in enumerate(FLOORS) for place in places}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES}


def imported(source: str) -> Iterator[str]:
    """Yield our modules that a module imports, wherever in its text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            assert node.level == 0, "a relative import"
            names = {f"{module}.{alias.name}" for alias in node.names} & MODULES.keys()
            yield from names or {module} & MODULES.keys()
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & MODULES.keys()


IMPORTS = {name: set(imported(path.read_text())) for name, path in MODULES.items()}


def place(module: str) -> str:
    return module.partition(".")[0]


def violations(imports: dict[str, set[str]]) -> list[str]:
    return [
        f"{module} imports {other}"
        for module, others in sorted(imports.items())
        for other in sorted(others)
        if place(module) != place(other) and FLOOR[place(module)] >= FLOOR[place(other)]
    ]


def test_each_module_stands_on_a_floor() -> None:
    assert {place(module) for module in MODULES} == FLOOR.keys()
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(WINGS)


def test_imports_point_down_only() -> None:
    assert violations(IMPORTS) == []
    assert sum(map(len, IMPORTS.values())) > 50  # or the search has lost its way


def test_there_are_no_import_cycles() -> None:
    graphlib.TopologicalSorter(IMPORTS).prepare()


def test_an_import_that_points_up_sideways_or_round_is_found() -> None:
    assert [*imported("def f():\n    from answers import turns\n    import wire.http11\n")] == [
        "answers.turns",
        "wire.http11",
    ]
    assert violations({"wire.server": {"proxy", "settings"}}) == ["wire.server imports proxy"]
    assert violations({"watch.pages": {"gate"}}) == ["watch.pages imports gate"]
    cycle = {"wire.server": {"wire.bodies"}, "wire.bodies": {"wire.server"}}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(cycle).prepare()


@pytest.mark.parametrize("wing", WINGS)
def test_each_wing_is_shipped_and_checked(wing: str) -> None:
    assert "COPY . ./\n" in (ROOT / "Dockerfile").read_text()  # what the next file lets through
    assert f"!{wing}/*.py\n" in (ROOT / ".dockerignore").read_text()
    assert re.search(rf"bandit .* {wing}\b", (ROOT / "Makefile").read_text())
    assert f'"/{wing}/*.py"' in (ROOT / "pyproject.toml").read_text()  # the wheel and the .pyz
    assert re.search(rf'^files = .*"{wing}"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
