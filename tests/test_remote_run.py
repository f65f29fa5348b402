"""A run whose shards are behind a URL is bitwise identical to one with a folder."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import made
from tools import audit


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    return made.make_materials(tmp_path_factory.mktemp("materials"))


@pytest.fixture
def url(materials) -> Iterator[str]:
    """A real server of the folder of shards."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=materials / "shards")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_runs_with_http_and_pipe_urls_are_bitwise_identical_to_one_with_a_folder(
    materials, url, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("CFMASK_CACHE", str(tmp_path / "cache"))
    common = ("--executor", "local", "--tasks-per-node", 2, "--epochs", 1, "--eval-sets", "val")
    ends = {}
    for name, shards in {
        "folder": materials / "shards",
        "http": url,
        "pipe": f"pipe:cat {materials}/shards/{{}}",
    }.items():
        run = tmp_path / name
        made.submit(*made.recipe_flags(materials, run), *common, "--shards", shards, "--loader-workers", 2)
        ends[name] = load_file(run / "model.safetensors")
        assert audit.main([str(run)]) == 0, capsys.readouterr().out
    for name in ("http", "pipe"):
        assert ends[name].keys() == ends["folder"].keys()
        assert all(torch.equal(ends[name][key], ends["folder"][key]) for key in ends["folder"])
    assert len(list((tmp_path / "cache").glob("[!.]*.tar.*"))) == 2 * 20, "both ranks shared each copy"


def test_an_unreachable_server_is_named_before_a_job_is_queued(materials, tmp_path):
    flags = made.recipe_flags(materials, tmp_path / "run")
    done = made.submit(*flags, "--shards", "http://127.0.0.1:9/shards", "--executor", "local", check=False)
    assert done.returncode == 2
    assert "http://127.0.0.1:9/shards/train/manifest.json cannot be read" in done.stderr
    assert not (tmp_path / "run").exists()


def test_cache_flags_are_refused_for_a_folder(materials, tmp_path):
    flags = made.recipe_flags(materials, tmp_path / "run")
    done = made.submit(*flags, "--cache-dir", tmp_path, "--executor", "local", check=False)
    assert done.returncode == 2 and "--cache-dir and --cache-gb would do nothing" in done.stderr
