"""A minimal W&B server, for wandb to send and resume a history, and a reader of wandb's offline files."""

from __future__ import annotations

import gzip
import json
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = 40 * "a"
"""An API key that wandb accepts."""


@dataclass
class Run:
    """The state of a run on the server."""

    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        return [line["_step"] for line in self.history]

    def resume_status(self) -> dict[str, Any]:
        return {
            **{"id": "id", "name": "name", "displayName": "name", "tags": self.tags, "notes": None},
            **{"logLineCount": 0, "eventsLineCount": 0, "historyLineCount": len(self.history)},
            "historyTail": json.dumps([json.dumps(self.history[-1])] if self.history else []),
            **{"eventsTail": "[]", "summaryMetrics": json.dumps(self.summary), "config": json.dumps(self.config)},
            "wandbConfig": json.dumps({"t": {"value": 1}}),
        }


@contextmanager
def serving() -> Iterator[tuple[str, dict[str, Run]]]:
    """The server's address, and its runs by id."""
    runs: dict[str, Run] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path == "/graphql":
                asked = json.loads(body)
                self.answer({"data": graphql(asked.get("operationName"), asked["variables"])})
                return
            if self.path.endswith("/file_stream"):
                run = runs[self.path.split("/")[-2]]
                for name, chunk in json.loads(body).get("files", {}).items():
                    lines = [json.loads(line) for line in chunk["content"]]
                    if name == "wandb-history.jsonl":
                        run.history[chunk["offset"] :] = lines
                    elif name == "wandb-summary.json":
                        run.summary = lines[-1]
            self.answer({})

        do_PUT = do_POST

        def answer(self, found: dict[str, Any]) -> None:
            data = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def graphql(name: str, given: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "lab"}}
        if name == "RunResumeStatus":
            found = runs.get(given["name"])
            return {"model": {**project, "bucket": found.resume_status() if found else None}}
        if name == "UpsertBucket":
            run = runs.setdefault(given["name"], Run())
            run.config = json.loads(given.get("config") or "null") or run.config
            run.tags = given.get("tags") or run.tags
            bucket = {"id": "id", "name": given["name"], "displayName": "name", "config": json.dumps(run.config)}
            return {"upsertBucket": {"bucket": {**bucket, "project": project, "historyLineCount": len(run.history)}}}
        if name == "CreateRunFiles":
            files = [{"name": each, "uploadUrl": f"{address}/upload"} for each in given["files"]]
            return {"createRunFiles": {"runID": "id", "uploadHeaders": [], "files": files}}
        return {}

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # a client that was killed

    server = Server(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address, runs
    finally:
        server.shutdown()
        server.server_close()


# --- offline ----------------------------------------------------------------------------------------------------------


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B", path
    at, parts = 7, b""
    while at + 7 <= len(data):
        if (left := (1 << 15) - at % (1 << 15)) < 7:  # too short for another header: the block ends here
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(parts)
            parts = b""


def offline_run(folder: Path) -> tuple[str, Run]:
    """The id and the state of the run in a folder of wandb's offline mode."""
    [path] = folder.glob("*.wandb")
    run, id = Run(), ""
    for record in records(path):
        if record.HasField("run"):
            id, run.tags = record.run.run_id, list(record.run.tags)
            run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.HasField("history"):
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            run.history.append({"_step": record.history.step.num, **values})
        for item in record.summary.update:
            run.summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        for item in record.config.update:
            run.config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return id, run
