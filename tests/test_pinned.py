"""Page-locked memory has the requested size and is released."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import made
from cfmask.data.shards import load_manifest
from cfmask.data.stream import train_batches
from cfmask.runtime import pinned

sound = pytest.mark.skipif(torch.__version__ < pinned._SOUND_FROM, reason="PyTorch has no sound setting for it")
ASKED = "from cfmask.runtime import pinned; import torch; {before}; pinned.allocate_exact_sizes(); {after}"


class Cudart:
    """What pinned.py uses of CUDA's runtime."""

    def __init__(self, refuses: bool) -> None:
        self.refuses = refuses
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert address % 4096 == 0
        if not self.refuses:
            self.registered[address] = size
        return 1 if self.refuses else 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


@pytest.fixture(params=[False, True], ids=["", "refused"])
def cudart(request, monkeypatch) -> Cudart:
    made = Cudart(request.param)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(pinned, "_allocate", lambda size: torch.zeros(size, dtype=torch.uint8))
    return made


def test_memory_is_registered_in_its_size_until_the_last_view_of_it_is_gone(cudart):
    size = (1 << 20) + 12345
    data = pinned.pinned_bytes(size)
    assert data.shape == (size,) and data.dtype == torch.uint8 and not data.any()
    assert list(cudart.registered.items()) == ([] if cudart.refuses else [(data.data_ptr(), size)])
    data[-4:] = 7
    view = data[4:8].view(torch.float32)
    del data
    assert len(cudart.registered) == (0 if cudart.refuses else 1)
    view.fill_(1.5)
    del view
    assert not cudart.registered


def test_zero_bytes_need_no_registration(cudart):
    assert pinned.pinned_bytes(0).numel() == 0 and not cudart.registered


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_copies_into_it_without_a_wait():
    data = pinned.pinned_bytes(3 << 20)
    assert data.is_pinned()
    there = torch.arange(3 << 18, dtype=torch.float32, device="cuda")
    here = data.view(torch.float32)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        here.copy_(there, non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.equal(here, torch.arange(3 << 18, dtype=torch.float32))
    del data, here
    assert pinned.pinned_bytes(5).is_pinned(), "memory that was given back left no error behind"


def run(code: str, settings: str = "") -> str:
    """A process of its own: the allocator's settings are a process's."""
    environment = {**os.environ, "PYTORCH_ALLOC_CONF": settings}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=made.REPO, capture_output=True, text=True, env=environment, check=True)
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
def test_earlier_settings_of_the_allocator_are_kept(settings, then):
    code = ASKED.format(before="pass", after="print(torch._C._accelerator_getAllocatorSettings())")
    assert run(code, settings) == then


def test_versions_that_would_return_too_small_blocks_are_not_changed():
    code = ASKED.format(
        before="pinned._SOUND_FROM = '99.0'; torch._C._accelerator_setAllocatorSettings = None",
        after="print('untouched')",
    )
    assert run(code) == "untouched"


@sound
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_pinned_batch_has_the_size_of_its_images(tmp_path):
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
