"""Fused attention: which backend torch chooses, its time, and whether its backward pass gives the same bits twice."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.benchmarks.gpu.runner import Section
from tools.benchmarks.gpu.setting import Setting, set_arithmetic
from tools.benchmarks.metering import time_calls

SHAPES = [(128, 12, 197, 64), (64, 16, 257, 64), (32, 16, 577, 64)]
"""N, heads, tokens and channels of B/16, L/14 and L/14 at 336. A block has 128 keys, and a sum of more than two blocks
depends on its order."""

BACKENDS = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION")


def attention(setting: Setting, section: Section) -> dict[str, Any]:
    rows: list[list[object]] = []
    result: dict[str, Any] = {}
    for deterministic in (False, True):
        mode = "deterministic" if deterministic else "fast"
        set_arithmetic("bf16", deterministic=deterministic)
        for shape in [(2, 2, 50, 16)] if setting.dry else SHAPES:
            for backend in ("default", *(BACKENDS if setting.device == "cuda" else ())):
                found = measure(shape, backend, setting)
                result[f"{mode} {shape[2]} {backend}"] = found
                if "refused" in found:
                    rows.append([mode, shape[2], backend, "refused", "", "", "", found["refused"]])
                    continue
                times = [f"{found[name]:.3f}" for name in ("forward ms", "backward ms")]
                rows.append([mode, shape[2], backend, found["operator"], *times, found["same bits"], found["warnings"]])
    header = ["mode", "tokens", "backend", "operator", "forward ms", "backward ms", "same bits 6 ×", "warnings"]
    section.table(header, rows)
    if setting.dry:
        section.note("Backends other than the default need a GPU.")
    return result


def measure(shape: tuple[int, int, int, int], backend: str, setting: Setting) -> dict[str, Any]:
    n, heads, length, size = shape
    qkv = torch.randn(n, length, 3, heads, size, device=setting.device, dtype=torch.bfloat16)
    q, k, v = (tensor.detach().requires_grad_() for tensor in qkv.permute(2, 0, 3, 1, 4).unbind(0))
    cotangent = torch.randn(n, heads, length, size, device=setting.device, dtype=torch.bfloat16)
    chosen = contextlib.nullcontext() if backend == "default" else sdpa_kernel(getattr(SDPBackend, backend))
    try:
        with chosen, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            forward = time_calls(lambda: F.scaled_dot_product_attention(q, k, v), setting.device)
            out = F.scaled_dot_product_attention(q, k, v)

            def backward() -> tuple[torch.Tensor, ...]:
                return torch.autograd.grad(out, (q, k, v), cotangent, retain_graph=True)

            seconds = time_calls(backward, setting.device)
            first = backward()
            same = all(torch.equal(a, b) for _ in range(5) for a, b in zip(first, backward(), strict=True))
    except RuntimeError as error:
        return {"refused": str(error).splitlines()[0][:80]}
    assert out.grad_fn is not None
    return {
        "operator": out.grad_fn.name(),
        "forward ms": 1e3 * forward.device,
        "backward ms": 1e3 * seconds.device,
        "same bits": same,
        "warnings": "; ".join(sorted({str(w.message).split(".")[0] for w in said}))[:100],
    }
