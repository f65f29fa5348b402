"""Code and documents use the words of PyTorch, Slurm and the paper, in plain present-day English.

The list holds words and phrases of an earlier dialect of this code base, with what to write instead. Words that have
another use here are not on it.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
BANNED = {
    r"\bchief\b": "rank 0, is_main_process",
    r"\b_?knock\w*": "probe",
    r"\blast[_ ]words\b": "failure report",
    r"\bspoil(t|ed|s)?\b": "corrupt, damaged",
    r"\bto the bit\b": "bitwise identical",
    r"\b(go|goes|going) on with\b": "resume, continue",
    r"\bwhatever (happens|becomes|became)\b": "name the cases",
    r"\bwhat (becomes|became|comes|came) of\b": "name the result",
    r"\blearning rate's way\b": "learning-rate schedule",
    r"\bstand[-_]ins?\b": "replacement",
    r"\bvouch\w*": "committed, verified",
    r"\b(hear|hears|heard) of\b": "is notified of, receives",
    r"\bwithout a word\b": "silently, without a report",
    r"\bhow (it stands|things stand)\b": "state",
    r"\b(is|are|was) told\b": "reads, is notified, gets",
    r"\b(anew|thereupon|wherein|whereof|thereof)\b": "again; rewrite the sentence",
    r"\b(camera_of|take_up|_Tap|_Door)\b": "build_cam, prepare_run_dir, CotangentHook, the rendezvous server",
}


def banned_words(text: str) -> list[str]:
    """Each banned word in a text, with its line and what to write instead."""
    return [
        f"{number}: {match.group()!r}: write {instead}"
        for number, line in enumerate(text.splitlines(), 1)
        for pattern, instead in BANNED.items()
        if (match := re.search(pattern, line))
    ]


def test_tracked_files_have_no_banned_words():
    listed = subprocess.run(["git", "ls-files", "*.py", "*.md"], cwd=REPO, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [REPO / name for name in listed.stdout.splitlines() if not name.endswith("test_words.py")]
    found = [
        f"{path.relative_to(REPO)}:{each}" for path in files if path.exists() for each in banned_words(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_banned_words_are_found():
    assert banned_words("a\nThe chief is told") == [
        "2: 'chief': write rank 0, is_main_process",
        "2: 'is told': write reads, is notified, gets",
    ]
    assert banned_words("mischief, a stand in the way, being told apart") == []
