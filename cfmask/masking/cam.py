"""Class activation maps: which patches of an image its class was read from.

A Cam watches one clean pass through the tower and is then asked for the map of a logit; it takes what it needs from a
backward pass that computes activation gradients only.

**Relevance** (Chefer et al., ICCV 2021, as the method uses it), for attention maps P_l and a logit z:

    A_l = mean over heads of relu(P_l ⊙ ∂z/∂P_l)          R = (I + A_D) … (I + A_1)          cam = R[0, 1:]

Only row 0 of R is needed. Built from the last block to the first it is r ← r + r·A_l, starting from e_0: the order in
which the backward pass comes through the blocks. So each block's attention hands its cotangent over as the pass goes
by, no L×L product between blocks is ever formed, and one block's maps live at a time (on a GPU, none: see
``relevance_kernel``). P_l is rebuilt from the block's q and k; ∂z/∂P_l = (∂z/∂out_l) vᵀ, where out_l = P_l v.

**Grad-CAM** (Selvaraju et al., ICCV 2017) at the last block's ``ln_1`` output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cfmask.kernels import relevance_kernel
from cfmask.kernels.fused import activation_gradients_only
from cfmask.recipe import Method

RELEVANCE, GRAD_CAM = "relevance", "grad-cam"


class Cam:
    """What watches a pass (``models.tower.encode`` calls the first two), and is asked once."""

    def normed(self, x: Tensor) -> None:
        """A block's ``ln_1`` output (N, L, width), block by block."""

    def attended(self, block: int, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A block's attention; what is returned goes on in place of ``out``.

        Args:
            block: from 0.
            out, q: (N, heads, L, d), or (N, heads, 1, d) where the class token alone asks.
            k, v: (N, heads, L, d).
        """
        return out

    def compute(self, target: Tensor) -> Tensor:
        """The map of each image's ``target`` (N,), a logit of the pass watched: (N, P), ≥ 0, unnormalised, at least
        fp32. The graph of the pass stays."""
        raise NotImplementedError


class Relevance(Cam):
    """Relevance from the blocks ``first_block`` and up (early blocks are noisy on small patches)."""

    def __init__(self, first_block: int = 0) -> None:
        self._first = first_block
        self._end: Tensor | None = None  # the first used block's attention: where the backward pass may stop
        self._tokens = 0
        self._row: Tensor | None = None  # r, while it is being asked for
        self._asked = False

    def attended(self, block: int, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if block < self._first:
            return out
        # With activation checkpointing blocks come by again, in a backward pass.
        if self._end is None and not self._asked:
            self._end, self._tokens = out, k.shape[2]
        return _CotangentHook.apply(out, q, k, v, self)  # type: ignore[no-any-return]

    def compute(self, target: Tensor) -> Tensor:
        if self._end is None:
            raise ValueError(f"relevance from block {self._first} on: no such block has been seen")
        self._asked, end, self._end = True, self._end, None
        dtype = torch.promote_types(end.dtype, torch.float32)
        self._row = torch.zeros(len(end), self._tokens, device=end.device, dtype=dtype)
        self._row[:, 0] = 1
        try:
            with activation_gradients_only():
                torch.autograd.grad(target.sum(), end, retain_graph=True)
            return self._row[:, 1:]
        finally:
            self._row = None

    def accumulate(self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """A backward pass has come to a block's attention, blocks in falling order."""
        if self._row is not None:  # not, say, the loss's own backward pass
            self._row = extend_row(self._row, q, k, v, d_out)


class GradCam(Cam):
    """Weights: the gradient summed over tokens; map: relu of the weighted sum over channels."""

    def __init__(self) -> None:
        self._x: Tensor | None = None
        self._asked = False

    def normed(self, x: Tensor) -> None:
        if not self._asked:
            self._x = x  # the last block's stays

    def compute(self, target: Tensor) -> Tensor:
        assert self._x is not None, "no pass was watched"
        self._asked, x, self._x = True, self._x, None
        with activation_gradients_only():
            (gradient,) = torch.autograd.grad(target.sum(), x, retain_graph=True)
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            weight = gradient.to(wide).sum(1)
            return torch.einsum("nlc,nc->nl", x[:, 1:].to(wide), weight).relu_()


def build_cam(method: Method) -> Cam | None:
    """What watches the clean pass, if masks depend on it."""
    if not method.by_cam:
        return None
    return GradCam() if method.cam == GRAD_CAM else Relevance(method.first_block or 0)


class _CotangentHook(torch.autograd.Function):
    """The identity on an attention's output, whose backward lets relevance accumulate the cotangent with q, k and v.

    They are saved as autograd saves, so they share the attention's own saved tensors, and with activation checkpointing
    they are computed again like these.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, q: Tensor, k: Tensor, v: Tensor, listener: Relevance) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.listener = listener
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (d_out,) = gradients
        ctx.listener.accumulate(d_out, *ctx.saved_tensors)
        return d_out, None, None, None, None


@torch.no_grad()
def extend_row(row: Tensor, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> Tensor:
    """r + r·A for one block, with its maps in memory or, on a GPU with Triton, without.

    Args:
        row: (N, L), at least fp32, whatever the network runs in: it is a sum of many small products.
        q, d_out: (N, heads, L, d), or (N, heads, 1, d): the class token's alone. d_out is ∂z/∂out.
        k, v: (N, heads, L, d).
    """
    if relevance_kernel.usable(row, q):
        return relevance_kernel.extend_row(row, q, k, v, d_out)
    return extend_row_with_maps(row, q, k, v, d_out)


def extend_row_with_maps(row: Tensor, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> Tensor:
    """``extend_row`` in plain PyTorch; the oracle of the kernel."""
    queries = q.shape[2]
    # Autocast would take the products to the network's own, low precision.
    with torch.autocast(row.device.type, enabled=False):
        q, k, v, d_out = (tensor.to(row.dtype) for tensor in (q, k, v, d_out))
        attention = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
        positive = attention.mul_(d_out @ v.transpose(-2, -1)).relu_()
        return row + torch.einsum("nl,nhlm->nm", row[:, :queries], positive) / q.shape[1]
