"""The error class for everything that the user can correct."""

from __future__ import annotations

from cfmask.secrets import mask_secrets


class UserError(ValueError):
    """An error that the user can correct. The message is one paragraph: what is wrong, where, and what to do. Secrets
    in it are masked, because it is shown, logged, and kept in the run folder."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(mask_secrets(word) if isinstance(word, str) else word for word in arguments))
