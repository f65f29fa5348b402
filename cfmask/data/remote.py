"""Remote shards (http(s) and pipe URLs, see urls.py), through a node-local cache of bounded size.

    CACHE/train-000000.tar.<hash>                     a complete copy; the hash is of URL and sha256
    CACHE/train-000000.tar.<hash>.part                a download, by the process that holds its lock; from the start it
                                                      has its final size, because sizes are the only accounting
    CACHE/.train-000000.tar.<hash>.ok                 identity of the copy when its contents were last verified
    CACHE/.lock                                       held while files are counted, removed or renamed
    CACHE/.unsized.lock                               held while a file of unknown size is downloaded

webdataset's cache and fsspec's ``filecache`` have no size bound that holds across the processes of a node, do not
verify contents, and do not resume a download; so this cache is our own. The commands are run by webdataset's ``gopen``.

Other users cannot write into the folder (private_folder.py), and links in it are not followed. Locks are flocks: the
kernel releases those of killed processes, and they also exclude threads.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import select
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from cfmask.data.private_folder import MARK, OWN_NAME, private_folder
from cfmask.errors import UserError
from cfmask.runtime.files import disk_is_full
from cfmask.runtime.machine import this_machine
from cfmask.urls import is_http

T = TypeVar("T")

ATTEMPTS = 4
BACKOFF_S = 0.5
"""Pause after the first failed attempt; each further pause is twice as long."""
CONNECT_S = 15
HTTP_STALL_S = 30
"""An http transfer fails after so long at less than a kilobyte per second."""
PIPE_STALL_S = 600
"""A pipe command fails after so long without output: it may fetch a whole file before its first byte."""

_CHUNK = 1 << 20
_OURS = re.compile(r".+\.[0-9a-f]{20}(\.part|\.ok)?")  # nothing else in the folder is ever counted or removed


# --- one transfer ---------------------------------------------------------------------------------------------------


class _Failed(Exception):
    """A failed attempt. lasting: further attempts would fail too. whole: the server cannot resume a file."""

    def __init__(self, reason: str, remedy: str, *, lasting: bool = False, whole: bool = False):
        self.reason, self.remedy, self.lasting, self.whole = reason, remedy, lasting, whole


def read(url: str, *, attempts: int = ATTEMPTS) -> bytes:
    """The contents of a small file.

    Raises:
        UserError: all attempts failed; with the URL, the last reason, and what to do.
    """
    return _retry(url, attempts, lambda: b"".join(_fetch(url)))


def _retry(url: str, attempts: int, once: Callable[[], T]) -> T:
    attempt = 1
    while True:
        try:
            return once()
        except _Failed as failure:
            if failure.lasting or attempt >= attempts:
                tried = "" if failure.lasting else f" (attempt {attempt} of {attempts})"
                text = f"{url} cannot be read: {failure.reason}{tried}. {failure.remedy}"
                raise UserError(" ".join(text.split())) from None  # a command or its output may have several lines
        time.sleep(BACKOFF_S * 2 ** (attempt - 1))
        attempt += 1


def _curl(config: str, offset: int) -> str:
    """The command that prints a file from byte ``offset`` on. All users of the machine can see its arguments, so the
    URL, which may contain a token, is in the file ``config``.

    webdataset's own command has no limit for a server that stops sending, reports a broken server only after a minute,
    and prints the first part of a file twice if it has to start again.
    """
    options = ["--fail", "--silent", "--show-error", "--location", "--globoff", "--connect-timeout", str(CONNECT_S)]
    options += ["--speed-limit", "1000", "--speed-time", str(HTTP_STALL_S)]
    options += ["--continue-at", str(offset)] if offset else []
    return "exec " + shlex.join(["curl", "--config", config, *options])


def _fetch(url: str, offset: int = 0) -> Generator[bytes, None, None]:
    """The contents of ``url`` in chunks, from byte ``offset`` on (http only).

    Raises:
        _Failed: the command failed or stalled, possibly after some chunks.
    """
    from webdataset.gopen import gopen  # it imports torch

    stall = PIPE_STALL_S if not is_http(url) else CONNECT_S + HTTP_STALL_S + 15  # curl notices first
    complaints, config, script = (os.memfd_create(name) for name in ("stderr", "config", "script"))
    try:
        opened = f"/proc/{os.getpid()}/fd"
        if is_http(url):
            quoted = url.replace("\\", "\\\\").replace('"', '\\"')
            Path(f"{opened}/{config}").write_text(f'url = "{quoted}"\n')
            command = _curl(f"{opened}/{config}", offset)
        else:
            command = url.removeprefix("pipe:")
        Path(f"{opened}/{script}").write_text(f"{command}\n")
        # In a file, because other users could read the arguments of the shell.
        pipe = gopen(f"pipe:exec 2>{opened}/{complaints}; . {opened}/{script}", "rb")
        try:
            # Not pipe.read, which drops what it has read if the command has failed meanwhile.
            output = pipe.stream.fileno()
            ready = select.poll()
            ready.register(output, select.POLLIN)
            while ready.poll(stall * 1000):
                if chunk := os.read(output, _CHUNK):
                    yield chunk
                    continue
                with suppress(subprocess.TimeoutExpired):
                    if status := pipe.proc.wait(stall):
                        raise _failure(url, status, complaints)
                    return
                break
            raise _Failed(f"the command neither sent anything for {stall} seconds nor ended", _remedy(url))
        finally:
            pipe.proc.kill()  # no effect if it has ended
            with suppress(OSError):  # reports that it was killed
                pipe.close()
    finally:
        for descriptor in (complaints, config, script):
            os.close(descriptor)


def _remedy(url: str) -> str:
    if is_http(url):
        return "Check the address, and that this machine reaches the server; then start again."
    return "Run the command on this machine to find the cause; then start again."


def _failure(url: str, status: int, complaints: int) -> _Failed:
    """complaints: descriptor of the command's standard error."""
    end = os.pread(complaints, 500, max(0, os.fstat(complaints).st_size - 500))
    complaint = end.decode(errors="replace").strip().rstrip(".")
    if is_http(url):
        if status == 127:
            return _Failed("curl is not installed on this machine", "Install curl.", lasting=True)
        match = re.search(r"returned error: (\d+)", complaint)
        code = int(match[1]) if match else 0
        lasting = 400 <= code < 500 and code not in (408, 416, 425, 429)
        reason = complaint or f"curl ended with status {status}"
        return _Failed(reason, _remedy(url), lasting=lasting, whole=status == 33 or code == 416)
    reason = f"the command ended with status {status}" + (f" and said: {complaint}" if complaint else "")
    return _Failed(reason, _remedy(url), lasting=status in (126, 127))  # it cannot be run, or does not exist


