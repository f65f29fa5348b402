"""URLs of folders of shards: http(s), and ``pipe:`` for a command that prints a file.

http://host/shards?token=…                  file names are added before the query
pipe:aws s3 cp s3://bucket/shards/{} -      file names replace {}
"""

from __future__ import annotations

import shlex
from pathlib import Path
from urllib.parse import quote

from cfmask.errors import UserError

EXAMPLE = "pipe:aws s3 cp s3://bucket/shards/{} -"


def is_remote(where: str | Path) -> bool:
    """Whether ``where`` is such a URL and not a path."""
    return isinstance(where, str) and where.startswith(("http:", "https:", "pipe:"))


def join(where: str, name: str) -> str:
    """The URL of the subfolder ``name``. In a pipe, {} is kept behind the name.

    Raises:
        UserError: a pipe has no {}, or ``name`` cannot be inserted at its {}.
    """
    return _place(where, name, "/{}")


def file_url(where: str, name: str) -> str:
    """The URL of the file ``name`` in a folder. Raises as ``join``."""
    return _place(where, name, "")


def _place(where: str, name: str, rest: str) -> str:
    if is_http(where):
        path, mark, query = where.partition("?")
        return f"{path.rstrip('/')}/{quote(name)}{mark}{query}"
    if "{}" not in where:
        raise UserError(f"{where} has no {{}}, which stands for the name of a file, as in `{EXAMPLE}`.")
    command = where.replace("{}", shlex.quote(name) + rest)
    if shlex.quote(name) != name:
        # A name comes from a manifest and may be malicious. Within quotes of the user, its own quotes would end them,
        # and the shell would run the name. So the words of the command must be those that the plain name gives.
        try:
            kept = shlex.split(command) == [word.replace("{}", name + rest) for word in shlex.split(where)]
        except ValueError:  # a quotation that does not end
            kept = False
        if not kept:
            raise UserError(f"The name {name!r} cannot be inserted into {where}. Write {{}} outside of quotes.")
    return command


def is_http(url: str) -> bool:
    return url.startswith(("http:", "https:"))
