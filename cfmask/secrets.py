"""Masking of secrets in URLs and commands. A secret in --shards must not reach a log, an error message, or a file that
other users can read.

    https://user:TOKEN@host/shards            → https://***@host/shards
    https://host/shards?sig=TOKEN&se=2026     → https://host/shards?sig=***&se=***
    pipe:curl -H 'Authorization: TOKEN' …     → pipe:curl -H 'Authorization: ***' …
    pipe:AWS_SECRET_ACCESS_KEY=TOKEN aws …    → pipe:AWS_SECRET_ACCESS_KEY=*** aws …
    pipe:tool --token TOKEN                   → pipe:tool --token ***

Every value of a query is masked, and the values of headers, variables and options whose names suggest a secret. `ps`
shows the arguments of a pipe command to other users, so pass a token in a variable or a file.
"""

from __future__ import annotations

import re

MASK = "***"

_SPACE_OR_END = r"\s\"'`<>\\"
_WORDS = "token|secret|passw|pwd|credential|api[_-]?key|access[_-]?key|account[_-]?key|auth|sas"
_TELLING = rf"(?:[\w-]*(?:{_WORDS})[\w-]*|[\w-]*\bkey|[\w-]*[-_]key)"
_USER = re.compile(rf"(\b[a-z][a-z0-9+.-]*://)[^/{_SPACE_OR_END}?#@]*@", re.IGNORECASE)
_QUERY = re.compile(rf"(\bhttps?:[^?{_SPACE_OR_END}]*\?)([^{_SPACE_OR_END}#]+)", re.IGNORECASE)
_HEADER = re.compile(
    rf"(\b(?:(?:proxy-)?authorization|cookie|x-[\w-]*|{_TELLING})[ \t]*:[ \t]*)([^\"'\\\n]+)", re.IGNORECASE
)
_VARIABLE = re.compile(rf"(\b{_TELLING}=)(\"[^\"]*\"|'[^']*'|[^{_SPACE_OR_END}&]+)", re.IGNORECASE)
_OPTION = re.compile(rf"(--?{_TELLING}[ \t]+)(\"[^\"]*\"|'[^']*'|[^{_SPACE_OR_END}]+)", re.IGNORECASE)
_CURL_USER = re.compile(r"(\s(?:-u[ \t]*|--(?:proxy-)?user[ \t=]+))(\"[^\"]*\"|'[^']*'|[^\s\"'\\]+)")


def mask_secrets(text: str) -> str:
    """The text with *** in place of possible secrets in URLs and commands."""
    if "://" in text or "http:" in text.lower() or "https:" in text.lower():
        text = _USER.sub(rf"\1{MASK}@", text)
        text = _QUERY.sub(lambda match: match[1] + _masked_query(match[2]), text)
    if "pipe:" in text:
        text = _HEADER.sub(rf"\1{MASK}", text)
        for pattern in (_VARIABLE, _OPTION, _CURL_USER):
            text = pattern.sub(rf"\1{MASK}", text)
    return text


def has_secrets(text: str) -> bool:
    return mask_secrets(text) != text


def _masked_query(query: str) -> str:
    parts = (part.partition("=") for part in query.split("&"))
    return "&".join(f"{name}={MASK}" if mark else MASK for name, mark, _ in parts)