# --- the cache ------------------------------------------------------------------------------------------------------


class Cache:
    """Copies of remote files in a folder that the processes of a node share. A Cache can be pickled.

    A copy may be removed while it is open. Its disk space is freed when its last descriptor is closed, so files that
    readers hold open may exceed the bound.

    The contents of a copy are compared with their sha256 after the download, and again if the file is not the one that
    was verified last, by size, time, inode and boot: copies are not synced to disk, so a power cut may damage them.

    Args:
        folder: on a disk of the node; created when it is needed. Other files in it are ignored.
        max_bytes: bound on the size of all copies and downloads.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self._folder = Path(folder)
        self._max_bytes = max_bytes

    def open(self, url: str, *, size: int | None, sha256: str | None) -> BinaryIO:
        """Open the verified copy of the file at ``url``. If there is none, one caller downloads it and the others wait.
        The least recently opened copies are removed to make room.

        Args:
            size: in bytes. Only one file of unknown size is downloaded at a time.
            sha256: hex digest of its contents. Files of different digests are different, also under the same URL.

        Raises:
            UserError: it cannot be downloaded, is larger than the cache, or cannot be stored; or the folder belongs to
                another user.
        """
        self._folder = private_folder(self._folder)
        name = _copy_name(url, sha256)
        copy, aside = self._folder / name, self._folder / f"{name}.part"
        try:
            while not (file := _open_copy(copy, size, None)):
                with _locked(aside) as part:
                    if not _is_at(aside, part):
                        continue  # the previous holder of the lock has renamed or removed it
                    try:
                        if file := _open_copy(copy, size, _verified(copy, size, sha256)):
                            aside.unlink()
                            return file
                        _remove(copy)
                        with _locked(self._folder / ".unsized.lock") if size is None else nullcontext():
                            digest = self._download(url, part, aside.name, size, sha256)
                        file = open(os.open(aside, os.O_RDONLY | os.O_NOFOLLOW), "rb")
                        with _locked(self._folder / ".lock"):
                            os.replace(aside, copy)
                            _write_mark(copy, os.fstat(file.fileno()), digest)
                        return file
                    except BaseException:
                        aside.unlink(missing_ok=True)
                        raise
            return file
        except OSError as error:
            raise UserError(
                f"{url} cannot be stored in the cache folder {self._folder} ({error}), which must be on a local disk "
                f"with room, and writable for you."
            ) from None

    def discard(self, url: str, *, sha256: str | None) -> None:
        """Remove a wrong copy, so that it is downloaded again when it is next opened."""
        _remove(self._folder / _copy_name(url, sha256))

    def _download(self, url: str, part: int, name: str, size: int | None, sha256: str | None) -> str:
        """Download ``url`` into the file descriptor ``part`` of the file ``name``. Returns the sha256."""
        room = size or 0
        self._take_room(url, part, name, room)
        digest, written, resume = hashlib.sha256(), 0, False
        resumable = sha256 is not None and is_http(url)  # without sha256, the parts could be of two files

        def once() -> None:
            nonlocal room, digest, written, resume, resumable
            if not resume:
                digest, written = hashlib.sha256(), 0
                os.lseek(part, 0, os.SEEK_SET)
            try:
                with closing(_fetch(url, written)) as chunks:
                    for chunk in chunks:
                        written += len(chunk)
                        if size is not None and written > size:
                            break
                        if written > room:
                            room = max(written, min(written + min(written // 4, _CHUNK), self._max_bytes))
                            self._take_room(url, part, name, room)
                        self._write(part, chunk)
                        digest.update(chunk)
            except _Failed as failure:
                resume = resumable = resumable and not failure.whole
                raise
            resume = False
            if size is not None and written != size:
                raise _Failed(f"{written} bytes came, {size} were expected", _OTHER_FILE)
            if sha256 is not None and digest.hexdigest() != sha256:
                raise _Failed(f"its sha256 is {digest.hexdigest()}, expected was {sha256}", _OTHER_FILE)

        _retry(url, ATTEMPTS, once)
        os.ftruncate(part, written)
        return digest.hexdigest()

    def _take_room(self, url: str, part: int, name: str, size: int) -> None:
        """Enlarge ``part`` to ``size`` once there is room. Waits while other downloads take the room. They end, because
        only one of the waiting downloads, that of unknown size, holds room itself."""
        if size > self._max_bytes:
            raise UserError(
                f"{url} has {size / 1e9:.3g} GB or more, and the cache {self._folder} may hold "
                f"{self._max_bytes / 1e9:.3g} GB. Raise --cache-gb: it should hold several shards for each loader."
            )
        while True:
            with _locked(self._folder / ".lock"):
                copies, downloads = self._files(name)
                if downloads + size <= self._max_bytes:
                    excess = downloads + size + sum(bytes for _, bytes, _ in copies) - self._max_bytes
                    for _, bytes, path in copies:
                        if excess <= 0:
                            break
                        _remove(path)
                        excess -= bytes
                    os.ftruncate(part, size)
                    return
            time.sleep(0.1)

    def _files(self, but: str = "") -> tuple[list[tuple[int, int, Path]], int]:
        """(time of last use, size, path) of all copies, least recently used first; and the bytes of downloads except
        the one named ``but``. Removes files of killed downloads. The caller holds .lock."""
        copies, downloads = [], 0
        for entry in os.scandir(self._folder):
            if entry.name == but or not _OURS.fullmatch(entry.name):
                continue
            with suppress(FileNotFoundError):  # a download that fails removes its file without the lock
                if entry.name.endswith(MARK):
                    if not os.path.lexists(self._folder / entry.name[1:].removesuffix(MARK)):
                        os.unlink(entry.path)
                elif not entry.name.endswith(".part"):
                    status = entry.stat(follow_symlinks=False)
                    copies.append((status.st_atime_ns, status.st_size, Path(entry.path)))
                elif not _remove_if_abandoned(Path(entry.path)):
                    downloads += os.stat(entry.path).st_size
        return sorted(copies), downloads

    def _write(self, part: int, chunk: bytes) -> None:
        view = memoryview(chunk)
        while view:
            try:
                view = view[os.write(part, view) :]
            except OSError as error:
                if not disk_is_full(error):
                    raise
                # Other programs fill the disk too. Remove one copy at a time and retry.
                with _locked(self._folder / ".lock"):
                    copies, _ = self._files()
                    if not copies:
                        raise UserError(
                            f"The disk of the cache folder {self._folder} is full ({error.strerror}), and the cache "
                            f"has no more copies to remove. Make room on it, or use a folder on another disk."
                        ) from None
                    _remove(copies[0][2])


_OTHER_FILE = "The file differs from the set's manifest. Copy the whole set to that place again."


def _copy_name(url: str, sha256: str | None) -> str:
    # Begins with what is probably the name of the file, for readers of the folder.
    names = re.findall(r"[\w.-]+\.\w+", url.partition("?")[0], re.ASCII) or ["file"]
    return f"{names[-1][-80:]}.{hashlib.sha256(f'{url} {sha256}'.encode()).hexdigest()[:20]}"


def _open_copy(copy: Path, size: int | None, verified: str | None) -> BinaryIO | None:
    """Open a copy and update its time of use; None if it is missing, has another size, or is not verified.

    Args:
        verified: the sha256 of its contents, if they were just verified.
    """
    try:
        file = open(os.open(copy, os.O_RDONLY | os.O_NOFOLLOW), "rb")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise
    status = os.fstat(file.fileno())
    right = status.st_uid == os.geteuid() and (status.st_size == size if size is not None else status.st_size > 0)
    if right and verified is not None:
        _write_mark(copy, status, verified)
    elif not right or _read_mark(copy).get("file") != _identity(status):
        file.close()
        return None
    os.utime(file.fileno(), ns=(time.time_ns(), status.st_mtime_ns))  # mtime must stay: it identifies the file
    return file


def _verified(copy: Path, size: int | None, sha256: str | None) -> str | None:
    """The sha256 of the contents of a copy, if it is the expected one; None if it is not, or none is known."""
    expected = sha256 or _read_mark(copy).get("sha256")
    try:
        descriptor = os.open(copy, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    with open(descriptor, "rb") as file:
        if expected is None or (size is not None and os.fstat(descriptor).st_size != size):
            return None
        digest = hashlib.sha256()
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest() if digest.hexdigest() == expected else None


def _identity(status: os.stat_result) -> list[Any]:
    """Identity of a file whose contents were verified."""
    return [this_machine(), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]


def _mark_of(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}{MARK}")


def _read_mark(copy: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        with open(os.open(_mark_of(copy), os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            found = json.load(file)
        return found if isinstance(found, dict) else {}
    return {}


def _write_mark(copy: Path, status: os.stat_result, sha256: str) -> None:
    """Record that a copy is verified. If that fails, it is verified again next time."""
    with suppress(OSError):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        with open(os.open(_mark_of(copy), flags, 0o600), "w") as file:
            json.dump({"file": _identity(status), "sha256": sha256}, file)


def _remove(copy: Path) -> None:
    copy.unlink(missing_ok=True)
    _mark_of(copy).unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Yields a descriptor of the locked file. ``path`` may have become another file during the wait."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child forked meanwhile has the descriptor too
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_if_abandoned(part: Path) -> bool:
    descriptor = os.open(part, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(part, descriptor):
            part.unlink()
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def node_cache(folder: str | None = None, gb: float | None = None) -> Cache:
    """The cache of this node, in ``private_folder(cache_folder(folder))``, of ``gb`` GB (default 200)."""
    return Cache(cache_folder(folder), int((gb or 200) * 1e9))


def cache_folder(folder: str | None = None) -> Path:
    """``folder``, or else $CFMASK_CACHE, or else a folder of this user in $TMPDIR."""
    given = folder or os.environ.get("CFMASK_CACHE")
    return Path(given) if given else Path(tempfile.gettempdir()) / OWN_NAME
