"""Ranks that have read different things refuse to compute, on all of them, and name the rank and node that differ."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed as dist

from cfmask.agreement import check_agreement
from cfmask.errors import UserError
from made import run_ranks


def compare(rank: int, folder: Path, recipes: tuple[str, ...]) -> None:
    os.environ["SLURMD_NODENAME"] = f"n{rank}"
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 3), rank=rank, world_size=3)
    try:
        said = str(check_agreement({"the recipe": recipes[rank], "the set train": "abc"}))
    except UserError as error:
        said = str(error)
    (folder / f"{rank}.txt").write_text(said)


@pytest.mark.parametrize("recipes", [("a", "a", "a"), ("a", "a", "b"), ("a", "b", "b")])
def test_ranks_compare_what_they_have_read(tmp_path, recipes):
    run_ranks(compare, 3, tmp_path, recipes)
    said = {(tmp_path / f"{rank}.txt").read_text() for rank in range(3)}
    if len(set(recipes)) == 1:
        assert said == {"['n0', 'n1', 'n2']"}
        return
    first = recipes.index("b")
    [text] = said
    assert text.startswith(f"Ranks differ in the recipe: rank 0 on n0 has a, rank {first} on n{first} has b")
    assert ("(2 ranks differ)" in text) == (recipes.count("b") == 2) and f"--exclude n{first}" in text
