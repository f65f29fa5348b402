"""The class activation map: relevance of each patch for a class, streamed one block at a time.

The definition (Chefer et al., ICCV 2021, as the method uses it), for attention maps P_l and a logit z:

    A_l = mean over heads of relu(P_l ⊙ ∂z/∂P_l)          R = (I + A_D) … (I + A_1)          cam = R[0, 1:]

Only row 0 of R is needed. Built from the last block to the first it is r ← r + r·A_l, starting from e_0:
no L×L product between blocks is ever formed, and one block's maps live at a time. P_l is rebuilt from the
block's q and k; ∂z/∂P_l = (∂z/∂out_l) vᵀ, where out_l = P_l v.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cfmask.models.attention import Trace


@torch.no_grad()
def extend_row(row: Tensor, trace: Trace, d_out: Tensor) -> Tensor:
    """r + r·A for one block.

    Args:
        row: (N, L), at least fp32, whatever the network runs in: it is a sum of many small products.
        trace: the block's q, k, v (N, heads, L, d).
        d_out: (N, heads, L, d), ∂z/∂out.
    """
    q, k, v, _ = trace
    # Autocast would take the last product back to the network's own, low precision.
    with torch.autocast(row.device.type, enabled=False):
        return _extend(row, q, k, v, d_out.to(v.dtype))


def _extend(row: Tensor, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> Tensor:
    attention = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).to(row.dtype).softmax(-1)
    d_attention = (d_out @ v.transpose(-2, -1)).to(row.dtype)
    positive = (attention * d_attention).relu_()
    return row + torch.einsum("nl,nhlm->nm", row, positive) / q.shape[1]


def relevance(target: Tensor, traces: Sequence[Trace], first_block: int = 0) -> Tensor:
    """Relevance of every patch for a scalar per image. The graph of ``target`` is kept.

    The backward pass runs to the blocks' attention outputs only: no weight gradient is computed.

    Args:
        target: (N,), the logit of each image's class.
        traces: the blocks' traces of the pass that gave ``target``, first block first, no token dropped.
        first_block: blocks before it are left out (early blocks are noisy on small patches).

    Returns:
        (N, P), ≥ 0, unnormalised, at least fp32.
    """
    used = traces[first_block:]
    d_outs = torch.autograd.grad(target.sum(), [trace.out for trace in used], retain_graph=True)
    n, _, length, _ = used[0].q.shape
    row = torch.zeros(n, length, device=target.device, dtype=torch.promote_types(target.dtype, torch.float32))
    row[:, 0] = 1
    for trace, d_out in zip(reversed(used), reversed(d_outs), strict=True):
        row = extend_row(row, trace, d_out)
    return row[:, 1:]
