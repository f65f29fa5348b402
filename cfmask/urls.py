"""URLs of folders of shards: http(s), and ``pipe:`` for a command that prints a file.

http://host/shards?token=…                  file names are added before the query
pipe:aws s3 cp s3://bucket/shards/{} -      file names replace {}
"""

from __future__ import annotations

import shlex
from pathlib import Path
from urllib.parse import quote

from cfmask.errors import UserError

_EXAMPLE = "pipe:aws s3 cp s3://bucket/shards/{} -"


def is_remote(where: str | Path) -> bool:
    """Whether ``where`` is a URL that this module reads, and not a path."""
    return isinstance(where, str) and where.startswith(("http:", "https:", "pipe:"))


def join(where: str, name: str) -> str:
    """The URL of folder ``name`` in folder ``where``. In a pipe {} stays, behind the name.

    Raises:
        UserError: a pipe has no {}, or has it where ``name`` cannot be written.
    """
    return _place(where, name, "/{}")


def file_url(where: str, name: str) -> str:
    """The URL that opens file ``name`` of folder ``where``.

    Raises:
        UserError: as ``join``.
    """
    return _place(where, name, "")


def _place(where: str, name: str, rest: str) -> str:
    if is_http(where):
        path, mark, query = where.partition("?")
        return f"{path.rstrip('/')}/{quote(name)}{mark}{query}"
    if "{}" not in where:
        raise UserError(f"{where} does not say where the name of a file goes: write {{}} there, as in `{_EXAMPLE}`.")
    command = where.replace("{}", shlex.quote(name) + rest)
    if shlex.quote(name) != name:
        # Names come from a manifest that somebody else may have written. Inside the user's own quotes, ours would end
        # those, and the shell would run the name: the words have to be those that the plain name would give.
        try:
            kept = shlex.split(command) == [word.replace("{}", name + rest) for word in shlex.split(where)]
        except ValueError:  # a quotation that does not end
            kept = False
        if not kept:
            raise UserError(f"The name {name!r} cannot be put into {where}: write {{}} there outside of any quotes.")
    return command


def is_http(url: str) -> bool:
    return url.startswith(("http:", "https:"))
