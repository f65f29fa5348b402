"""A folder on a node's disk in which no other user can put or change a file."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from cfmask.errors import UserError

OWN_NAME = f"cfmask-cache-{os.geteuid()}"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
MARK = ".ok"
"""How the names of files end that say what has been verified (``remote.Cache``)."""


def private_folder(folder: Path) -> Path:
    """``folder`` if it is this user's alone, or else a folder of this user's in it; made with mode 700 if it is not
    there. A folder that several users share, the disk of a node say, gets one for each of them.

    Raises:
        UserError: it cannot be made, or is another user's or a link, which somebody may have left there on purpose.
    """
    try:
        if folder.name != OWN_NAME:
            if not folder.exists():
                folder.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileExistsError):
                    folder.mkdir(mode=0o700)
            found = os.stat(folder)  # a link that the user names is the user's choice
            if found.st_uid == os.geteuid() and not found.st_mode & _OTHERS_WRITE:
                return folder
            if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
                raise UserError(
                    f"The cache folder {folder} can be written by everybody (mode {stat.S_IMODE(found.st_mode):o}): "
                    "any user could exchange files in it. `chmod +t` it, or give another one with --cache-dir or "
                    "$CFMASK_CACHE."
                )
            folder = folder / OWN_NAME
        else:
            folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            what = f"belongs to user {found.st_uid}" if stat.S_ISDIR(found.st_mode) else "is no folder"
            raise UserError(
                f"{folder}, in which shards would be cached, {what}, and you are user {os.geteuid()}: it was not made "
                "by you. Remove it, or give another folder with --cache-dir or $CFMASK_CACHE."
            )
        if found.st_mode & _OTHERS_WRITE:
            os.chmod(folder, 0o700)
            # Others may have put files into it: all of them are verified again.
            for name in os.listdir(folder):
                if name.endswith(MARK):
                    (folder / name).unlink(missing_ok=True)
        elif stat.S_IMODE(found.st_mode) != 0o700:
            os.chmod(folder, 0o700)
        return folder
    except OSError as error:
        raise UserError(
            f"The cache folder {folder} cannot be used ({error.strerror}): it must be on a local disk, and yours to "
            "write to. Give another one with --cache-dir or $CFMASK_CACHE."
        ) from None
