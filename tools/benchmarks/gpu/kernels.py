"""The project's own kernels on this card, compared with their formulas in fp64, and their time.

To add a kernel, write a function that yields its checks and enter it in KERNELS.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from open_clip.transformer import LayerNorm
from torch import Tensor, nn

from cfmask.kernels import fused
from cfmask.kernels.relevance_kernel import extend_row, usable
from cfmask.masking.cam import extend_row_with_maps
from tools.benchmarks.gpu.runner import Section
from tools.benchmarks.gpu.setting import Setting, free_memory
from tools.benchmarks.metering import time_calls, wait


@dataclass(frozen=True)
class Check:
    """One call of a kernel."""

    shape: str
    dtype: torch.dtype
    """Of the inputs."""
    runs: bool
    """Whether the kernel runs here; if not, ``call`` is what the project computes in its place."""
    call: Callable[[], Tensor]
    right: Tensor
    """The result in fp64."""
    change: float
    """The largest change that the kernel makes. Errors are given as shares of it."""
    tolerance: float
    """The largest error that counts as rounding, as a share of ``change``."""
    timed: Callable[[], object] | None = None
    """A call of a real size, to be timed."""
    plain: Callable[[], object] | None = None
    """The same in plain PyTorch."""
    flops: float = 0.0
    """FLOPs of ``timed``; 0 for a kernel that memory bounds."""
    bytes: float = 0.0
    """Bytes that ``timed`` has to move; 0 for a kernel that arithmetic bounds."""


def relevance(setting: Setting) -> Iterator[Check]:
    """``extend_row`` for all queries of a block, and for the class token alone, as in the last block."""
    shapes = [(64, 10)] if setting.dry else [(64, 50), (64, 197), (64, 257), (64, 577)]
    for size, length in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            for queries in (length, 1):
                inputs = relevance_inputs(setting.device, 3, 5, length, queries, size, dtype)
                wide = tuple(tensor.double() for tensor in inputs)
                right = extend_row_with_maps(*wide)
                timed: dict[str, Any] = {}
                if setting.device == "cuda" and queries > 1 and dtype == torch.bfloat16:
                    n, heads = (512, 12) if length < 250 else (128, 16)
                    big = relevance_inputs(setting.device, n, heads, length, queries, size, dtype)
                    timed = {
                        "timed": partial(extend_row, *big),
                        "plain": partial(extend_row_with_maps, *big),
                        "flops": 3 * 2 * n * heads * length * length * size,
                    }
                runs = usable(inputs[0], inputs[1])
                yield Check(
                    f"d{size} L{length} q{queries}",
                    dtype,
                    runs,
                    partial(extend_row if runs else extend_row_with_maps, *inputs),
                    right,
                    change=(right - wide[0]).abs().max().item(),
                    # Rows and all intermediate values are fp32, so bf16 inputs add no error.
                    tolerance=1e-4,
                    **timed,
                )


def relevance_inputs(
    device: str, n: int, heads: int, length: int, queries: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """row (N, L) fp32; q, k, v and d_out (N, heads, L, d), views as attention has them."""
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(n, length, 3, heads, size, device=device, generator=generator).to(dtype)
    d_out = torch.randn(n, queries, heads, size, device=device, generator=generator).to(dtype)
    row = torch.rand(n, length, device=device, generator=generator)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return row, q[:, :, :queries], k, v, d_out.transpose(1, 2)


def elementwise(setting: Setting) -> Iterator[Check]:
    """Kernels between a block's matrix products, each alone, beside plain PyTorch."""
    small = (2, 10, 64) if setting.dry else (4, 197, 768)
    for name, function in BETWEEN_PRODUCTS.items():
        for dtype in (torch.bfloat16, torch.float32):
            inputs = elementwise_inputs(setting.device, *small, dtype)
            right = function(*(tensor.double() for tensor in inputs))
            runs = fused.usable(inputs[0])
            timed: dict[str, Any] = {}
            if setting.device == "cuda" and dtype == torch.bfloat16:
                big = elementwise_inputs(setting.device, 256, 197, 768, dtype)
                timed = {"timed": partial(function, *big), "plain": partial(in_plain_pytorch, function, *big)}
                # Forward and backward: each activation and each cotangent is read or written once.
                timed["bytes"] = BYTES[name] * big[0].numel()
                del big
            yield Check(
                f"{name}, {small[2]} channels",
                dtype,
                runs,
                partial(function, *inputs),
                right,
                change=right.abs().max().item(),
                tolerance=1e-2 if dtype == torch.bfloat16 else 1e-5,
                **timed,
            )


