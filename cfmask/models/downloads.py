"""Weights of open_clip's tags: from its cache, else from the network, if that answers."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cfmask.errors import UserError
from cfmask.models.architecture import HUB_CONFIG
from cfmask.runtime.downloads import why_unreachable

HUB_WEIGHTS = "open_clip_model.safetensors"
"""open_clip's name of the weights in a Hugging Face repository."""
_HUB_PICKLE = "open_clip_pytorch_model.bin"
"""Their name in older repositories."""
_CLIP_CACHE = Path("~/.cache/clip")
"""open_clip's folder for files that are not in a repository."""


def weights_of_tag(tag: Mapping[str, Any], what: str) -> Path:
    """The checkpoint of a tag, which is downloaded unless it is in the cache. A cached file needs no network.

    Args:
        tag: open_clip's configuration of the tag.
        what: The weights, for errors.

    Raises:
        UserError: They are not in the cache, and there is no network, or the download fails.
    """
    from open_clip.pretrained import download_pretrained

    cached = cached_weights(tag)
    if cached is not None and not cached.is_relative_to(_CLIP_CACHE.expanduser()):
        return cached
    if cached is not None:  # open_clip checks its digest, and downloads a damaged file again
        tag = {**tag, "hf_hub": ""}
    urls = _hub_urls(tag["hf_hub"]) if tag.get("hf_hub") else [str(tag.get("url"))]
    why = _offline() if tag.get("hf_hub") else None
    if cached is None:
        why = why or why_unreachable(urls[0])
    try:
        if why is None:
            return Path(download_pretrained(dict(tag)))
    except Exception as error:  # of any type that the hub's client raises
        why = f"{type(error).__name__}: {(str(error).splitlines() or ['no details'])[0][:120]}"
    weights = os.path.basename(urls[0])
    raise UserError(
        f"{what} are not in the cache, and {urlsplit(urls[0]).netloc} cannot be reached ({why}). On a machine with "
        f"network access: `curl -L --remote-name-all {' '.join(map(shlex.quote, urls))}`; copy "
        f"{'both files into one folder' if len(urls) > 1 else 'the file'} here, and give --pretrained {weights}, with "
        "its path."
    )


def _offline() -> str | None:
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None


def cached_weights(tag: Mapping[str, Any]) -> Path | None:
    """The file of a tag in the caches of open_clip and of the hub's client, which would ask the hub whether it has
    changed."""
    from huggingface_hub import try_to_load_from_cache

    repository, name = os.path.split(tag.get("hf_hub") or "")
    if repository:
        for file in (f"{os.path.splitext(name)[0]}.safetensors", name) if name else (HUB_WEIGHTS, _HUB_PICKLE):
            if isinstance(cached := try_to_load_from_cache(repository, file), str):
                return Path(cached)
    path = _CLIP_CACHE.expanduser() / os.path.basename(tag.get("url") or "")
    return path if path.is_file() else None


def _hub_urls(place: str) -> list[str]:
    from huggingface_hub import hf_hub_url

    repository, name = os.path.split(place)
    return [hf_hub_url(repository, each) for each in ((name,) if name else (HUB_WEIGHTS, HUB_CONFIG))]
