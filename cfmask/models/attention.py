"""Multi-head self-attention with a hook for CAMs, and open_clip's parameter names.

open_clip's blocks use ``nn.MultiheadAttention``, which offers either fused attention or attention maps. Relevance needs
q, k and v, from which a map can be recomputed. This module always uses fused attention and has the same parameters
under the same names, so its state dict is that of plain open_clip."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfmask.kernels.fused import split_heads

Tap = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""A hook: takes (out, q, k, v), each (N, heads, tokens, d), and returns what replaces ``out``."""


class Attention(nn.Module):
    """Self-attention over ``width`` channels in ``heads`` heads, batch first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    @classmethod
    def sharing(cls, other: nn.MultiheadAttention) -> Attention:
        """The same attention as ``other``, with shared parameters."""
        assert other.in_proj_weight is not None and other.in_proj_bias is not None
        # On the meta device, parameters that are replaced need no memory and no random numbers.
        with torch.device("meta"):
            attention = cls(other.embed_dim, other.num_heads)
        attention.in_proj_weight = other.in_proj_weight
        attention.in_proj_bias = other.in_proj_bias
        attention.out_proj = other.out_proj
        return attention

    def attend(
        self, x: Tensor, hidden: Tensor | None = None, *, class_token_only: bool = False, tap: Tap | None = None
    ) -> Tensor:
        """Self-attention, up to its output projection.

        Args:
            x: (N, L, width).
            hidden: (N, L) bool, True for tokens that no query may see; token 0 must be visible.
            class_token_only: compute only the row of token 0.
            tap: called with out, q, k and v.

        Returns:
            The concatenated outputs of the heads: (N · L, width), or (N, width).
        """
        n, _, width = x.shape
        if class_token_only:
            queries = F.linear(x[:, 0], self.in_proj_weight[:width], self.in_proj_bias[:width])
            q = queries.view(n, 1, self.heads, -1).transpose(1, 2)
            k, v = split_heads(x, self.in_proj_weight[width:], self.in_proj_bias[width:], self.heads)
        else:
            q, k, v = split_heads(x, self.in_proj_weight, self.in_proj_bias, self.heads)
        visible = None if hidden is None else ~hidden[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        if tap is not None:
            out = tap(out, q, k, v)
        return out.transpose(1, 2).reshape(-1, width)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Called by open_clip's own block, so that the tower also runs in plain open_clip."""
        if need_weights or attn_mask is not None or key is not query or value is not query:
            raise NotImplementedError("an image tower's blocks call this for unmasked self-attention only")
        return self.out_proj(self.attend(query)).view(query.shape), None
