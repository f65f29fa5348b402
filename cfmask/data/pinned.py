"""Page-locked memory in the sizes that are asked for.

PyTorch's allocator of page-locked memory rounds every block up to a power of two: a batch of 512 images of 224 × 224
pixels, 77 MB, takes 134 MB. A setting of the allocator ends that for large blocks.
"""

from __future__ import annotations

import functools

import torch

_SETTING = "pinned_max_round_threshold_mb"
_SOUND_FROM = "2.14"
"""Earlier versions do not have the setting, or hand out cached blocks that are smaller than what is asked for
(pytorch/pytorch#192722)."""


@functools.cache
def allocate_exact_sizes() -> None:
    """From now on, page-locked blocks of more than 1 MB are as large as they are asked to be, where PyTorch can do it.

    What PYTORCH_ALLOC_CONF says of this setting stays.
    """
    if torch.__version__ < _SOUND_FROM:  # torch compares it as a version
        return
    present = torch._C._accelerator_getAllocatorSettings()
    if _SETTING not in present:
        torch._C._accelerator_setAllocatorSettings(f"{present},{_SETTING}:1".lstrip(","))