def elementwise_inputs(device: str, n: int, length: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Stream, branch and cotangent (N, L, C), and two parameters (C,) in fp32."""
    generator = torch.Generator(device).manual_seed(0)
    wide = [torch.randn(n, length, width, device=device, generator=generator).to(dtype) for _ in range(3)]
    return *wide, *(torch.randn(width, device=device, generator=generator) for _ in range(2))


def _add_norm(x: Tensor, branch: Tensor, cotangent: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x, branch, weight, bias = (t.detach().requires_grad_() for t in (x, branch, weight, bias))
    norm = LayerNorm(x.shape[-1], device=x.device)
    norm.weight, norm.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    total, normed = fused.add_norm(x, fused.Branch(branch, bias), norm)
    torch.autograd.backward((total, normed), (cotangent, cotangent))
    return torch.cat([normed.detach().flatten(), x.grad.flatten()])  # type: ignore[union-attr]


def _quick_gelu(x: Tensor, branch: Tensor, cotangent: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x, bias = (t.detach().requires_grad_() for t in (x, bias))
    out = fused.bias_quick_gelu(fused.Branch(x, bias) if fused.usable(x) else fused.Branch(x + bias.to(x.dtype)))
    out.backward(cotangent)
    return torch.cat([out.detach().flatten(), x.grad.flatten()])  # type: ignore[union-attr]


BETWEEN_PRODUCTS: dict[str, Callable[..., Tensor]] = {"add + LayerNorm": _add_norm, "QuickGELU": _quick_gelu}
BYTES = {"add + LayerNorm": 16 + 6, "QuickGELU": 10 + 6}
"""Bytes for each element of the stream, in bf16, including the concatenation of the results, which is timed too."""


def in_plain_pytorch(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    usable_before, fused.usable = fused.usable, lambda tensor: False
    try:
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            return function(*inputs)
    finally:
        fused.usable = usable_before


KERNELS: dict[str, Callable[[Setting], Iterator[Check]]] = {"relevance": relevance, "between products:": elementwise}


def kernels(setting: Setting, section: Section) -> dict[str, Any]:
    """Run every check of every kernel: error, same bits twice, time.

    Raises:
        AssertionError: a kernel is wrong, or gives other bits the second time. The table is written first.
    """
    torch.set_float32_matmul_precision("highest")
    rows, result, wrong = [], {}, []
    for name, checks in KERNELS.items():
        for check in checks(setting):
            found = examine(check, setting)
            of = f"{name} {check.shape} {str(check.dtype)[6:]}"
            result[of] = found
            if found["worst"] > check.tolerance or not found["same bits"]:
                wrong.append(of)
            rows.append([of, "kernel" if check.runs else "plain PyTorch", f"{found['worst']:.1e}", *_cells(found)])
            free_memory(setting.device)
    section.table(
        ["kernel", "ran", "error / largest change", "same bits", "first s", "ms", "in plain PyTorch ms", "rate"], rows
    )
    if setting.dry:
        section.note("Kernels need a GPU: plain PyTorch ran in their place.")
    assert not wrong, f"wrong, or other bits the second time: {', '.join(wrong)}"
    return result


def examine(check: Check, setting: Setting) -> dict[str, Any]:
    begun = time.perf_counter()
    new = check.call()
    wait(setting.device)
    found: dict[str, Any] = {"first call s": time.perf_counter() - begun}
    found["worst"] = ((new.double() - check.right).abs().max() / check.change).item()
    found["same bits"] = torch.equal(new, check.call())
    if check.timed is not None:
        seconds = time_calls(check.timed, setting.device).device
        found |= {"ms": 1e3 * seconds, "TFLOP/s": check.flops / seconds / 1e12, "TB/s": check.bytes / seconds / 1e12}
        if check.plain is not None:
            found["plain ms"] = 1e3 * time_calls(check.plain, setting.device, times=3, warm_up=1).device
    return found


def _cells(found: dict[str, Any]) -> list[str]:
    rates = [f"{found[unit]:.3g} {unit}" for unit in ("TFLOP/s", "TB/s") if found.get(unit)]
    cells = [f"{found[name]:.3f}" if name in found else "" for name in ("ms", "plain ms")]
    return [str(found["same bits"]), f"{found['first call s']:.2f}", *cells, ", ".join(rates)]
