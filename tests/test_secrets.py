"""Tokens in URLs and commands reach no error, output, process list, or file that others can read."""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cfmask.data import remote
from cfmask.errors import UserError
from cfmask.evaluation_spec import Evaluation
from cfmask.recipe import Data, Recipe
from cfmask.runs import RunFolder
from cfmask.secrets import has_secrets, mask_secrets
from launch.allocation.resolve import Allocation
from launch.ranks import supervisor
from launch.submission import submit as submission
from launch.submission import training
from launch.submission.planning import PlannedJob
from launch.submission.summary import UNKNOWN

SECRET = "s3cr3t"
WITH_SECRETS = [
    "https://user:s3cr3t@host/shards",
    "https://s3cr3t@host/shards",
    "http://host/shards?token=s3cr3t",
    "http://host/shards?s3cr3t",
    "https://account.blob.core.windows.net/shards?sv=2022&sig=s3cr3t",
    "https://bucket.s3.amazonaws.com/x?X-Amz-Credential=s3cr3t&X-Amz-Signature=s3cr3t",
    "pipe:curl -sf -H 'Authorization: Bearer s3cr3t' https://host/{}",
    'pipe:curl -sf -H "Authorization: Bearer s3cr3t" https://host/{}',
    "pipe:curl -sf -H X-Auth-Token:s3cr3t https://host/{}",
    "pipe:curl --header 'PRIVATE-TOKEN: s3cr3t, s3cr3t' https://host/{}",
    "pipe:curl -u me:s3cr3t https://host/{}",
    "pipe:curl --user=me:s3cr3t https://host/{}",
    "pipe:curl --oauth2-bearer s3cr3t https://host/{}",
    "pipe:AWS_SECRET_ACCESS_KEY=s3cr3t aws s3 cp s3://bucket/{} -",
    "pipe:HF_TOKEN='s3cr3t' tool {}",
    "pipe:tool --api-key s3cr3t {}",
    "pipe:tool --password=s3cr3t {}",
    "pipe:azcopy cp 'https://a.blob.core.windows.net/x/{}?sig=s3cr3t' -",
]
WITHOUT = [
    "/datasets/imagenet/shards",
    "https://host/shards",
    "pipe:aws s3 cp s3://bucket/shards/{} -",
    "pipe:ssh host cat /data/{}",
    "The key 'a: b' of C:/x is no token: see https://host/docs.",
]


@pytest.mark.parametrize("text", WITH_SECRETS)
def test_only_secrets_are_masked(text):
    for shown in (text, json.dumps({"shards": text}), f"{text} cannot be read: it is not there. Check the address."):
        masked = mask_secrets(shown)
        assert SECRET not in masked and "***" in masked and has_secrets(shown)
        assert masked.startswith(shown[:8]) and mask_secrets(masked) == masked
    assert json.loads(mask_secrets(json.dumps({"a": text, "b": 1})))["b"] == 1


@pytest.mark.parametrize("text", WITHOUT)
def test_text_without_secrets_is_unchanged(text):
    assert mask_secrets(text) == text and not has_secrets(text)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/x.tar?token=s3cr3t", "pipe:curl -H 'X-Token: s3cr3t' no-such-scheme://x"]
)
def test_errors_of_transfers_are_masked(url):
    with pytest.raises(UserError) as raised:
        remote.read(url, attempts=1)
    assert SECRET not in str(raised.value) and "***" in str(raised.value)


@pytest.fixture
def slow_server() -> Iterator[str]:
    """Base URL of a server that answers "content" after half a second."""

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(0.5)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"content of {self.path}".encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def command_lines() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found


def test_the_process_list_does_not_show_a_url(slow_server):
    url = f"{slow_server}/a%20b.tar?token=s3cr3t&quote=%22\\"
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(remote.read(url)))
    reader.start()
    seen = []
    while reader.is_alive():
        seen += [line for line in command_lines() if "curl" in line]
    reader.join()
    assert got == [b"content of /a%20b.tar?token=s3cr3t&quote=%22\\"]
    assert seen and not [line for line in seen if SECRET in line]


@pytest.mark.parametrize("work", [Recipe(data=Data(shards=WITH_SECRETS[2])), Evaluation(shards=WITH_SECRETS[0])])
def test_a_recipe_with_a_secret_is_private(tmp_path, work):
    run = RunFolder(tmp_path / "x")
    run.claim(work)
    [path] = run.root.glob("*.json")
    assert path.stat().st_mode & 0o077 == 0 and run.work() == work
    if isinstance(work, Recipe):
        run.record_recipe(work)
        assert path.stat().st_mode & 0o077 == 0
        other = replace(work, data=replace(work.data, shards="https://host/other?token=s3cr3t"))
        with pytest.raises(UserError) as refused:
            run.claim(other)
        assert SECRET not in str(refused.value)
    public = RunFolder(tmp_path / "public")
    public.claim(Recipe(data=Data(shards="/shards")))
    assert (public.root / "recipe.json").stat().st_mode & 0o044


def test_submit_prints_no_secret(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "check", lambda *_: None)
    monkeypatch.setattr(training, "_describe", lambda *_: [])  # would read the shards
    monkeypatch.setenv("CFMASK_CLUSTER", "")
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    training.add_submit_arguments(parser)
    flags = ["--shards", WITH_SECRETS[4], "--executor", "local", "--dry-run", "--seeds", "0", "1"]
    assert training.submit(parser.parse_args(flags)) == 0
    said = "".join(capsys.readouterr())
    assert SECRET not in said and "sig=***" in said


def test_failure_reports_show_no_secret(tmp_path, monkeypatch):
    """Errors of libraries are not masked by themselves."""
    local = {"EXECUTOR": "local", "LOCAL_JOB_ID": "7", "LOCAL_GLOBALID": "0", "LOCAL_LOCALID": "0", "LOCAL_NTASKS": "1"}
    for name, value in {**local, "LOCAL_NODEID": "0", "LOCAL_JOB_NUM_NODES": "1"}.items():
        monkeypatch.setenv(f"SUBMITIT_{name}", value)
    try:
        raise RuntimeError(f"no route to {WITH_SECRETS[0]}")
    except RuntimeError as error:
        supervisor.write_failure(tmp_path, error)
    [report] = (tmp_path / "jobs/failures").iterdir()
    assert SECRET not in report.read_text() and "no route to https://***@host/shards" in report.read_text()


def test_a_dry_run_shows_no_secret_of_the_setup(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(submission, "ask_slurm", lambda text, _: "would start" if SECRET in text else "")
    setup = (f"pip install --index-url {WITH_SECRETS[0]} x",)
    allocation = Allocation("slurm", 1, 0, "", 1, 1, 10, python="python3", setup=setup)
    submission.dry_run([PlannedJob(RunFolder(tmp_path / "x"), Recipe())], allocation, UNKNOWN)
    said = capsys.readouterr().out
    assert SECRET not in said and "--index-url https://***@host/shards x" in said and "would start" in said
