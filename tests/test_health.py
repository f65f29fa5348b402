"""A node that cannot do its part is named before ranks wait for each other; a full disk, or a file server whose clock
is off, is no node's fault."""

from __future__ import annotations

import errno
import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest

from cfmask.runtime.distributed import DistributedContext
from launch.ranks import health
from launch.ranks.health import NodeUnhealthy
from launch.slurm.client import SlurmError
from launch.slurm.site import controller_clock
from launch.state.failure_reports import is_device_error


@pytest.fixture(autouse=True)
def node(monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.setattr(health, "_PAUSE_S", 0.0)


def test_a_good_node_passes_and_nothing_stays(tmp_path):
    health.check_node(tmp_path, DistributedContext())
    assert not list(tmp_path.iterdir())


def failing(*numbers: int):
    left = list(numbers)

    def file_clock(path: Path) -> tuple[float, float]:
        if left:
            number = left.pop(0)
            raise OSError(number, os.strerror(number), str(path))
        return 0.0, 0.0

    return file_clock


def test_a_run_folder_that_cannot_be_written_is_the_nodes_fault(tmp_path, monkeypatch):
    with pytest.raises(NodeUnhealthy, match="No such file or directory"):
        health.check_folder(tmp_path / "not mounted")
    health.check_node(tmp_path / "not mounted", DistributedContext(local_rank=1))  # the first rank of the node looks
    monkeypatch.setattr(health, "file_clock", failing(*[errno.EROFS] * 4))
    with pytest.raises(NodeUnhealthy, match=r"node n7 is unhealthy: .* cannot be written and read .* .Read-only file"):
        health.check_node(tmp_path, DistributedContext())


@pytest.mark.parametrize("numbers", [(errno.EIO,) * 3, (errno.ENOSPC,), (errno.ESTALE, errno.EDQUOT)])
def test_a_file_server_that_is_back_and_a_full_disk_are_not(tmp_path, monkeypatch, numbers):
    monkeypatch.setattr(health, "file_clock", failing(*numbers))
    health.check_node(tmp_path, DistributedContext())


@pytest.mark.parametrize("off", [-3600.0, 3600.0])
def test_a_clock_that_is_off_from_both_others(monkeypatch, capsys, off):
    now = health.time.time()
    monkeypatch.setattr(health, "controller_clock", lambda **_: now - off)
    with pytest.raises(NodeUnhealthy, match=rf"its clock is off by {off:.0f} s from the controller's"):
        health.check_clock((-off - 0.01, -off))
    monkeypatch.setattr(health, "controller_clock", lambda **_: now)
    health.check_clock((-off - 0.01, -off))
    assert "warning: the clock of the run folder's file system is off by" in capsys.readouterr().err

    def silent(**_):
        raise SlurmError("no answer")

    monkeypatch.setattr(health, "controller_clock", silent)
    health.check_clock((-off - 0.01, -off))
    health.check_clock((-59.0, -58.0))
    health.check_clock(None)


@pytest.mark.slurm
def test_the_controllers_clock_is_read(slurm_cluster):
    assert abs(controller_clock() - health.time.time()) < 30


def test_a_local_disk_without_space(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "free_bytes", lambda folder: 100 << 20)
    with pytest.raises(NodeUnhealthy, match="has 100 MiB free; 256 MiB are needed"):
        health.check_local_disk(tmp_path)
    with pytest.raises(NodeUnhealthy, match="cannot be written .No such file"):
        health.check_local_disk(tmp_path / "gone")
    monkeypatch.setenv(health.VARIABLE, "off")
    health.check_node(tmp_path / "gone", DistributedContext())


class Cuda:
    """torch.cuda of one GPU of 80 GiB, and tensors on it that live on the CPU."""

    def __init__(self, monkeypatch, *, free: float = 0.99, error: str = "", wrong: int = 0) -> None:
        import torch

        arange = torch.arange

        def on_gpu(number: int, device: object):
            if error:
                raise torch.AcceleratorError(error) if hasattr(torch, "AcceleratorError") else RuntimeError(error)
            return arange(number) + wrong

        monkeypatch.setattr(torch, "arange", on_gpu)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * (80 << 30)), 80 << 30))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))


def pynvml(monkeypatch, rows: tuple[int, int, bool, bool]) -> None:
    module = types.ModuleType("pynvml")
    module.NVMLError = type("NVMLError", (Exception,), {})
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    module.nvmlDeviceGetRemappedRows = lambda gpu: rows
    monkeypatch.setitem(sys.modules, "pynvml", module)


@pytest.mark.parametrize(
    ("faults", "rows", "said"),
    [
        ({}, (0, 0, False, False), None),
        ({"free": 0.5}, (0, 0, False, False), r"has 40960 of 81920 MiB free: another process uses it"),
        (
            {"error": "CUDA error: uncorrectable ECC error encountered"},
            (0, 0, False, False),
            "does not answer: CUDA err",
        ),
        ({"wrong": 1}, (0, 0, False, False), "computes wrong sums"),
        ({}, (0, 3, False, True), "rows of its memory have failed"),
        ({}, (0, 3, True, False), "it needs a reset"),
    ],
    ids=["good", "in use", "ECC", "wrong", "failed rows", "pending rows"],
)
def test_gpus(monkeypatch, faults, rows, said):
    Cuda(monkeypatch, **faults)
    pynvml(monkeypatch, rows)
    if said is None:
        health.check_gpu(DistributedContext(gpu=True))
        return
    with pytest.raises(NodeUnhealthy, match=f"node n7 is unhealthy: GPU 0.*{said}"):
        health.check_gpu(DistributedContext(gpu=True))


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("CUDA error: uncorrectable ECC error encountered", True),
        ("CUDA error: an illegal memory access was encountered", True),
        ("CUDA error: device-side assert triggered", False),
        ("CUDA out of memory. Tried to allocate 20.00 MiB", False),
        ("CUDA error: no kernel image is available for execution on the device", False),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_which_errors_may_be_the_gpus(text, device):
    assert is_device_error(RuntimeError(text)) == device
    assert not is_device_error(ValueError(text))
