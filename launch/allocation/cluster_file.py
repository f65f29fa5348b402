"""The cluster file: what a lab says once about its cluster, so that `submit.py --nodes 2` is enough.

    nodes = 2                                # a key is a flag of submit.py, with _ for -; flags win
    partition = "gpu"
    shards = "/datasets/imagenet/shards"

    [environment]                            # tables come last
    HF_HOME = "/shared/huggingface"

`slurm/cluster.toml` is the template, with every key.
"""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from cfmask.errors import UserError
from launch.allocation.settings import FILE_KEYS, TABLE, TEXT, TEXT_OR_COUNT, TEXTS

VARIABLE = "CFMASK_CLUSTER"
PLACES = (Path("cluster.toml"), Path("~/.config/cfmask/cluster.toml"))

# Keys that are no flags.
OWN_KEYS = {
    "setup": TEXTS,
    "srun_args": TEXTS,
    "python": TEXT,
    "environment": TABLE,
    "container": TABLE,
    "sbatch": TABLE,
}
_CONTAINER_KEYS = {"image": TEXT, "mounts": TEXTS}

_GPUS = "one of the keys gpus_per_node, gres, gpus_per_task and exclusive asks for GPUs"
_OURS = "cfmask decides about it"

# Options of sbatch that are set otherwise, and how.
_PLACES_OF_OPTIONS = {
    **{name: f"it is the key {name}" for name in ("account", "constraint", "exclude", "nodes", "partition", "qos")},
    **{name: f"it is the key {name.replace('-', '_')}" for name in ("cpus-per-task", "gpus-per-node", "gpus-per-task")},
    "time": "it is the key time",
    "exclusive": "it is the key exclusive, with the number of GPUs of a node",
    "mem": "it is the key memory",
    "ntasks-per-node": "it is the key tasks_per_node",
    "tasks-per-node": "it is the key tasks_per_node",
    "dependency": "it is submit.py's flag --dependency",
    "cpus-per-gpu": "it is the key cpus_per_task; a rank has one GPU",
    **{name: _GPUS for name in ("gpus", "gpus-per-socket")},
    **{
        name: "a node has as many tasks as GPUs, or tasks_per_node"
        for name in ("ntasks", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-socket")
    },
    **{
        name: _OURS
        for name in ("array", "error", "export", "export-file", "job-name")
        + ("no-requeue", "open-mode", "output", "parsable", "requeue", "signal", "test-only", "wait", "wrap")
    },
}
_ALSO_OPTIONS = ("export-file", "mem-bind", "mem-per-cpu", "mem-per-gpu", "time-min", "wait-all-nodes")
"""Options of sbatch whose names begin as another one's do."""


@dataclass(frozen=True)
class ClusterFile:
    """values: by key, of the type that the key asks for, tables left out. path: None if there is no file."""

    path: Path | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    image: str | None = None
    mounts: tuple[str, ...] = ()
    sbatch: Mapping[str, Any] = field(default_factory=dict)


def find_cluster_file(given: Path | None) -> Path | None:
    """The file to read: the given one, $CFMASK_CLUSTER (empty: none), or the first of PLACES that is there.

    Raises:
        UserError: one that is named is not there.
    """
    named = os.environ.get(VARIABLE)
    if given is None and named == "":
        return None
    if given is None and named is None:
        return next((place.expanduser() for place in PLACES if place.expanduser().is_file()), None)
    path = given if given is not None else Path(str(named)).expanduser()
    if not path.is_file():
        by = "--cluster" if given is not None else f"${VARIABLE}"
        raise UserError(f"The cluster file {path}, named by {by}, is not there.")
    return path


def load_cluster_file(given: Path | None) -> ClusterFile:
    """The one that --cluster names, or that is found; prints which.

    Raises:
        UserError: it cannot be used.
    """
    path = find_cluster_file(given)
    if path is None:
        return ClusterFile()
    print(f"cluster file: {path}", file=sys.stderr)
    return read_cluster_file(path)


def read_cluster_file(path: Path) -> ClusterFile:
    """Read it, and refuse what would do nothing.

    Raises:
        UserError: it is no TOML, or has an unknown key or a value of another type; names the file, and line or key.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"The cluster file {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"The cluster file {path} is not TOML: {error}. Strings go in quotes, lists in [].") from None
    known = {**FILE_KEYS, **OWN_KEYS}

    def refuse(what: str) -> UserError:
        return UserError(f"The cluster file {path}: {what}")

    _check(content, known, "", refuse)
    environment = {name: str(value) for name, value in content.get("environment", {}).items()}
    for name, value in content.get("environment", {}).items():
        if name in known:
            raise refuse(f"{name} stands under [environment], and is a key: move it above the first [table].")
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or not _is_a(value, TEXT_OR_COUNT):
            raise refuse(f"[environment] {name} has to be the name of a variable, with a string or a whole number.")
    if complaint := _syntax_error(content.get("setup", ())):
        raise refuse(f"setup has to be whole commands of bash, which says: {complaint}")
    container = content.get("container", {})
    _check(container, _CONTAINER_KEYS, "container.", refuse)
    if container and not container.get("image"):
        raise refuse("[container] needs an image.")
    for mount in container.get("mounts", ()):
        if not re.fullmatch(r"/[^:,]*:/[^,]*", mount):
            raise refuse(f"container.mounts has {mount!r}; a mount is /FROM:/TO, both absolute, without commas.")
    sbatch = content.get("sbatch", {})
    for name, value in sbatch.items():
        if place := _place_of(name.replace("_", "-")):
            raise refuse(f"[sbatch] {name} does not stand here: {place}.")
        if name == "gres" and any(re.match(r"(gres/)?gpu\b", part.strip()) for part in str(value).split(",")):
            raise refuse(f"[sbatch] gres asks for GPUs: {_GPUS}. Other resources may stay here.")
        if not (value is True or _is_a(value, TEXT_OR_COUNT)):
            raise refuse(f"[sbatch] {name} has to be a string, a whole number, or true for an option without a value.")
        if re.search(r"\\|[^\S ]", str(value)):
            raise refuse(f"[sbatch] {name} has a backslash or line break in it, which sbatch does not keep: {value!r}.")
    return ClusterFile(
        path=path,
        values={key: value for key, value in content.items() if not isinstance(value, dict)},
        environment=environment,
        image=container.get("image"),
        mounts=tuple(container.get("mounts", ())),
        sbatch=sbatch,
    )


def _place_of(option: str) -> str | None:
    """How an option of sbatch is set otherwise; None if it may stand under [sbatch]. sbatch takes abbreviations."""
    if option in _PLACES_OF_OPTIONS or option in _ALSO_OPTIONS:
        return _PLACES_OF_OPTIONS.get(option)
    return next((place for name, place in _PLACES_OF_OPTIONS.items() if name.startswith(option)), None)


def _syntax_error(lines: Sequence[str]) -> str:
    """What bash says of lines that it cannot read to their end, as of a quote that is not closed; "" if it can."""
    if not lines:
        return ""
    script = "\n".join(lines) + "\n"
    return subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True).stderr.strip()


def _check(
    content: Mapping[str, Any],
    known: Mapping[str, tuple[str, tuple[type, ...]]],
    prefix: str,
    refuse: Callable[[str], UserError],
) -> None:
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise refuse(f"there is no key {prefix}{key}.{hint} Those there are: {', '.join(sorted(known))}.")
        if not _is_a(value, known[key]):
            raise refuse(f"{prefix}{key} has to be {known[key][0]}; it is {value!r}.")


def _is_a(value: Any, kind: tuple[str, tuple[type, ...]]) -> bool:
    if isinstance(value, bool) or not isinstance(value, kind[1]):
        return False
    return not isinstance(value, list) or all(isinstance(part, str) for part in value)
