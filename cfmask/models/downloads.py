"""Weights of open_clip's tags: from its cache, else from the network, if that answers."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any
from urllib.parse import urlsplit

from cfmask.errors import UserError
from cfmask.models.architecture import HUB_CONFIG
from cfmask.runtime.downloads import why_unreachable

HUB_WEIGHTS = "open_clip_model.safetensors"
"""Weights in a Hugging Face repository of open_clip's."""


def weights_of_tag(tag: Mapping[str, Any], what: str) -> Path:
    """The checkpoint of a tag, which is downloaded unless it is in the cache. A cached file needs no network.

    Args:
        tag: open_clip's configuration of the tag.
        what: The weights, for errors.

    Raises:
        UserError: They are not in the cache, and there is no network, or the download fails.
    """
    cached = cached_weights(tag)
    if tag.get("hf_hub"):
        if cached is not None:
            return cached
        urls, why = _hub_urls(tag["hf_hub"]), _offline()
    else:
        urls, why = [str(tag.get("url"))], None
    if cached is None:
        why = why or why_unreachable(urls[0])
    try:
        if why is None:
            from open_clip.pretrained import download_pretrained  # takes seconds

            return Path(download_pretrained(dict(tag)))  # of a cached file, it only compares the digest with the tag's
    except Exception as error:  # of any type that the hub's client raises
        why = f"{type(error).__name__}: {shorten(str(error) or 'no details', 120, placeholder=' …')}"
    weights = os.path.basename(urls[0])
    raise UserError(
        f"{what} are not in the cache, and {urlsplit(urls[0]).netloc} cannot be reached ({why}). On a machine with "
        f"network access: `curl -L --remote-name-all {' '.join(map(shlex.quote, urls))}`; copy "
        f"{'both files into one folder' if len(urls) > 1 else 'the file'} here, and give --pretrained {weights}, with "
        "its path."
    )


def cached_weights(tag: Mapping[str, Any]) -> Path | None:
    """The checkpoint of a tag that open_clip has downloaded before."""
    if tag.get("hf_hub"):
        return _in_hub_cache(tag["hf_hub"])
    file = Path("~/.cache/clip").expanduser() / os.path.basename(str(tag.get("url")))
    return file if file.is_file() else None


def _offline() -> str | None:
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None


def _in_hub_cache(place: str) -> Path | None:
    """The file that open_clip would take from the hub's cache; it would ask the hub first whether it has changed."""
    from huggingface_hub import try_to_load_from_cache

    repository, name = os.path.split(place)
    plain = name or "open_clip_pytorch_model.bin"
    for file in (HUB_WEIGHTS if not name else f"{os.path.splitext(name)[0]}.safetensors", plain):
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)
    return None


def _hub_urls(place: str) -> list[str]:
    from huggingface_hub import hf_hub_url

    repository, name = os.path.split(place)
    return [hf_hub_url(repository, each) for each in ((name,) if name else (HUB_WEIGHTS, HUB_CONFIG))]
