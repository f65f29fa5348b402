"""The cluster file's shards, eval_sets and [environment] count for every command that reads sets."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

import pytest

import made
from launch.allocation.data import fill_in_data

FILE = """
shards = "data"
eval_sets = ["chosen"]
[environment]
HF_HOME = "/shared/$WHOSE/hub"
ONLY_IN_A_JOB = "$NO_SUCH_VARIABLE/x"
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """A cluster.toml in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CFMASK_CLUSTER", raising=False)
    monkeypatch.setenv("WHOSE", "lab")
    for name in ("HF_HOME", "ONLY_IN_A_JOB"):
        monkeypatch.setenv(name, "")  # so that it is restored after the test
        monkeypatch.delenv(name)
    (tmp_path / "cluster.toml").write_text(FILE)
    for name in "mn":
        made.save_tiny_model(tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "words", "place"),
    [
        ("tools.evaluate", ["m.safetensors"], "data/chosen"),
        ("tools.wise_ft", ["m.safetensors", "n.safetensors", "--sets", "val"], "data/val"),
        ("tools.soup", ["m.safetensors", "n.safetensors", "--greedy", "--holdout", "holdout"], "data/holdout"),
        ("tools.show_masks", ["m.safetensors"], "data/val"),
        ("tools.validate_masks", ["m.safetensors", "--segmentation", "x"], "data/val"),
        ("tools.segment", ["--out", "masks"], "data/train"),
        ("tools.verify_shards", [], "data"),
        ("launch.submit", ["--executor", "local"], "data/train"),
        ("launch.reproduce", ["--arch", "ViT-B-32", "--executor", "local"], "data/"),
    ],
)
def test_commands_find_the_shards_of_the_cluster_file(command, words, place, cluster, monkeypatch, capsys):
    monkeypatch.setattr("cfmask.data.segmentation.open_masks", lambda *_: None)  # they are opened before the set
    main = importlib.import_module(command).main
    assert main(words) == 2
    assert str(cluster / place) in capsys.readouterr().err
    assert os.environ["HF_HOME"] == "/shared/lab/hub" and "ONLY_IN_A_JOB" not in os.environ
    if command.startswith("tools.") and command != "tools.verify_shards":
        assert main([*words, "--shards", "elsewhere"]) == 2, "a flag overrides the file"
        assert "elsewhere" in capsys.readouterr().err


def test_data_that_nobody_names_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("CFMASK_CLUSTER", "")
    arguments = argparse.Namespace(shards=None, sets=[], cluster=None)
    with pytest.raises(ValueError, match=r"--shards is missing: .*A cluster file \(slurm/cluster.toml\) can set it"):
        fill_in_data(arguments)
    arguments.shards = "x"
    with pytest.raises(ValueError, match="--sets is missing: folders in x"):
        fill_in_data(arguments, sets=True)


def test_variables_of_the_shell_override_those_of_the_cluster_file(cluster, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/mine")
    arguments = argparse.Namespace(shards=None, sets=["v2"], cluster=None)
    fill_in_data(arguments, sets=True)
    assert os.environ["HF_HOME"] == "/mine"
    assert (arguments.shards, arguments.sets) == (str(cluster / "data"), ["v2"])
