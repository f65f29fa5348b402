"""The machine: software, the card, memory bandwidth, copies to and from the host, matrix products, launches."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

from tools.benchmarks.gpu.runner import Section
from tools.benchmarks.gpu.setting import Setting
from tools.benchmarks.metering import time_calls
from tools.benchmarks.tables import cpu_name

PACKAGES = (
    *("torch", "torchvision", "triton", "numpy", "open_clip_torch", "webdataset", "submitit", "timm", "safetensors"),
    *("pytest", "pytest-xdist", "hypothesis"),
)
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit,compute_mode,mig.mode.current"
TOKENS = 512 * 197
PRODUCTS = {
    "bf16": [(8192, 8192, 8192), (TOKENS, 768, 2304), (TOKENS, 768, 768), (TOKENS, 768, 3072), (TOKENS, 3072, 768)],
    "tf32": [(8192, 8192, 8192)],
}
"""Rows, inner dimension and columns: a big square, and the products in a block of B/16 at batch 512."""


def environment(setting: Setting, section: Section) -> dict[str, Any]:
    found: dict[str, Any] = {"python": sys.version.split()[0], "CPU": cpu_name(), "cores": len(os.sched_getaffinity(0))}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["C compiler"] = shutil.which("gcc") or shutil.which("cc") or "none"
    found["Python.h"] = "present" if (Path(sysconfig.get_paths()["include"]) / "Python.h").exists() else "missing"
    if setting.device == "cuda":
        found |= card()
    found |= bandwidth(setting) | products(setting)
    section.note("\n".join(f"- {name}: {value}" for name, value in found.items()))
    if setting.dry:
        section.note(
            "Without a GPU, no card and no copies to it are listed, and the products are small ones on the CPU."
        )
    return found


def card() -> dict[str, Any]:
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        smi = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    else:
        smi = "not installed"
    return {
        "nvidia-smi": smi,
        "card": torch.cuda.get_device_name(),
        "compute capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "memory GB": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1),
        "cuDNN": torch.backends.cudnn.version(),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
    }


def bandwidth(setting: Setting) -> dict[str, float]:
    """Copies on the device (TB/s) and from and to the host (GB/s), and the host's time for a launch."""
    device, size = setting.device, 1 << (20 if setting.dry else 30)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = time_calls(lambda: target.copy_(source), device, times=setting.times(10)).device
    found = {"copy on the device TB/s": round(2 * size / seconds / 1e12, 3)}
    if device == "cuda":
        pageable = torch.ones(size // 4, dtype=torch.uint8)
        pinned, part = pageable.pin_memory(), source[: size // 4]
        for name, copy in {
            "host to device, pinned GB/s": lambda: part.copy_(pinned, non_blocking=True),
            "host to device, pageable GB/s": lambda: part.copy_(pageable, non_blocking=True),
            "device to host, pinned GB/s": lambda: pinned.copy_(part, non_blocking=True),
        }.items():
            found[name] = round(size / 4 / time_calls(copy, device, times=5, warm_up=1).device / 1e9, 1)
    little = torch.zeros(8, device=device)
    host = time_calls(lambda: [little.add_(1) for _ in range(1000)], device, times=setting.times(5)).host
    return found | {"host time of an add_, µs": round(1e6 * host / 1000, 2)}


def products(setting: Setting) -> dict[str, float]:
    found = {}
    for precision, shapes in PRODUCTS.items():
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        for m, k, n in [(64, 64, 64)] if setting.dry else shapes:
            a, b = (torch.randn(rows, k, device=setting.device).to(dtype) for rows in (m, n))
            seconds = time_calls(lambda: a @ b.T, setting.device, times=setting.times(10)).device  # noqa: B023
            found[f"{precision} {m}×{k}×{n} TFLOP/s"] = round(2 * m * k * n / seconds / 1e12, 3 if setting.dry else 0)
    return found
