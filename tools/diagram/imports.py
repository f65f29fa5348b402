"""Which package imports which, read from the code without running it.

    graph = read_graph(REPO)
    graph.boxes["cfmask/data"].lines          lines of its modules
    graph.edges["cfmask/convert", "cfmask/data"]      how many imports there are

A box is a folder with all folders below a depth of two. The modules directly in cfmask/ are two boxes: ``BASE`` has
those that import no other folder, directly or indirectly; ``CORE`` has the others, which are the training run.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOTS = ("cfmask", "launch", "slurm", "tools")
"""Folders whose modules are read."""
CORE, BASE = "cfmask", "cfmask (base)"
_DEPTH = 2
"""Folders of a path that name a box: cfmask/convert/sources belongs to cfmask/convert."""


@dataclass(frozen=True)
class Box:
    """The modules of a folder."""

    name: str
    """The folder, or ``BASE``."""
    modules: tuple[str, ...]
    """Names of the modules, sorted, without "__init__"."""
    lines: int
    """Lines of all its files."""


@dataclass(frozen=True)
class Graph:
    """Boxes by name, and the number of imports from one box into another. Imports within a box are left out."""

    boxes: dict[str, Box]
    edges: dict[tuple[str, str], int]


def read_graph(root: Path) -> Graph:
    """The boxes and imports of a checkout."""
    modules = find_modules(root)
    imports = read_imports(modules)
    boxes = _boxes_of_modules(root, modules, imports)
    names: dict[str, list[str]] = {box: [] for box in boxes.values()}
    lines: Counter[str] = Counter()
    for module, path in modules.items():
        lines[boxes[module]] += len(path.read_text(encoding="utf-8").splitlines())
        if path.stem != "__init__":
            names[boxes[module]].append(path.stem)
    edges = Counter(
        (boxes[module], boxes[other])
        for module, others in imports.items()
        for other in others
        if boxes[module] != boxes[other]
    )
    return Graph(
        {name: Box(name, tuple(sorted(found)), lines[name]) for name, found in sorted(names.items())},
        dict(sorted(edges.items())),
    )


def find_modules(root: Path) -> dict[str, Path]:
    """Python files by the names under which they are imported."""
    found = {}
    for path in sorted(path for top in ROOTS for path in (root / top).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def read_imports(modules: dict[str, Path]) -> dict[str, set[str]]:
    """The modules that each module imports, also within functions. Imports under TYPE_CHECKING are left out."""
    return {
        module: {
            found
            for name in _imported_names(ast.parse(path.read_text(encoding="utf-8")))
            if (found := _resolved(name, module, modules)) is not None and found != module
        }
        for module, path in modules.items()
    }


def _imported_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from _imported_names(node)


def _resolved(name: str, module: str, modules: dict[str, Path]) -> str | None:
    """The module that a name refers to, or lies in; None for other libraries."""
    folder = module.rpartition(".")[0]  # a script imports a file beside it by its bare name
    for prefix in ("", f"{folder}."):
        for candidate in (name, name.rpartition(".")[0]):
            if candidate and prefix + candidate in modules:
                return prefix + candidate
    return None


def _boxes_of_modules(root: Path, modules: dict[str, Path], imports: dict[str, set[str]]) -> dict[str, str]:
    boxes = {module: "/".join(path.relative_to(root).parent.parts[:_DEPTH]) for module, path in modules.items()}
    base = {module for module, box in boxes.items() if box == CORE}
    while beyond := {module for module in base if imports[module] - base}:
        base -= beyond
    return {**boxes, **dict.fromkeys(base, BASE)}
