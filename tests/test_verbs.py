"""What all of tools/ have in common: a model, a set and an output are named in one way, and --help says how."""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "tools"))  # as for who runs a verb: demo.py imports the file beside it

# test.py hands its arguments to pytest, and has nothing to parse them with.
VERBS = sorted(path.stem for path in (REPO / "tools").glob("[!_]*.py") if path.stem != "test")
HEAVY = ("audit", "export", "segment", "show_masks", "validate_masks")
"""Made of torch. The others' --help comes at once: torch and open_clip take seconds to import."""

OWN_WORDS = {
    *("--out", "--seed", "--split", "--classes", "--groups", "--images", "--source", "--precision", "--model"),
    *("--pretrained", "--allow-count-mismatch", "--dry-run", "--holdout", "--mappings"),
}
"""Flags of one name whose help has to say what of the verb they are: of what the seed is, say."""
SLURM = ("as a Slurm array", "allocation")
"""Groups of arguments that are shared as a whole: those of a task of an array, and those of a job of many ranks."""


class _Caught(Exception):
    pass


def parser_of(verb: str, monkeypatch) -> argparse.ArgumentParser:
    """The parser that a verb's main makes."""

    def caught(self, *_, **__):
        raise _Caught(self)

    main = importlib.import_module(f"tools.{verb}").main
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", caught)
        with pytest.raises(_Caught) as error:
            main([])
    return error.value.args[0]


def walk(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parser, and those of its verbs, by what is typed."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb, below in action.choices.items():
                yield from walk(f"{name} {verb}", below)


def arguments_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    own = (argparse._HelpAction, argparse._SubParsersAction)
    return [action for action in parser._actions if not isinstance(action, own)]


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_argument_and_has_an_example(verb, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"tools.{verb}").main(["--help"])
    assert ended.value.code == 0
    assert re.search(rf"^    python3? tools/{verb}\.py", capsys.readouterr().out, re.MULTILINE), "no example"
    for name, parser in walk(verb, parser_of(verb, monkeypatch)):
        assert not parser.allow_abbrev, f"{name} takes --c for --count, until there is another flag with a c"
        for action in arguments_of(parser):
            what = f"{name} {'/'.join(action.option_strings) or action.metavar}"
            assert action.help and not action.help.startswith("default"), f"{what} does not say what it is"
            assert action.nargs == 0 or action.choices or action.metavar, f"{what} does not say what it takes"


def test_arguments_that_verbs_share_are_said_in_one_way(monkeypatch):
    said: dict[str, dict[tuple[str | None, str], list[str]]] = {}
    for verb in VERBS:
        for name, parser in walk(verb, parser_of(verb, monkeypatch)):
            for action in arguments_of(parser):
                if action.container.title in SLURM:
                    continue
                flag = action.option_strings[0] if action.option_strings else action.metavar
                words = re.sub(r" \(default: .*\)$", "", action.help or "")
                said.setdefault(flag, {}).setdefault((action.metavar, words), []).append(name)
    assert {"MODEL", "RUN", "--shards", "--set", "--sets", "--out", "--device", "--batch-size"} <= said.keys()
    for flag, ways in said.items():
        if flag not in OWN_WORDS:
            assert len(ways) == 1, f"{flag}: {ways}"


def test_what_is_written_is_called_out():
    """One flag for it, whatever it is: --json, --output, --save-to are not to be remembered."""
    for path in (REPO / "tools").glob("[!_]*.py"):
        assert not re.search(r'add_argument\(\s*"--(json|output|save\S*|dest\S*)"', path.read_text()), path.name


def test_help_of_what_needs_no_torch_needs_none():
    light = [verb for verb in VERBS if verb not in HEAVY]
    code = f"""
import contextlib, importlib, io, sys
sys.path.insert(0, "tools")
for verb in {light}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        importlib.import_module("tools." + verb).main(["--help"])
    print(verb, "torch" in sys.modules or "open_clip" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == [f"{verb} False" for verb in light]


@pytest.mark.parametrize("verb", VERBS)
def test_ctrl_c_is_said_in_a_word(verb, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", interrupted)
    assert importlib.import_module(f"tools.{verb}").main([]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_commands_of_launch_are_thin_and_no_module_imports_them():
    commands = {path.stem: path for path in (REPO / "launch").glob("[!_]*.py")}
    lengths = {name: len(path.read_text().splitlines()) for name, path in commands.items()}
    assert {name: length for name, length in lengths.items() if length > 150} == {}
    imported = re.compile(r"^\s*(?:from launch import (.+)|(?:from|import) launch\.(\w+))", re.MULTILINE)
    for folder in ("cfmask", "launch", "slurm", "tools"):
        for path in (REPO / folder).rglob("*.py"):
            names = set(re.findall(r"\w+", " ".join(map(" ".join, imported.findall(path.read_text())))))
            assert not names & commands.keys(), f"{path} imports a command"
