"""The house: which room may import from which, read off the source. A new room takes its place in `ROOMS`."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# Every room imports only from those above it, and from itself.
ROOMS = {
    "regrad_qdrant": ("errors", "atoms", "model", "bank", "answer", "bridges", "serve", "cli"),
    "regrad_loaders": ("data", "training", "baselines", "evaluation", "bench", "cli"),
}
SOURCES = {"regrad_qdrant": REPOSITORY / "regrad_qdrant", "regrad_loaders": REPOSITORY / "loaders" / "regrad_loaders"}


def modules():
    """Every module by its dotted name, its file's syntax tree beside it."""
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            yield name, ast.parse(path.read_text(encoding="utf-8"))


MODULES = dict(modules())


def imports(name):
    """The modules of ours that a module imports, inside functions and for the types alone too."""
    found = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports by a relative path"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return {module for module in found if module in MODULES and module != name}


def room(name):
    """(package, room) of a module; None for the package's own __init__ and __main__."""
    package, _, rest = name.partition(".")
    first = rest.partition(".")[0]
    return None if first in ("", "__main__") else (package, first)


ARROWS = sorted((name, target) for name in MODULES for target in imports(name))


def test_every_module_stands_in_a_room():
    found = {room(name) for name in MODULES} - {None}
    assert found == {(package, name) for package, names in ROOMS.items() for name in names}


def test_the_client_knows_nothing_of_the_loaders():
    assert [] == [(a, b) for a, b in ARROWS if a.startswith("regrad_qdrant") and b.startswith("regrad_loaders")]


@pytest.mark.parametrize("package", ROOMS)
def test_a_room_imports_only_from_those_above_it(package):
    order = ROOMS[package]
    back = []
    for name, target in ARROWS:
        here, there = room(name), room(target)
        if here and there and here[0] == there[0] == package and order.index(here[1]) < order.index(there[1]):
            back.append((name, target))
    assert back == []


def test_no_files_import_each_other_in_a_circle():
    done, path = set(), []

    def visit(name):
        assert name not in path, " → ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for target in imports(name):
                if not name.startswith(f"{target}."):  # a package's own __init__
                    visit(target)
            done.add(path.pop())

    for name in MODULES:
        visit(name)


def test_a_room_says_what_it_is_for():
    for name, tree in MODULES.items():
        assert ast.get_docstring(tree), f"{name} has no docstring"
