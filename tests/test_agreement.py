"""If ranks have read different data, all of them refuse to train and name the rank that differs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CASES = ["aaa", "aab", "abb"]
"""Recipes of the three ranks."""
RANK = """
import sys
import torch.distributed as dist
from cfmask.runtime.agreement import check_agreement
from cfmask.errors import UserError
from cfmask.runtime.process import exit_without_finalization
rank, recipes = int(sys.argv[2]), sys.argv[3:]
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 3), rank=rank, world_size=3)
for recipe in recipes:
    try:
        print(check_agreement({"the recipe": recipe, "the set train": "abc"}))
    except UserError as error:
        print(error)
exit_without_finalization(0)  # as ranks of a job do
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> list[set[str]]:
    """What the ranks print, by case."""
    store = str(tmp_path_factory.mktemp("agreement") / "store")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, store, str(rank), *(case[rank] for case in CASES)],
            env={**os.environ, "SLURMD_NODENAME": f"n{rank}", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    lines = [rank.communicate(timeout=300)[0].splitlines() for rank in ranks]
    return [set(of_case) for of_case in zip(*lines, strict=True)]


def test_ranks_that_agree_return_their_nodes(printed):
    assert printed[CASES.index("aaa")] == {"['n0', 'n1', 'n2']"}


@pytest.mark.parametrize("case", ["aab", "abb"])
def test_ranks_that_differ_are_refused(printed, case):
    [text] = printed[CASES.index(case)]
    first = case.index("b")
    assert text.startswith(f"Ranks differ in the recipe: rank 0 on n0 has a, rank {first} on n{first} has b")
    assert ("(2 ranks differ)" in text) == (case.count("b") == 2) and f"--exclude n{first}" in text
