"""Triton kernels for the operations between a block's matrix products. Each reads and writes every activation once.

These passes are bound by memory, so their time is the number of bytes that they move. In bf16, with C channels a token
and 4 C in the MLP, they move in each block, in bytes per token and channel of the residual stream:

                                        forward                             backward
    residual add + LayerNorm, two       2 × (2 read + 2 written) × 2 = 16   2 × (3 read + 1 written) × 2 = 16
    bias + QuickGELU on 4 C             (1 + 1) × 4 × 2             = 16    (2 + 1) × 4 × 2             = 24
    joining q, k and v's gradients                                          (3 + 3) × 2                 = 12

Statistics, sums and parameters are in fp32. A parameter's gradient is the sum of a column over all tokens: each program
sums its rows in a fixed order into its own row of ``partial``, and one sum over these rows follows. The number of
programs depends only on the shape, so equal inputs give bitwise identical results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfmask.kernels.triton_support import jit, tl, triton

# Elements of a tile. With 4 warps that is 32 of each operand in a thread's registers.
_TILE = 4096
# Columns of a tile if columns are independent of each other.
_COLUMNS = 256
_WARPS = 4
# For the norm's backward pass, which also holds three sums for each element of its tile. The fastest on an H100, for
# 100,864 rows of 768 channels: 0.28 ms; twice the tile and warps take 0.31.
_NORM_BACKWARD_TILE, _NORM_BACKWARD_WARPS = 2048, 2


@jit
def _add_norm(
    x, branch, branch_bias, weight, bias, total, normed, rows, x_stride, branch_stride, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    HAS_BRANCH: tl.constexpr, HAS_BRANCH_BIAS: tl.constexpr,
):  # fmt: skip
    """total = x + branch + branch_bias; normed = LayerNorm(total). One program takes ROWS rows."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    column = tl.arange(0, PADDED)[None, :]
    inside = (row < rows) & (column < WIDTH)
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        value += tl.load(branch + row * branch_stride + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BRANCH_BIAS:
            value += tl.load(branch_bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * WIDTH + column, rounded, mask=inside)
        value = rounded.to(tl.float32)  # the backward pass reads the rounded sum
    mean = tl.sum(value, 1)[:, None] / WIDTH
    centred = tl.where(inside, value - mean, 0.0)
    variance = tl.sum(centred * centred, 1)[:, None] / WIDTH
    scale = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    result = centred * (1 / tl.sqrt(variance + eps)) * scale + shift
    tl.store(normed + row * WIDTH + column, result.to(normed.dtype.element_ty), mask=inside)


@jit
def _add_norm_backward(
    total, d_total, d_normed, weight, d_x, partial, rows, total_stride, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, PROGRAMS: tl.constexpr,
    HAS_D_TOTAL: tl.constexpr, HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """d_x = d_total + LayerNorm's gradient; a row of partial (PROGRAMS, 3, WIDTH): sums for weight, bias, branch_bias.

    With u the normalised input and g = d_normed · weight, a row's gradient is (g - mean(g) - u · mean(g · u)) / σ.
    """
    column = tl.arange(0, PADDED)[None, :]
    scale = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if HAS_SUMS:
        d_weight = tl.zeros((ROWS, PADDED), tl.float32)
        d_bias = tl.zeros((ROWS, PADDED), tl.float32)
        d_branch_bias = tl.zeros((ROWS, PADDED), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, PROGRAMS * ROWS):
        row = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (row < rows) & (column < WIDTH)
        value = tl.load(total + row * total_stride + column, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(d_normed + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_D_TOTAL:
            residual = tl.load(d_total + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, value - tl.sum(value, 1)[:, None] / WIDTH, 0.0)
        inverse = 1 / tl.sqrt(tl.sum(centred * centred, 1)[:, None] / WIDTH + eps)
        unit = centred * inverse
        weighted = gradient * scale
        mean = tl.sum(weighted, 1)[:, None] / WIDTH
        along = tl.sum(weighted * unit, 1)[:, None] / WIDTH
        result = (weighted - mean - unit * along) * inverse
        if HAS_D_TOTAL:
            result += residual
        tl.store(d_x + row * WIDTH + column, result.to(d_x.dtype.element_ty), mask=inside)
        if HAS_SUMS:
            d_weight += gradient * unit
            d_bias += gradient
            d_branch_bias += tl.where(inside, result, 0.0)
    if HAS_SUMS:
        place = partial + tl.program_id(0) * 3 * WIDTH + tl.arange(0, PADDED)
        inside_row = tl.arange(0, PADDED) < WIDTH
        tl.store(place, tl.sum(d_weight, 0), mask=inside_row)
        tl.store(place + WIDTH, tl.sum(d_bias, 0), mask=inside_row)
        tl.store(place + 2 * WIDTH, tl.sum(d_branch_bias, 0), mask=inside_row)


@jit
def _bias_quick_gelu(x, bias, out, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out = u · σ(1.702 u), u = x + bias. One program takes a (ROWS, COLUMNS) tile."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < WIDTH)
    value = tl.load(x + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    result = value / (1 + tl.exp(-1.702 * value))
    tl.store(out + row * WIDTH + column, result.to(out.dtype.element_ty), mask=inside)


@jit
def _bias_quick_gelu_backward(
    x, bias, d_out, d_x, partial, rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PROGRAMS: tl.constexpr, HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """d_x = d_out · s · (1 + 1.702 u (1 - s)), s = σ(1.702 u); a row of partial (PROGRAMS, WIDTH): column sums."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    shift = tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if HAS_SUMS:
        d_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, PROGRAMS * ROWS):
        row = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (row < rows) & (column < WIDTH)
        value = tl.load(x + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32) + shift
        gradient = tl.load(d_out + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-1.702 * value))
        result = gradient * sigmoid * (1 + 1.702 * value * (1 - sigmoid))
        tl.store(d_x + row * WIDTH + column, result.to(d_x.dtype.element_ty), mask=inside)
        if HAS_SUMS:
            d_bias += tl.where(inside, result, 0.0)
    if HAS_SUMS:
        place = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(partial + tl.program_id(0) * WIDTH + place, tl.sum(d_bias, 0), mask=place < WIDTH)


@jit
def _join(
    a, b, c, joined, partial, rows, length, a_n, a_h, a_l, b_n, b_h, b_l, c_n, c_h, c_l,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PROGRAMS: tl.constexpr, HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """joined[n · length + l, part · WIDTH + h · SIZE + d] = part[n, h, l, d] for parts a and b, or a, b and c;
    a row of partial (PROGRAMS, PARTS · WIDTH): column sums."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    head = (column // SIZE).to(tl.int64)
    channel = column % SIZE
    if HAS_SUMS:
        sum_a = tl.zeros((ROWS, COLUMNS), tl.float32)
        sum_b = tl.zeros((ROWS, COLUMNS), tl.float32)
        sum_c = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, PROGRAMS * ROWS):
        row = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (row < rows) & (column < WIDTH)
        n = row // length
        token = row % length
        place = joined + row * (PARTS * WIDTH) + column
        value_a = tl.load(a + n * a_n + head * a_h + token * a_l + channel, mask=inside, other=0.0)
        value_b = tl.load(b + n * b_n + head * b_h + token * b_l + channel, mask=inside, other=0.0)
        if PARTS == 3:
            value_c = tl.load(c + n * c_n + head * c_h + token * c_l + channel, mask=inside, other=0.0)
            tl.store(place + 2 * WIDTH, value_c, mask=inside)
        tl.store(place, value_a, mask=inside)
        tl.store(place + WIDTH, value_b, mask=inside)
        if HAS_SUMS:
            sum_a += value_a.to(tl.float32)
            sum_b += value_b.to(tl.float32)
            if PARTS == 3:
                sum_c += value_c.to(tl.float32)
    if HAS_SUMS:
        place_of_sum = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        sums = partial + tl.program_id(0) * (PARTS * WIDTH) + place_of_sum
        tl.store(sums, tl.sum(sum_a, 0), mask=place_of_sum < WIDTH)
        tl.store(sums + WIDTH, tl.sum(sum_b, 0), mask=place_of_sum < WIDTH)
        if PARTS == 3:
            tl.store(sums + 2 * WIDTH, tl.sum(sum_c, 0), mask=place_of_sum < WIDTH)


# --- launches ---------------------------------------------------------------------------------------------------------


def row_options(width: int, tile: int = _TILE, warps: int = _WARPS) -> dict[str, int]:
    """Constants of a kernel whose tiles hold whole rows of ``width`` channels."""
    padded = triton.next_power_of_2(width)
    return {"WIDTH": width, "PADDED": padded, "ROWS": max(1, tile // padded), "num_warps": warps}


def column_options(width: int) -> dict[str, int]:
    """Constants of a kernel whose tiles hold some of ``width`` independent columns."""
    columns = min(_COLUMNS, triton.next_power_of_2(width))
    return {"WIDTH": width, "ROWS": max(1, _TILE // columns), "COLUMNS": columns, "num_warps": _WARPS}


def programs(rows: int, rows_of_tile: int, at_most: int) -> int:
    """Number of programs that share the rows of a pass that sums columns: with many rows, each has at least two
    tiles."""
    return max(1, min(at_most, triton.cdiv(rows, 2 * rows_of_tile)))


def _rows(tensor: Tensor) -> Tensor:
    """(…, width) as (rows, width) with channels side by side; a view where strides allow it."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def add_norm(
    x: Tensor, branch: Tensor | None, branch_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + branch + branch_bias, and its LayerNorm.

    Args:
        x, branch: (…, C) of the same dtype; without a branch, the sum is x itself.
        branch_bias, weight, bias: (C,), of any dtype in triton_support.DTYPES.

    Returns:
        Sum and normalised sum, (…, C), contiguous, in x's dtype.
    """
    flat = _rows(x)
    other = flat if branch is None else _rows(branch)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if branch is None else torch.empty_like(normed)
    rows, width = flat.shape
    options = row_options(width)
    with torch.cuda.device_of(x):
        _add_norm[(triton.cdiv(rows, options["ROWS"]),)](
            flat, other, weight if branch_bias is None else branch_bias, weight, bias, total, normed,
            rows, flat.stride(0), other.stride(0), eps,
            HAS_BRANCH=branch is not None, HAS_BRANCH_BIAS=branch_bias is not None, **options,
        )  # fmt: skip
    return total, normed


def add_norm_backward(
    total: Tensor, d_total: Tensor | None, d_normed: Tensor, weight: Tensor, eps: float, *, sums: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient of ``add_norm``'s x and branch, and (3, C) fp32 of its weight, bias and branch_bias if ``sums``."""
    flat, gradient = _rows(total), d_normed.contiguous()
    residual = gradient if d_total is None else d_total.contiguous()
    d_x = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    rows, width = flat.shape
    options = row_options(width, _NORM_BACKWARD_TILE, _NORM_BACKWARD_WARPS)
    number = programs(rows, options["ROWS"], 1024)
    partial = torch.empty(number if sums else 0, 3, width, dtype=torch.float32, device=total.device)
    with torch.cuda.device_of(total):
        _add_norm_backward[(number,)](
            flat, residual, gradient, weight, d_x, partial, rows, flat.stride(0), eps,
            PROGRAMS=number, HAS_D_TOTAL=d_total is not None, HAS_SUMS=sums, **options,
        )  # fmt: skip
    return d_x, partial.sum(0) if sums else None


def bias_quick_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """QuickGELU(x + bias) for (…, C) and (C,), in x's dtype."""
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    rows = x.numel() // width
    options = column_options(width)
    grid = (triton.cdiv(rows, options["ROWS"]), triton.cdiv(width, options["COLUMNS"]))
    with torch.cuda.device_of(x):
        _bias_quick_gelu[grid](x, bias, out, rows, **options)
    return out


def bias_quick_gelu_backward(x: Tensor, bias: Tensor, d_out: Tensor, *, sums: bool) -> tuple[Tensor, Tensor | None]:
    """The gradient of ``bias_quick_gelu``'s x, and (C,) fp32 of its bias if ``sums``."""
    x, d_out = x.contiguous(), d_out.contiguous()
    d_x = torch.empty_like(x)
    width = x.shape[-1]
    rows = x.numel() // width
    options = column_options(width)
    number = programs(rows, options["ROWS"], 256)
    partial = torch.empty(number if sums else 0, width, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _bias_quick_gelu_backward[(number, triton.cdiv(width, options["COLUMNS"]))](
            x, bias, d_out, d_x, partial, rows, PROGRAMS=number, HAS_SUMS=sums, **options
        )
    return d_x, partial.sum(0) if sums else None


def join(parts: tuple[Tensor, ...], *, sums: bool) -> tuple[Tensor, Tensor | None]:
    """Two or three (N, heads, L, d) tensors side by side, (N, L, parts · heads · d), and if ``sums`` the sum of each
    column over N and L, fp32."""
    parts = tuple(part if part.stride(-1) == 1 else part.contiguous() for part in parts)
    n, heads, length, size = parts[0].shape
    width = heads * size
    joined = torch.empty(n, length, len(parts) * width, dtype=parts[0].dtype, device=parts[0].device)
    options = column_options(width)
    number = programs(n * length, options["ROWS"], 256)
    partial = torch.empty(number if sums else 0, len(parts) * width, dtype=torch.float32, device=joined.device)
    three = (*parts, parts[-1])[:3]
    strides = [stride for part in three for stride in part.stride()[:3]]
    with torch.cuda.device_of(joined):
        _join[(number, triton.cdiv(width, options["COLUMNS"]))](
            *three, joined, partial, n * length, length, *strides,
            SIZE=size, PARTS=len(parts), PROGRAMS=number, HAS_SUMS=sums, **options,
        )  # fmt: skip
    return joined, partial.sum(0) if sums else None
