"""The whole demo. It takes minutes, so it is marked slow (python3 tools/test.py --slow tests/test_demo.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from made import REPO

SHIFTED = ("shift-random", "shift-swapped", "shift-style")


@pytest.mark.slow
def test_the_demo_shows_the_effect_and_a_second_run_reuses_everything(tmp_path):
    command = [sys.executable, str(REPO / "tools/demo.py"), "--out", str(tmp_path / "demo")]
    subprocess.run(command, check=True, env={**os.environ, "CFMASK_VENV": sys.prefix})
    found = {x["row"]: x for x in json.loads((tmp_path / "demo/results.json").read_text())}

    def shifted(row: str) -> float:
        return sum(found[row][name] for name in SHIFTED) / len(SHIFTED)

    assert found["FT"]["val"] > found["zero-shot"]["val"] + 5, "fine-tuning improves accuracy in distribution"
    assert shifted("FT") < shifted("zero-shot") - 5, "and reduces it out of distribution"
    for row in ("object-mask", "context-mask"):
        assert shifted(row) > shifted("FT") + 5, "the method reduces it clearly less"
        assert found[row]["val"] > found["FT"]["val"] - 3, "with about the same accuracy in distribution"
    assert (tmp_path / "demo/masks.png").stat().st_size > 50_000

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*.safetensors")}
    subprocess.run(command, check=True, env={**os.environ, "CFMASK_VENV": sys.prefix})
    assert before == {path: path.stat().st_mtime_ns for path in before}
