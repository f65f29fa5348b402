"""The cluster file: facts about a cluster that a lab writes down once, so that `submit.py --nodes 2` is enough.

    nodes = 2                                # a key is a flag of submit.py, with _ for -; flags override keys
    partition = "gpu"
    shards = "/datasets/imagenet/shards"

    [environment]                            # tables come last
    HF_HOME = "/shared/huggingface"

`slurm/cluster.toml` is the template and has every key.
"""

from __future__ import annotations

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

from cfmask.errors import UserError, did_you_mean, did_you_mean_path
from cfmask.urls import is_remote
from launch.allocation.settings import FILE_KEYS, TABLE, TEXT, TEXT_OR_COUNT, TEXTS, FileType

VARIABLE = "CFMASK_CLUSTER"
PLACES = (Path("cluster.toml"), Path("~/.config/cfmask/cluster.toml"))
OWN_KEYS = {
    **{"setup": TEXTS, "srun_args": TEXTS, "python": TEXT},
    **dict.fromkeys(("environment", "container", "sbatch"), TABLE),
}
"""Keys that are not flags."""
_CONTAINER_KEYS = {"image": TEXT, "mounts": TEXTS}

_GPUS = "one of the keys gpus_per_node, gres, gpus_per_task and exclusive requests GPUs"
_KEYS = ("account", "constraint", "exclude", "nodes", "partition", "qos", "time")
_HYPHENATED = ("cpus-per-task", "gpus-per-node", "gpus-per-task")
_OURS = (
    *("array", "error", "export", "export-file", "job-name", "no-requeue", "open-mode", "output", "parsable"),
    *("requeue", "signal", "test-only", "wait", "wrap"),
)
_NOT_UNDER_SBATCH = {
    **{name: f"it is the key {name.replace('-', '_')}" for name in (*_KEYS, *_HYPHENATED)},
    **dict.fromkeys(("ntasks-per-node", "tasks-per-node"), "it is the key tasks_per_node"),
    "exclusive": "it is the key exclusive, with the number of GPUs of a node",
    "mem": "it is the key memory",
    "dependency": "it is submit.py's flag --dependency",
    "cpus-per-gpu": "it is the key cpus_per_task; a rank has one GPU",
    **dict.fromkeys(("gpus", "gpus-per-socket"), _GPUS),
    **dict.fromkeys(
        ("ntasks", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-socket"),
        "a node has as many tasks as GPUs, or tasks_per_node",
    ),
    **dict.fromkeys(_OURS, "cfmask sets it"),
}
"""Options of sbatch that are set in another way, with that way."""
_ALSO_OPTIONS = ("mem-bind", "mem-per-cpu", "mem-per-gpu", "time-min", "wait-all-nodes")
"""Options that may stand under [sbatch] although their names begin like one that may not."""


@dataclass(frozen=True)
class ClusterFile:
    """The content of a cluster file."""

    path: Path | None = None
    """None if there is no file."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Values by key, without the tables."""
    environment: Mapping[str, str] = field(default_factory=dict)
    image: str | None = None
    mounts: tuple[str, ...] = ()
    sbatch: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shards(self) -> str | None:
        """Folder of the shards, or their URL. Paths in the file are relative to its folder."""
        given = self.values.get("shards")
        if not given or self.path is None or is_remote(given):
            return given or None
        return str((self.path.parent / Path(given).expanduser()).absolute())

    @property
    def eval_sets(self) -> tuple[str, ...]:
        return tuple(self.values.get("eval_sets", ()))


def find_cluster_file(given: Path | None) -> Path | None:
    """The file to read: the given one, $CFMASK_CLUSTER (if empty, no file), or the first of PLACES that exists.

    Raises:
        UserError: The given file, or that of $CFMASK_CLUSTER, does not exist.
    """
    named = os.environ.get(VARIABLE)
    if given is None and named == "":
        return None
    if given is None and named is None:
        return next((place.expanduser() for place in PLACES if place.expanduser().is_file()), None)
    path = given if given is not None else Path(str(named)).expanduser()
    if not path.is_file():
        by = "--cluster" if given is not None else f"${VARIABLE}"
        what = "is not a file" if path.exists() else "does not exist"
        raise UserError(f"The cluster file {path}, named by {by}, {what}.{did_you_mean_path(path)}")
    return path


def load_cluster_file(given: Path | None) -> ClusterFile:
    """The content of the file that ``find_cluster_file`` finds. Exports its [environment] in this process, whose checks
    and downloads need HF_HOME and the like as jobs do.

    Raises:
        UserError: The file cannot be used.
    """
    path = find_cluster_file(given)
    if path is None:
        return ClusterFile()
    file = read_cluster_file(path)
    _export(file.environment)
    return file


def announce(file: ClusterFile) -> None:
    """Print the path of a file whose settings are used; commands do so once they have checked their arguments."""
    if file.path is not None:
        print(f"cluster file: {file.path}", file=sys.stderr, flush=True)


def _export(environment: Mapping[str, str]) -> None:
    """Set the variables that are not set and have a value here. $NAME is expanded; what only jobs know is left out."""
    for name, value in environment.items():
        if "$" not in (expanded := os.path.expandvars(value)):
            os.environ.setdefault(name, expanded)


def read_cluster_file(path: Path) -> ClusterFile:
    """
    Raises:
        UserError: The file is not TOML, or a key is unknown or has a value of another type.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"The cluster file {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"The cluster file {path} is not TOML: {error}. Strings go in quotes, lists in [].") from None

    def refuse(what: str) -> UserError:
        return UserError(f"The cluster file {path}: {what}")

    known = {**FILE_KEYS, **OWN_KEYS}
    _check_keys(content, known, "", refuse)
    environment, container, sbatch = (content.get(name, {}) for name in ("environment", "container", "sbatch"))
    for name, value in environment.items():
        if name in known:
            raise refuse(f"{name} is under [environment], but is a key: move it above the first [table].")
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or not _is_a(value, TEXT_OR_COUNT):
            raise refuse(f"[environment] {name} has to be the name of a variable, with a string or a whole number.")
    if complaint := _syntax_error(content.get("setup", ())):
        raise refuse(f"setup has to be whole commands of bash, which says: {complaint}")
    _check_keys(container, _CONTAINER_KEYS, "container.", refuse)
    if container and not container.get("image"):
        raise refuse("[container] needs an image.")
    for mount in container.get("mounts", ()):
        if not re.fullmatch(r"/[^:,]*:/[^,]*", mount):
            raise refuse(f"container.mounts has {mount!r}; a mount is /FROM:/TO, both absolute, without commas.")
    for name, value in sbatch.items():
        _check_option(name, value, refuse)
    return ClusterFile(
        path=path,
        values={key: value for key, value in content.items() if not isinstance(value, dict)},
        environment={name: str(value) for name, value in environment.items()},
        image=container.get("image"),
        mounts=tuple(container.get("mounts", ())),
        sbatch=sbatch,
    )


def _check_option(name: str, value: Any, refuse: Callable[[str], UserError]) -> None:
    """Check an entry under [sbatch]."""
    if instead := _set_instead(name.replace("_", "-")):
        raise refuse(f"[sbatch] must not have {name}: {instead}.")
    if name == "gres" and any(re.match(r"(gres/)?gpu\b", part.strip()) for part in str(value).split(",")):
        raise refuse(f"[sbatch] gres requests GPUs: {_GPUS}. Other resources may stay here.")
    if not (value is True or _is_a(value, TEXT_OR_COUNT)):
        raise refuse(f"[sbatch] {name} has to be a string, a whole number, or true for an option without a value.")
    if re.search(r"\\|[^\S ]", str(value)):
        raise refuse(f"[sbatch] {name} has a backslash or line break, which sbatch does not keep: {value!r}.")


def _set_instead(option: str) -> str | None:
    """How an option of sbatch is set; None if it may stand under [sbatch]. sbatch accepts abbreviated names."""
    if option in _NOT_UNDER_SBATCH or option in _ALSO_OPTIONS:
        return _NOT_UNDER_SBATCH.get(option)
    return next((instead for name, instead in _NOT_UNDER_SBATCH.items() if name.startswith(option)), None)


def _syntax_error(lines: Sequence[str]) -> str:
    """What bash says about lines that it cannot parse, such as an unclosed quote; "" if it can."""
    if not lines:
        return ""
    script = "\n".join(lines) + "\n"
    return subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True).stderr.strip()


def _check_keys(
    content: Mapping[str, Any], known: Mapping[str, FileType], prefix: str, refuse: Callable[[str], UserError]
) -> None:
    for key, value in content.items():
        if key not in known:
            raise refuse(
                f"there is no key {prefix}{key}.{did_you_mean(key, known)} Choose from {', '.join(sorted(known))}."
            )
        if not _is_a(value, known[key]):
            raise refuse(f"{prefix}{key} has to be {known[key].name}; it is {value!r}.")


def _is_a(value: Any, kind: FileType) -> bool:
    if isinstance(value, bool) or not isinstance(value, kind.types):
        return False
    return not isinstance(value, list) or all(isinstance(part, str) for part in value)
