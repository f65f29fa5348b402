"""What all commands have in common: short files that nothing imports, consistent arguments, and a complete --help."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.command import CommandParser, exits_cleanly
from cfmask.runtime.files import replacing

REPO = Path(__file__).resolve().parents[1]
OTHERS = ("test", "environment")
"""Files of tools/ without a parser: test.py passes its arguments to pytest, and environment.py is not a command."""
VERBS = sorted(path.stem for path in (REPO / "tools").glob("[!_]*.py") if path.stem not in OTHERS)
COMMANDS = [
    *(f"launch.{path.stem}" for path in sorted((REPO / "launch").glob("[!_]*.py"))),
    *(f"tools.{verb}" for verb in VERBS),
]

OWN_WORDS = {
    *("--out", "--seed", "--split", "--classes", "--groups", "--images", "--source", "--precision", "--model"),
    *("--pretrained", "--allow-count-mismatch", "--dry-run", "--holdout", "--mappings"),
}
"""Flags with a help of their own in each command, such as the seed of what."""
SLURM = ("as a Slurm array", "allocation")
"""Groups of arguments that are shared as a whole."""


class _Caught(Exception):
    pass


def parser_of(command: str, monkeypatch) -> CommandParser:
    """The parser of a command, as in tools.evaluate."""

    def caught(self, *_, **__):
        raise _Caught(self)

    main = importlib.import_module(command).main
    with monkeypatch.context() as patch:
        patch.setattr(CommandParser, "parse_args", caught)
        patch.setattr(CommandParser, "parse_known_args", caught)
        with pytest.raises(_Caught) as error:
            main([])
    return error.value.args[0]


def walk(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parser and those of its subcommands, by command line."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb, below in action.choices.items():
                yield from walk(f"{name} {verb}", below)


def arguments_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    own = (argparse._HelpAction, argparse._SubParsersAction)
    return [action for action in parser._actions if not isinstance(action, own)]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_argument_and_has_an_example(command, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(command).main(["--help"])
    assert ended.value.code == 0
    file = command.replace(".", "/")
    assert re.search(rf"^    python3? {file}\.py", capsys.readouterr().out, re.MULTILINE), "no example"
    for name, parser in walk(command, parser_of(command, monkeypatch)):
        assert not parser.allow_abbrev, f"{name} accepts abbreviated flags, which break when another flag is added"
        for action in arguments_of(parser):
            what = f"{name} {'/'.join(action.option_strings) or action.metavar}"
            assert action.help and not action.help.startswith("default"), f"{what} has no help"
            assert action.nargs == 0 or action.choices or action.metavar, f"{what} has no metavar"


def test_commands_describe_a_flag_in_the_same_words(monkeypatch):
    described: dict[str, dict[tuple[str | None, str], list[str]]] = {}
    for verb in VERBS:
        for name, parser in walk(verb, parser_of(f"tools.{verb}", monkeypatch)):
            for action in arguments_of(parser):
                if action.container.title in SLURM:
                    continue
                flag = action.option_strings[0] if action.option_strings else action.metavar
                words = re.sub(r" \(default: .*\)$", "", action.help or "")
                described.setdefault(flag, {}).setdefault((action.metavar, words), []).append(name)
    assert {"MODEL", "RUN", "--shards", "--set", "--sets", "--out", "--device", "--batch-size"} <= described.keys()
    for flag, ways in described.items():
        if flag not in OWN_WORDS:
            assert len(ways) == 1, f"{flag}: {ways}"


def test_every_output_is_named_by_the_flag_out():
    """No --json, --output or --save-to."""
    for path in (REPO / "tools").glob("[!_]*.py"):
        assert not re.search(r'add_argument\(\s*"--(json|output|save\S*|dest\S*)"', path.read_text()), path.name


def test_help_imports_neither_torch_nor_matplotlib():
    """These take seconds; --help of every command takes less than one."""
    code = f"""
