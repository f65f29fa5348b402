"""Every command line in README, docs and the commands' own help is accepted by the command's argument parser."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from cfmask.runtime.command import CommandParser

REPO = Path(__file__).resolve().parents[1]

PLACEHOLDERS = {"ROW": "ft", "N": "2"}
"""Words in documents that stand for one of several choices, or for a number."""
_PROGRAM = r"(?:\w+=\S+ )*(?:python3? )?(?:launch|tools|slurm)/[\w/]+\.py"
_INLINE = re.compile(rf"`({_PROGRAM} [^`]*)`")
_LINE = re.compile(rf"^ {{4}}(?:\$ )?({_PROGRAM}.*)$", re.MULTILINE)


class _Parsed(Exception):
    pass


def commands_of(document: Path) -> list[str]:
    """The command lines in a document, without comments; of a Python file, in its docstring."""
    text = document.read_text()
    if document.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
        lines = _LINE.findall(text)
        # What a line does is said in a column of its own.
        columns = {gap.end() for line in lines if (gap := re.search(r" {2,}(?=[^ ])", line))}
        found = [line[: min((c for c in columns if line[c - 1 : c] == " "), default=None)].rstrip() for line in lines]
    else:
        text = re.sub(r" *\\\n +", " ", text)
        found = [re.split(r" +# ", line)[0] for line in _LINE.findall(text)]
        found += [" ".join(each.split()) for each in _INLINE.findall(text)]
    return list(dict.fromkeys(found))


DOCUMENTS = [
    *(REPO / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((REPO / "docs").glob("*.md")),
    *sorted((REPO / "slurm").glob("*.md")),
    *sorted(path for folder in ("launch", "tools", "slurm") for path in (REPO / folder).glob("*.py")),
]
COMMANDS = [(path.relative_to(REPO), command) for path in DOCUMENTS for command in commands_of(path)]


def words_of(command: str) -> tuple[str, list[str]]:
    """The program and its arguments: of alternatives (a|b), the first."""
    words = [word for word in shlex.split(command) if not re.match(r"\w+=", word) and word not in ("python", "python3")]
    arguments = []
    for before, word in pairwise(words):
        if word.strip("[]") != "…" or before.startswith("--"):
            arguments.append(word.split("|")[0].strip("[]"))
    return words[0], [PLACEHOLDERS.get(word, word) for word in arguments]


def test_documents_have_commands():
    documents = {str(path) for path, _ in COMMANDS}
    assert {"README.md", "CONTRIBUTING.md", "docs/benchmarks.md", "tools/evaluate.py"} <= documents
    assert len(COMMANDS) > 100


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=[f"{path}: {command}" for path, command in COMMANDS])
def test_command_lines_are_accepted(document, command, monkeypatch):
    program, arguments = words_of(command)
    if program == "tools/test.py":  # hands its arguments to pytest
        assert all((REPO / word).exists() for word in arguments if word.startswith("tests/"))
        return

    def parsing(parse_args):
        def parse(self, args=None, namespace=None):
            parse_args(self, args, namespace)
            raise _Parsed

        return parse

    def error(self, message):
        # A fragment in a sentence may leave out what the command requires.
        if message.startswith("the following arguments are required"):
            raise _Parsed
        pytest.fail(f"{document}: {command}\n{message}")

    for kind in (argparse.ArgumentParser, CommandParser):  # slurm/ works without cfmask, and has the former
        monkeypatch.setattr(kind, "parse_args", parsing(kind.parse_args))
        monkeypatch.setattr(kind, "error", error)
    if program.startswith("slurm/"):  # these run outside the environment, and import the files beside them
        monkeypatch.syspath_prepend(REPO / "slurm")
    main = importlib.import_module(program.removesuffix(".py").replace("/", ".")).main
    try:
        assert main(arguments) == 0  # drill.py --list
    except SystemExit as ended:
        assert ended.code == 0  # --help
    except _Parsed:
        pass


# --- messages that documents quote ------------------------------------------------------------------------------------


_OF_OTHERS = (
    "error: No module named 'cfmask'",
    "Requested node configuration is not available",
    "sbatch --test-only",
)
"""Quoted, and printed by Python or Slurm."""


def _texts(folder: Path) -> list[str]:
    """All strings of the modules in a folder but docstrings; a value in an f-string is "…"."""
    found = []
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text())
        others = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        others |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in others:
                found.append(node.value.replace("{}", "…"))
    return found


def test_symptoms_in_code_type_are_printed_by_the_code():
    """Each part between "…" of a quoted symptom is in a string of the code, in order."""
    texts = [text for folder in ("cfmask", "launch", "tools") for text in _texts(REPO / folder)]
    document = (REPO / "docs/troubleshooting.md").read_text()
    rows = [line.split(" | ")[0] for line in document.splitlines() if line.startswith("| ")]
    quoted = [words for row in rows for words in re.findall(r"`([^`]+)`", row) if " " in words]
    assert len(quoted) > 30
    for words in quoted:
        if words in _OF_OTHERS or re.match(_PROGRAM, words):
            continue
        parts = [re.escape(part.strip()) for part in words.split("…") if part.strip()]
        pattern = re.compile(".*?".join(parts), re.DOTALL)
        assert any(pattern.search(text) for text in texts), f"no message has {words!r}"
