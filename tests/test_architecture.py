"""docs/architecture.md and CONTRIBUTING.md are true of the code: the diagram, its imports, and the files they name."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from itertools import combinations, pairwise
from pathlib import Path

import pytest

import cfmask
from tools import draw_architecture
from tools.diagram.imports import BASE, CORE, RUNTIME, Box, find_modules, read_graph, read_imports
from tools.diagram.layout import Link, lay_out, links_of
from tools.diagram.svg import PAGE, draw, drawn_imports

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


def test_no_modules_import_each_other_in_a_circle(imports):
    try:
        TopologicalSorter(imports).prepare()
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
        "cfmask/record.py": "from cfmask.runtime import lock\n",
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
    assert graph.boxes[CORE].modules == ("train",) and graph.boxes["cfmask/data"].modules == ("er", "plan")
    assert graph.edges == {
        (CORE, BASE): 1, (CORE, "cfmask/data"): 1, (BASE, RUNTIME): 1, ("cfmask/data", BASE): 1, ("tools", CORE): 1,
    }  # fmt: skip
    ElementTree.fromstring(draw(graph))


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_arrows_that_follow_from_others_are_left_out_and_circles_go_both_ways():
    edges = {("a", "b"): 5, ("b", "c"): 5, ("a", "c"): 5, ("c", "b"): 1, ("c", "a"): 1}
    assert links_of("abcd", edges) == [
        Link("a", "b", True, False),
        Link("a", "c", True, True),
        Link("b", "c", True, True),
    ]


def test_boxes_do_not_overlap_and_arrows_go_down():
    edges = {(a, b): 1 for a, b in combinations("abcdefgh", 2) if (ord(a) * ord(b)) % 3}
    links = links_of("abcdefghi", edges)
    widths = {name: 60.0 + 10 * i for i, name in enumerate("abcdefghi")}
    layout = lay_out(widths, links, page=900, gap=20)
    height = {name: i for i, row in enumerate(layout.layers) for name in row}
    assert all(height[link.upper] > height[link.lower] for link in links)
    for row in layout.layers:
        for left, right in pairwise(row):
            between = (widths.get(left, 0) + widths.get(right, 0)) / 2
            assert layout.x[right] - layout.x[left] >= between + 20 - 1e-6
    assert layout.layers == lay_out(widths, links, page=900, gap=20).layers, "drawn twice, it is the same"


def test_the_file_needs_nothing_else_and_nothing_lies_on_anything_else(tmp_path):
    out = tmp_path / "drawn.svg"
    assert draw_architecture.main(["--out", str(out)]) == 0
    text = out.read_text()
    assert not re.search(r"<script|<style|<image|href=", text)
    root = ElementTree.fromstring(text)
    boxes = []
    for group in root.iter(f"{SVG}g"):
        rect = group.find(f"{SVG}rect")
        assert rect is not None
        x, y, width, height = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
        assert x >= 0 and x + width <= PAGE
        boxes.append((x, y, x + width, y + height))
        for line in group.iter(f"{SVG}text"):
            assert len(line.text or "") * float(line.attrib["font-size"]) * 0.56 < width, f"{line.text} is too wide"
    assert len(boxes) == len(read_graph(REPO).boxes)
    for a, b in combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    assert max(Counter(boxes).values()) == 1