import contextlib, importlib, io, sys
for command in {COMMANDS}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        importlib.import_module(command).main(["--help"])
    print(command, *(name for name in ("torch", "open_clip", "matplotlib") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == COMMANDS


def refusal(command: str, words: list[str], capsys) -> str:
    """What a command prints about a command line that it refuses."""
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(command).main(words)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and not printed.out, printed.out
    return printed.err


@pytest.mark.parametrize("command", COMMANDS)
def test_misspelt_flags_and_choices_get_a_suggestion_and_no_usage_text(command, monkeypatch, capsys):
    for name, parser in list(walk(command, parser_of(command, monkeypatch))):
        subcommand = name.split()[1:]
        long = [flag for flag in parser.flags if len(flag) > 5 and not flag.startswith("--no-")]
        for flag in long[:3]:
            typo = flag[:-2] + flag[-1] + flag[-2] + "x"
            said = refusal(command, [*subcommand, typo, "1"], capsys)
            assert re.fullmatch(rf"error: There is no flag {typo}\. Did you mean --[\w-]+\?\n", said), said
        choosing = [action for action in arguments_of(parser) if action.choices and action.option_strings]
        for action in choosing[:2]:
            choice = max(map(str, action.choices), key=len)
            said = refusal(command, [*subcommand, action.option_strings[0], f"{choice}x"], capsys)
            assert "usage" not in said and said.count("\n") == 1
            assert action.option_strings[0] in said and f"'{choice}x'. Did you mean {choice}?" in said


def test_a_misspelt_required_flag_is_not_reported_as_missing(capsys):
    assert refusal("tools.evaluate", ["m", "--shard", "x", "--sets", "v2"], capsys) == (
        "error: There is no flag --shard. Did you mean --shards?\n"
    )
    assert refusal("tools.export", [], capsys).startswith("error: Missing: MODEL, --format, --out.")
    assert "Did you mean loader?" in refusal("tools.bench", ["loadr"], capsys)
    assert "Did you mean --drills?" in refusal("launch.drill", ["--drils", "requeued"], capsys)
    assert "There is no flag -p. Did you mean --partition?" in refusal("launch.submit", ["-p", "gpu"], capsys)
    assert "There is no flag -p.\n" in refusal("launch.status", ["-p", "gpu"], capsys)
    made_shards = refusal("tools.make_shards", ["foldr", "--source", "a", "--out", "b"], capsys)
    assert made_shards == "error: Unknown command: 'foldr'. Did you mean folder?\n"
    assert "There is no flag -seed. Did you mean --seed?" in refusal("launch.submit", ["-seed", "3"], capsys)


def test_git_ignores_what_commands_write_by_default(monkeypatch):
    written = set()
    for command in COMMANDS:
        for _, parser in walk(command, parser_of(command, monkeypatch)):
            for action in arguments_of(parser):
                if action.metavar not in ("DIR", "FILE"):
                    continue
                default = action.default if isinstance(action.default, Path) else None
                if default is not None and default.is_relative_to(REPO):  # a default may be absolute
                    default = default.relative_to(REPO)
                elif default is None and (shown := re.search(r"\(default: (?:\./)?([\w-]+)/", action.help or "")):
                    default = Path(shown[1])
                if default is not None and not default.is_absolute():
                    written.add(default.parts[0])
    tracked = {path.name for path in REPO.iterdir()} & {"docs", "slurm"}
    ignored = [line.strip("/") for line in (REPO / ".gitignore").read_text().splitlines()]
    assert {"runs", "reproductions", "evaluations", "drills", "demo", "gpu-report", "mask-validation"} <= written
    assert [name for name in written - tracked if not any(fnmatch(name, line) for line in ignored)] == []


def test_only_commands_are_scripts():
    """What jobs start says so, and nothing else looks as if it could be run."""
    started = {"launch/ranks/start.py", "launch/ranks/controller.py", "launch/notification/wandb_sender.py"}
    others = {"tools/benchmarks/peers/__main__.py"}  # runs in an interpreter of its own
    commands = {f"{command.replace('.', '/')}.py" for command in COMMANDS} | {"tools/test.py", "tools/environment.py"}
    for top in ("cfmask", "launch", "tools"):
        for path in (REPO / top).rglob("*.py"):
            name, text = str(path.relative_to(REPO)), path.read_text()
            if name not in commands:
                assert not text.startswith("#!") and not os.access(path, os.X_OK), f"{name} looks like a script"
                assert ('__name__ == "__main__"' in text) == (name in started | others), name


@pytest.mark.parametrize("name", ["start", "controller"])
def test_what_jobs_start_refuses_to_run_by_hand(name, tmp_path):
    bare = {key: value for key, value in os.environ.items() if not key.startswith(("SUBMITIT", "CFMASK"))}
    path = REPO / f"launch/ranks/{name}.py"
    done = subprocess.run([sys.executable, path, tmp_path], env=bare, capture_output=True, text=True)
    assert done.returncode and re.fullmatch(r"error: .*\n", done.stderr) and "launch/submit.py" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_prints_one_word(command, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(CommandParser, "parse_known_args", interrupted)
    assert importlib.import_module(command).main([]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_ends_a_command_without_a_traceback(unbuffered, tmp_path):
    RunFolder(tmp_path / "run").claim(Recipe())
    command = [sys.executable, REPO / "launch/status.py", tmp_path / "run"]
    settings = {"env": {**os.environ, "PYTHONUNBUFFERED": unbuffered}, "stderr": subprocess.PIPE, "text": True}
    read, write = os.pipe()
    os.close(read)
    head = subprocess.run(command, stdout=write, **settings)
    os.close(write)
    assert (head.returncode, head.stderr) == (141, "")
    closed = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], **settings)
    assert (closed.returncode, closed.stderr) == (0, "")
    if not unbuffered:
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, **settings)
        assert done.returncode == 2 and done.stderr == "error: The output cannot be written: No space left on device.\n"


def test_files_out_of_reach_are_errors_and_missing_ones_defects(tmp_path, capsys):
    @exits_cleanly
    def main(error):
        raise error

    assert main(PermissionError(errno.EACCES, "Permission denied", "runs/a")) == 2
    assert capsys.readouterr().err == "error: runs/a: Permission denied. Check the path.\n"
    with pytest.raises(OSError) as full, replacing(tmp_path / "results.json") as aside:
        aside.touch()
        raise OSError(errno.ENOSPC, "No space left on device")
    assert main(full.value) == 2
    free = "Free space there, or choose another folder."
    assert capsys.readouterr().err == f"error: {tmp_path}/results.json: No space left on device. {free}\n"
    for defect in (FileNotFoundError(errno.ENOENT, "No such file", "x"), OSError(errno.EIO, "I/O error"), OSError("x")):
        with pytest.raises(OSError):
            main(defect)


@pytest.mark.parametrize("folder", ["launch", "tools"])
def test_commands_are_short_and_no_module_imports_them(folder):
    others = OTHERS if folder == "tools" else ()
    commands = {path.stem: path for path in (REPO / folder).glob("*.py") if path.stem not in ("__init__", *others)}
    lengths = {name: len(path.read_text().splitlines()) for name, path in commands.items()}
    assert {name: length for name, length in lengths.items() if length > 150} == {}
    imported = re.compile(rf"^\s*(?:from {folder} import (.+)|(?:from|import) {folder}\.(\w+))", re.MULTILINE)
    for top in ("cfmask", "launch", "slurm", "tools"):
        for path in (REPO / top).rglob("*.py"):
            names = set(re.findall(r"\w+", " ".join(map(" ".join, imported.findall(path.read_text())))))
            assert not names & commands.keys(), f"{path} imports a command"
