"""The one kind of error that a user can cause."""

from __future__ import annotations

from cfmask.secrets import mask_secrets


class UserError(ValueError):
    """Something the user can mend. The message is one paragraph: what is wrong, where, and what to do. Secrets of URLs
    in it are masked: it is shown, logged and kept in the run folder."""

    def __init__(self, *words: object) -> None:
        super().__init__(*(mask_secrets(word) if isinstance(word, str) else word for word in words))
