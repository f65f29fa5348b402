"""Page-locked memory: of the size that is asked for, and given back."""

from __future__ import annotations

import pytest
import torch

from cfmask import pinned


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


def test_nothing_is_nothing(cudart):
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
