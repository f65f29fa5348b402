"""The update of the relevance row for one block, as Triton kernels that write no L×L map to memory.

The update (Chefer et al., ICCV 2021; see ``cfmask.masking.cam``), for a block with attention map P, its gradient G and
the row r of the blocks after it:

    P = softmax(q kᵀ / √d)          G = ∂z/∂P = (∂z/∂out) vᵀ
    r[m] ← r[m] + mean over heads of Σ_l r[l] · relu(P ⊙ G)[l, m]

In plain PyTorch P, G and their product are (N, heads, L, L) each, written and read several times: the largest tensors
of the step, bound by memory traffic. Here they exist tile by tile in registers. If a head has few keys, one kernel does
everything. Otherwise a first kernel writes the log-sum-exp of every query's scores, (N, heads, L), and a second one
recomputes P and G tile by tile and sums each key's column. Programs go over the queries in order and share no sum, so
results are bitwise reproducible.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cfmask.kernels import triton_support
from cfmask.kernels.triton_support import DTYPES, jit, tl, triton

MAX_HEAD_SIZE = 128

ONE_PASS_ELEMENTS = 256 * 64
"""Largest number of padded elements of a head's keys for which one kernel is used: keys and values then fit into shared
memory as a whole. The 50 and 197 keys of B/32 and B/16 do."""

# The fastest on an H100, for 512 images, 12 heads and 197 keys: 0.59 ms with 4 warps. 64 queries and 8 warps take 0.82,
# the two kernels 0.73.
ONE_PASS_QUERIES = 32


@jit
def _tile(
    base, stride, first, length, SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, WIDEN: tl.constexpr
):
    """Rows ``first`` to ``first + ROWS`` of a (length, SIZE) matrix as a (ROWS, PADDED) tile, zero past its edges."""
    rows = first + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, PADDED)[None, :]
    tile = tl.load(base + rows.to(tl.int64) * stride + columns, mask=(rows < length) & (columns < SIZE), other=0.0)
    if WIDEN:
        tile = tile.to(tl.float32)
    return tile


@jit
def _log_sum_exp(
    q, k, lse, q_n, q_h, q_l, k_n, k_h, k_l, heads, queries, keys, scale,
    SIZE: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """lse[n, h, l] = log2 Σ_m 2^(scale · q_l·k_m). One program takes QUERIES queries of one head."""
    blocks = (queries + QUERIES - 1) // QUERIES
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    first_query = tl.program_id(0) % blocks * QUERIES
    n = pair // heads
    h = pair % heads
    q_tile = _tile(q + n * q_n + h * q_h, q_l, first_query, queries, SIZE, PADDED, QUERIES, WIDEN)
    k += n * k_n + h * k_h
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    for first_key in range(0, keys, KEYS):
        k_tile = _tile(k, k_l, first_key, keys, SIZE, PADDED, KEYS, WIDEN)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        scores = tl.where(first_key + tl.arange(0, KEYS)[None, :] < keys, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
        peak = higher
    rows = first_query + tl.arange(0, QUERIES)
    tl.store(lse + pair * queries + rows, peak + tl.log2(total), mask=rows < queries)


@jit
def _column_sums(
    row, q, k, v, d_out, lse, sums,
    row_n, row_l, q_n, q_h, q_l, k_n, k_h, k_l, v_n, v_h, v_l, d_n, d_h, d_l,
    heads, queries, keys, scale,
    SIZE: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """sums[n, h, m] = Σ_l row[n, l] · relu(P ⊙ G)[l, m]. One program takes KEYS keys of one head."""
    blocks = (keys + KEYS - 1) // KEYS
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    first_key = tl.program_id(0) % blocks * KEYS
    n = pair // heads
    h = pair % heads
    k_tile = _tile(k + n * k_n + h * k_h, k_l, first_key, keys, SIZE, PADDED, KEYS, WIDEN)
    v_tile = _tile(v + n * v_n + h * v_h, v_l, first_key, keys, SIZE, PADDED, KEYS, WIDEN)
    row += n * row_n
    q += n * q_n + h * q_h
    d_out += n * d_n + h * d_h
    lse += pair * queries
    # Summed over queries after the loop, with one exchange between warps in all instead of one for each tile.
    weighted = tl.zeros((QUERIES, KEYS), tl.float32)
    for first_query in range(0, queries, QUERIES):
        q_tile = _tile(q, q_l, first_query, queries, SIZE, PADDED, QUERIES, WIDEN)
        d_tile = _tile(d_out, d_l, first_query, queries, SIZE, PADDED, QUERIES, WIDEN)
        rows = first_query + tl.arange(0, QUERIES)
        # Queries past the last have weight 0, P = 2^(0 - 0) and G = 0: they add nothing.
        weight = tl.load(row + rows.to(tl.int64) * row_l, mask=rows < queries, other=0.0)
        normaliser = tl.load(lse + rows, mask=rows < queries, other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        gradient = tl.dot(d_tile, tl.trans(v_tile), input_precision="ieee")
        product = tl.exp2(scores - normaliser[:, None]) * gradient
        # A network that has diverged must show: relu passes NaN on, as torch's does.
        weighted += weight[:, None] * tl.maximum(product, 0.0, propagate_nan=tl.PropagateNan.ALL)
    # For keys past the last, k = 0 and P may be infinite: their columns are not stored.
    columns = first_key + tl.arange(0, KEYS)
    tl.store(sums + pair * keys + columns, tl.sum(weighted, 0), mask=columns < keys)


@jit
def _column_sums_in_one_pass(
    row, q, k, v, d_out, sums,
    row_n, row_l, q_n, q_h, q_l, k_n, k_h, k_l, v_n, v_h, v_l, d_n, d_h, d_l,
    heads, queries, keys, scale,
    SIZE: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """``_column_sums`` for KEYS ≥ keys: all scores of a query are in one tile, so its sum of exponentials needs no
    kernel of its own. One program takes a head."""
    pair = tl.program_id(0).to(tl.int64)
    n = pair // heads
    h = pair % heads
    k_tile = _tile(k + n * k_n + h * k_h, k_l, 0, keys, SIZE, PADDED, KEYS, WIDEN)
    v_tile = _tile(v + n * v_n + h * v_h, v_l, 0, keys, SIZE, PADDED, KEYS, WIDEN)
    row += n * row_n
    q += n * q_n + h * q_h
    d_out += n * d_n + h * d_h
    columns = tl.arange(0, KEYS)
    total = tl.zeros((KEYS,), tl.float32)
    for first_query in range(0, queries, QUERIES):
        q_tile = _tile(q, q_l, first_query, queries, SIZE, PADDED, QUERIES, WIDEN)
        d_tile = _tile(d_out, d_l, first_query, queries, SIZE, PADDED, QUERIES, WIDEN)
        rows = first_query + tl.arange(0, QUERIES)
        # Queries past the last have weight 0 and G = 0: they add nothing.
        weight = tl.load(row + rows.to(tl.int64) * row_l, mask=rows < queries, other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        scores = tl.where(columns[None, :] < keys, scores, float("-inf"))
        powers = tl.exp2(scores - tl.max(scores, 1)[:, None])
        weight = weight / tl.sum(powers, 1)
        product = powers * tl.dot(d_tile, tl.trans(v_tile), input_precision="ieee")
        # A network that has diverged must show: relu passes NaN on, as torch's does.
        positive = tl.maximum(product, 0.0, propagate_nan=tl.PropagateNan.ALL)
        total += tl.sum(weight[:, None] * positive, 0)
    tl.store(sums + pair * keys + columns, total, mask=columns < keys)


def usable(row: Tensor, q: Tensor) -> bool:
    """Whether ``extend_row`` accepts these tensors: fp32 rows, and a q with heads of at most MAX_HEAD_SIZE channels for
    which ``triton_support.usable`` is true. Otherwise the caller computes in plain PyTorch."""
    return row.dtype == torch.float32 and q.shape[-1] <= MAX_HEAD_SIZE and triton_support.usable(q)


def launch_options(q: Tensor, keys: int) -> dict[str, int]:
    """The kernels' constants for such a q and so many keys. They are not tuned at run time, because the order of sums,
    and with it the last bits, depends on them."""
    _, _, queries, size = q.shape
    padded, all_keys = max(16, triton.next_power_of_2(size)), max(16, triton.next_power_of_2(keys))
    one_pass = q.element_size() == 2 and all_keys * padded <= ONE_PASS_ELEMENTS
    # fp32 tiles need twice the shared memory, and do not use tensor cores.
    block = 64 if q.element_size() == 2 else 32
    return {
        "SIZE": size,
        "PADDED": padded,
        "QUERIES": 16 if queries == 1 else ONE_PASS_QUERIES if one_pass else block,
        "KEYS": all_keys if one_pass else block,
        # Triton's interpreter would multiply bf16 matrices as the integers in which numpy stores them.
        "WIDEN": triton_support.INTERPRETED,
        "num_warps": 4,
        "num_stages": 1 if one_pass else 2,
    }


@torch.no_grad()
def extend_row(row: Tensor, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> Tensor:
    """r + r·A for one block, in memory proportional to L. Only for tensors for which ``usable`` is true.

    Scores, softmax, products and sums are computed in fp32. The host does not wait for the device, no gradient is
    computed, and equal inputs give bitwise identical results.

    Args:
        row: (N, L) fp32, the row r of the blocks after this one.
        q: (N, heads, Lq, d), d ≤ 128. Lq is L, or 1 if the block computes only the class token's query: then only
            ``row[:, 0]`` is used.
        k, v: (N, heads, L, d).
        d_out: (N, heads, Lq, d), ∂z/∂out. q, k, v and d_out have the same dtype, one of DTYPES, and any strides; views
            of an (N, L, 3, heads, d) tensor are not copied.

    Returns:
        (N, L) fp32.

    Raises:
        ValueError: other shapes or dtypes, with which the kernels would read past the tensors.
    """
    n, heads, queries, size = q.shape
    keys = row.shape[1]
    if not (
        row.shape == (n, keys)
        and queries in (1, keys)
        and size <= MAX_HEAD_SIZE
        and k.shape == v.shape == (n, heads, keys, size)
        and d_out.shape == q.shape
    ):
        shapes = ", ".join(str(tuple(t.shape)) for t in (row, q, k, v, d_out))
        raise ValueError(f"shapes of row, q, k, v, d_out don't fit together, or heads are too wide: {shapes}")
    if row.dtype != torch.float32 or q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype == d_out.dtype:
        dtypes = ", ".join(str(t.dtype) for t in (row, q, k, v, d_out))
        raise ValueError(f"row must be fp32, and q, k, v, d_out of one dtype out of {DTYPES}: {dtypes}")

    q, k, v, d_out = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, d_out))
    options = launch_options(q, keys)
    scale = size**-0.5 * math.log2(math.e)  # the kernels' exponentials are powers of two
    sums = torch.empty(n, heads, keys, dtype=torch.float32, device=row.device)
    lengths = (heads, queries, keys, scale)
    strides = (*row.stride(), *(stride for t in (q, k, v, d_out) for stride in t.stride()[:3]))
    with torch.cuda.device_of(row):  # Triton launches on the current device
        if options["KEYS"] >= keys:
            _column_sums_in_one_pass[(n * heads,)](row, q, k, v, d_out, sums, *strides, *lengths, **options)
            return row + sums.mean(1)
        lse = torch.empty(n, heads, queries, dtype=torch.float32, device=row.device)
        _log_sum_exp[(n * heads * triton.cdiv(queries, options["QUERIES"]),)](
            q, k, lse, *q.stride()[:3], *k.stride()[:3], *lengths, **options
        )
        _column_sums[(n * heads * triton.cdiv(keys, options["KEYS"]),)](
            row, q, k, v, d_out, lse, sums, *strides, *lengths, **options
        )
    return row + sums.mean(1)
