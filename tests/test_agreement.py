"""If ranks have read different data, all of them refuse to train and name the rank that differs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import made

RANK = """
import sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
from cfmask.runtime.agreement import check_agreement
from cfmask.errors import UserError
rank, recipe = int(sys.argv[3]), sys.argv[4]
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 3), rank=rank, world_size=3)
try:
    print(check_agreement({"the recipe": recipe, "the set train": "abc"}))
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("recipes", [("a", "a", "a"), ("a", "a", "b"), ("a", "b", "b")])
def test_ranks_that_differ_are_refused(tmp_path, recipes):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(made.REPO), str(tmp_path / "store"), str(rank), recipe],
            env={**os.environ, "SLURMD_NODENAME": f"n{rank}", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, recipe in enumerate(recipes)
    ]
    said = {rank.communicate(timeout=300)[0].strip() for rank in ranks}
    if len(set(recipes)) == 1:
        assert said == {"['n0', 'n1', 'n2']"}
        return
    first = recipes.index("b")
    [text] = said
    assert text.startswith(f"Ranks differ in the recipe: rank 0 on n0 has a, rank {first} on n{first} has b")
    assert ("(2 ranks differ)" in text) == (recipes.count("b") == 2) and f"--exclude n{first}" in text
