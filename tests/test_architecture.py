"""docs/architecture.md and CONTRIBUTING.md are true of the code: the diagram, its imports, and the files they name."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from itertools import combinations
from pathlib import Path

import pytest

import cfmask
from tools import draw_architecture
from tools.diagram.imports import BASE, CORE, Box, Graph, find_modules, read_graph, read_imports
from tools.diagram.matrix import PAGE, draw, drawn_imports, order_of

REPO = Path(__file__).resolve().parents[1]
DOCUMENTS = ("docs/architecture.md", "CONTRIBUTING.md")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def imports():
    return read_imports(find_modules(REPO))


# --- the code ---------------------------------------------------------------------------------------------------------


def test_the_diagram_has_the_boxes_and_imports_of_the_code():
    graph = read_graph(REPO)
    boxes, edges = drawn_imports((REPO / "docs/architecture.svg").read_text())
    changed = [
        *(f"{sign} {box}" for sign, found in (("+", graph.boxes.keys() - boxes), ("-", boxes - graph.boxes.keys()))
          for box in sorted(found)),
        *(f"{sign} {a} → {b}" for sign, found in (("+", graph.edges.keys() - edges), ("-", edges - graph.edges.keys()))
          for a, b in sorted(found)),
    ]  # fmt: skip
    assert not changed, "docs/architecture.svg is out of date. Run: python3 tools/draw_architecture.py\n" + "\n".join(
        changed
    )


def test_the_library_imports_no_command(imports):
    strangers = {
        f"{module} imports {other}"
        for module, others in imports.items()
        for other in others
        if module.split(".")[0] == "cfmask" and other.split(".")[0] != "cfmask"
    }
    assert not strangers


def test_neither_modules_nor_packages_import_each_other_in_a_circle(imports):
    packages: dict[str, set[str]] = {}
    for package, other in read_graph(REPO).edges:
        packages.setdefault(package, set()).add(other)
    for importers in (imports, packages):
        try:
            TopologicalSorter(importers).prepare()
        except CycleError as error:
            pytest.fail(" → ".join(error.args[1]))


# --- the documents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_a_document_names_exist(document):
    text = (REPO / document).read_text()
    named = set(re.findall(r"\b(?:cfmask|launch|slurm|tests|tools)/[\w/.-]*\w", text))
    assert len(named) > 20
    assert sorted(path for path in named if not (REPO / path).exists()) == []
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links and all((REPO / document).parent.joinpath(link).exists() for link in links)


def test_the_packages_of_the_document_are_those_of_the_diagram():
    table = (REPO / "docs/architecture.md").read_text().partition("## Data flow")[0]
    described = set(re.findall(r"^\| `([\w/]+)/` \|", table, re.MULTILINE))
    missing = read_graph(REPO).boxes.keys() - described - {BASE}
    assert not missing, f"docs/architecture.md has no row for {', '.join(sorted(missing))}"


def test_the_version_is_stated_once_and_has_its_changes():
    project = (REPO / "pyproject.toml").read_text()
    assert 'dynamic = ["version"' in project and not re.search(r"^version\s*=\s*[\"']", project, re.MULTILINE)
    newest = re.search(r"^## (.*)$", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and cfmask.__version__ in newest[1]


# --- reading imports --------------------------------------------------------------------------------------------------


def test_imports_are_read_wherever_they_are_and_not_for_annotations(tmp_path):
    files = {
        "cfmask/__init__.py": "",
        "cfmask/errors.py": "import os\n",
        "cfmask/record.py": "from cfmask import errors\n",
        "cfmask/spec.py": "from cfmask.runtime import lock\n",
        "cfmask/train.py": "from cfmask.data.plan import order\nfrom cfmask import errors\n",
        "cfmask/data/plan.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from cfmask import train\n",
        "cfmask/data/deep/er.py": "def f():\n    import cfmask.errors as e\n",
        "cfmask/runtime/lock.py": "",
        "tools/run.py": "try:\n    import beside\nfinally:\n    from cfmask.train import *\n",
        "tools/beside.py": "",
        "launch/submit.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = read_imports(find_modules(tmp_path))
    assert found["tools.run"] == {"tools.beside", "cfmask.train"}
    assert found["cfmask.data.plan"] == set()
    graph = read_graph(tmp_path)
    assert graph.boxes[BASE] == Box(BASE, ("errors", "record"), 2)
    assert graph.boxes[CORE].modules == ("spec", "train") and graph.boxes["cfmask/data"].modules == ("er", "plan")
    assert graph.edges == {
        (CORE, BASE): 1, (CORE, "cfmask/data"): 1, (CORE, "cfmask/runtime"): 1, ("cfmask/data", BASE): 1,
        ("tools", CORE): 1,
    }  # fmt: skip
    ElementTree.fromstring(draw(graph))


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_packages_are_ordered_by_their_imports():
    edges = {("b", "c"): 5, ("d", "a"): 1, ("a", "c"): 5, ("a", "b"): 5, ("c", "b"): 1}
    assert order_of("abcd", edges) == ["d", "a", "b", "c"]
    assert order_of("dcba", edges) == order_of("abcd", edges), "the same drawing every time"


def test_the_file_needs_nothing_else_and_shows_every_import(tmp_path):
    out = tmp_path / "drawn.svg"
    assert draw_architecture.main(["--out", str(out)]) == 0
    text = out.read_text()
    assert not re.search(r"<script|<style|<image|href=", text)
    root = ElementTree.fromstring(text)
    graph = read_graph(REPO)
    labels = [element.text for element in root.iter(f"{SVG}text")]
    assert all(labels.count(name) == 2 for name in graph.boxes), "a row and a column"
    cells = [group for group in root.iter(f"{SVG}g") if group.get("class") == "cell"]
    shown = Counter(f"{group.findtext(f'{SVG}title')}" for group in cells)
    assert shown == Counter(f"{a} imports {b}: {count}" for (a, b), count in graph.edges.items())
    boxes = []
    for group in cells:
        rect = group.find(f"{SVG}rect")
        assert rect is not None
        x, y, width, height = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
        assert x >= 0 and x + width <= PAGE and width >= 18
        boxes.append((x, y, x + width, y + height))
    for a, b in combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_red_shows_packages_that_import_each_other():
    def box(name: str) -> Box:
        return Box(name, ("m",), 1)

    boxes = {name: box(name) for name in ("launch", "cfmask", "tools")}
    edges = {("tools", "launch"): 3, ("launch", "cfmask"): 2, ("launch", "tools"): 1}
    cells = re.findall(r'<title>(\w+ imports \w+): \d+</title><rect [^>]*fill="(#\w+)"', draw(Graph(boxes, edges)))
    colours = dict(cells)
    assert colours["launch imports tools"] != colours["tools imports launch"] == colours["launch imports cfmask"]
