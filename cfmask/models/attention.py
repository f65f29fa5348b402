"""Multi-head self-attention that lets a CAM see what it does, with open_clip's parameter names.

open_clip's blocks hold an ``nn.MultiheadAttention``, which gives either fused attention or attention maps, never the
cheap thing relevance needs: the q, k, v that a map can be rebuilt from. The module here has the same parameters under
the same names, so a checkpoint goes in and out of plain open_clip without a key changed, and always runs fused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tap = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Sees (out, q, k, v), each (N, heads, tokens, d); what it returns goes on in place of out."""


class _Apart(torch.autograd.Function):
    """(N, L, parts, heads, d) → its parts, each (N, heads, L, d), as views. Their gradients are put together where the
    projection's backward pass wants them; autograd would stack them, and then copy all of it once more."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor) -> tuple[Tensor, ...]:
        return joined.permute(2, 0, 3, 1, 4).unbind(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        n, heads, length, size = gradients[0].shape
        joined = gradients[0].new_empty(n, length, len(gradients), heads, size)
        for part, gradient in enumerate(gradients):
            joined[:, :, part].copy_(gradient.transpose(1, 2))
        return joined


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
        """The same attention as ``other``, holding the very same parameters."""
        assert other.in_proj_weight is not None and other.in_proj_bias is not None
        # Built on meta: no memory is touched and no random number is drawn for weights that are replaced.
        with torch.device("meta"):
            attention = cls(other.embed_dim, other.num_heads)
        attention.in_proj_weight = other.in_proj_weight
        attention.in_proj_bias = other.in_proj_bias
        attention.out_proj = other.out_proj
        return attention

    def attend(
        self, x: Tensor, hidden: Tensor | None = None, *, class_token_only: bool = False, tap: Tap | None = None
    ) -> Tensor:
        """Self-attention.

        Args:
            x: (N, L, width).
            hidden: (N, L) bool, True for tokens that no query may see; token 0 must be visible.
            class_token_only: token 0 alone asks. Its row is the same; the others are not computed.
            tap: shown each call's out, q, k and v.

        Returns:
            (N, L, width), or (N, 1, width).
        """
        n, length, width = x.shape
        if class_token_only:
            queries = F.linear(x[:, :1], self.in_proj_weight[:width], self.in_proj_bias[:width])
            q = queries.view(n, 1, self.heads, -1).transpose(1, 2)
            seen = F.linear(x, self.in_proj_weight[width:], self.in_proj_bias[width:])
            k, v = _Apart.apply(seen.view(n, length, 2, self.heads, -1))
        else:
            qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
            q, k, v = _Apart.apply(qkv.view(n, length, 3, self.heads, -1))
        visible = None if hidden is None else ~hidden[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        if tap is not None:
            out = tap(out, q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """The call that open_clip's own block makes, so that a tower still runs as plain open_clip."""
        if need_weights or attn_mask is not None or key is not query or value is not query:
            raise NotImplementedError("an image tower's blocks call this for unmasked self-attention only")
        return self.attend(query), None
