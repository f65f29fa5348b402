"""A folder on a node's disk in which other users cannot write."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from cfmask.errors import UserError

OWN_NAME = f"cfmask-cache-{os.geteuid()}"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
MARK = ".ok"
"""Suffix of the files that record verified copies (``remote.Cache``)."""


def private_folder(folder: Path) -> Path:
    """``folder`` if only this user can write to it, otherwise a subfolder of this user. Missing folders are created,
    with mode 700.

    Raises:
        UserError: the folder cannot be created, belongs to another user, or is a link, which could be an attack.
    """
    try:
        if folder.name != OWN_NAME:
            if not folder.exists():
                folder.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileExistsError):
                    folder.mkdir(mode=0o700)
            found = os.stat(folder)  # a link that the user gives is followed
            if found.st_uid == os.geteuid() and not found.st_mode & _OTHERS_WRITE:
                return folder
            if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
                raise UserError(
                    f"The cache folder {folder} is writable for all users (mode {stat.S_IMODE(found.st_mode):o}), who "
                    "could replace files in it. Run `chmod +t` on it, or give another one with --cache-dir or "
                    "$CFMASK_CACHE."
                )
            folder = folder / OWN_NAME
        else:
            folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            what = f"belongs to user {found.st_uid}" if stat.S_ISDIR(found.st_mode) else "is not a folder"
            raise UserError(
                f"The cache folder {folder} {what}, and you are user {os.geteuid()}. Remove it, or give another folder "
                "with --cache-dir or $CFMASK_CACHE."
            )
        if found.st_mode & _OTHERS_WRITE:
            os.chmod(folder, 0o700)
            # Others may have written files, so all files are verified again.
            for name in os.listdir(folder):
                if name.endswith(MARK):
                    (folder / name).unlink(missing_ok=True)
        elif stat.S_IMODE(found.st_mode) != 0o700:
            os.chmod(folder, 0o700)
        return folder
    except OSError as error:
        raise UserError(
            f"The cache folder {folder} cannot be used ({error.strerror}). Give a folder on a local disk that you can "
            "write to with --cache-dir or $CFMASK_CACHE."
        ) from None
