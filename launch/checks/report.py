"""What each rank of doctor.py's probe reports, as a JSON file in the probe's folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cfmask.runtime.files import write_atomically


@dataclass
class ProbeReport:
    """What a rank has found. A field keeps its default if the rank ended before it could set it."""

    rank: int
    node: str
    stage: str = "inspecting the node"
    """The last stage that the rank began; "done" at the end."""
    failed: str = ""
    """The exception that ended the rank."""
    python: str = ""
    executable: str = ""
    packages: dict[str, str | None] = field(default_factory=dict)
    """Versions by package; None: not installed."""
    import_error: str = ""
    import_s: float | None = None
    usable: list[int] = field(default_factory=list)
    """Ids of the cores that the rank may run on."""
    quota: float | None = None
    """CPU time that the control group allows, in cores; None: no quota."""
    memory: int | None = None
    """Bytes that the control group allows the job on this node; None: no limit."""
    gpus: list[dict[str, Any]] = field(default_factory=list)
    """The GPUs that the rank sees."""
    gpu: str = ""
    """The UUID of the rank's own GPU."""
    shared_error: str = ""
    """Why the shared folder cannot be written."""
    file_system: str = ""
    """The type of the shared folder's file system."""
    free: int | None = None
    """Free bytes in the shared folder."""
    clock: list[float] = field(default_factory=list)
    """The bounds of (file system's clock - the node's), in seconds."""
    missing: list[str] = field(default_factory=list)
    """The needed paths that cannot be read."""
    cache: str = ""
    """The cache folder for remote shards."""
    cache_free: int | None = None
    cache_error: str = ""
    offset: list[float] = field(default_factory=list)
    """The bounds of (the node's clock - rank 0's node's), in seconds."""
    appears: float | None = None
    """Seconds until a file that another node created was visible; inf: it was not."""
    replaced: float | None = None
    """Seconds until a file that another node replaced was visible; inf: it was not."""
    met_s: float | None = None
    """Seconds that the process group took to form."""
    link: list[str] = field(default_factory=list)
    """The address of rank 0, and the local interface that leads there."""
    backend: str = ""
    right: bool | None = None
    """Whether the all-reduce gave the right sum."""
    seconds: float | None = None
    """Seconds that the all-reduce took."""
    transport: str = ""
    """What NCCL logs about its network."""
    infiniband: list[str] = field(default_factory=list)
    """The node's InfiniBand devices."""

    def begin(self, stage: str, folder: Path) -> None:
        """Set the stage, and write the report: if the rank hangs or dies, the file tells where."""
        self.stage = stage
        self.write(folder)

    def write(self, folder: Path) -> None:
        write_atomically(folder / f"report-{self.rank}.json", json.dumps(asdict(self)))


def read_reports(folder: Path) -> list[ProbeReport]:
    """The reports in a probe's folder, by rank."""
    known = {each.name for each in fields(ProbeReport)}
    found = []
    for path in folder.glob("report-*.json"):
        content = json.loads(path.read_text())
        found.append(ProbeReport(**{name: value for name, value in content.items() if name in known}))
    return sorted(found, key=lambda report: report.rank)
