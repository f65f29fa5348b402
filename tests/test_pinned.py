"""Page-locked memory: blocks as large as they are asked to be, where PyTorch can do that safely."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import made
from cfmask.data import pinned
from cfmask.data.shards import load_manifest
from cfmask.data.stream import train_batches

sound = pytest.mark.skipif(torch.__version__ < pinned._SOUND_FROM, reason="PyTorch has no sound setting for it")
ASKED = "from cfmask.data import pinned; import torch; {before}; pinned.allocate_exact_sizes(); {after}"


def run(code: str, settings: str = "") -> str:
    """A process of its own: the allocator's settings are a process's."""
    environment = {**os.environ, "PYTORCH_ALLOC_CONF": settings, "PYTHONPATH": str(made.REPO)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()


@sound
@pytest.mark.parametrize(
    ("settings", "then"),
    [
        ("", "pinned_max_round_threshold_mb:1"),
        ("max_split_size_mb:200", "max_split_size_mb:200,pinned_max_round_threshold_mb:1"),
        ("pinned_max_round_threshold_mb:64", "pinned_max_round_threshold_mb:64"),
    ],
)
def test_the_allocator_is_told_beside_what_it_was_told_before(settings, then):
    code = ASKED.format(before="pass", after="print(torch._C._accelerator_getAllocatorSettings())")
    assert run(code, settings) == then


def test_a_version_that_would_hand_out_blocks_too_small_is_left_as_it_is():
    code = ASKED.format(
        before="pinned._SOUND_FROM = '99.0'; torch._C._accelerator_setAllocatorSettings = None",
        after="print('untouched')",
    )
    assert run(code) == "untouched"


@sound
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_pinned_batch_takes_no_more_than_its_images(tmp_path):
    materials = made.make_materials(tmp_path)
    batches = train_batches(
        load_manifest(materials / "shards/train"),
        image_size=224,
        batch_size=32,
        lanes=4,
        rank=0,
        world_size=1,
        seed=0,
        epoch=0,
        loader_workers=0,
        draw_spec=None,
        pin_memory=True,
    )
    torch.empty(1, pin_memory=True)
    before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    batch = next(batches)
    assert batch.images.is_pinned() and batch.labels.is_pinned()
    took = torch.cuda.host_memory_stats()["allocated_bytes.current"] - before
    assert batch.images.nbytes <= took < batch.images.nbytes + 2**20  # 4.8 MB, not 8.4; and labels and a receipt
