"""Class activation maps: the relevance of each patch for a class.

A Cam hooks into one clean pass through the tower and then computes the map of a logit, by a backward pass that computes
gradients of activations only.

**Relevance** (Chefer et al., ICCV 2021, as the method uses it), for attention maps P_l and a logit z:

    A_l = mean over heads of relu(P_l ⊙ ∂z/∂P_l)          R = (I + A_D) … (I + A_1)          cam = R[0, 1:]

Only row 0 of R is needed. From the last block to the first it is r ← r + r·A_l, starting from e_0: the order of the
backward pass. So the row is accumulated during that pass, from the cotangent of each block's attention. No product of
two L×L maps is formed, and the maps of one block exist at a time (on a GPU, none: see ``relevance_kernel``). P_l is
recomputed from the block's q and k; ∂z/∂P_l = (∂z/∂out_l) vᵀ, where out_l = P_l v.

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
    """A hook into one forward pass: ``models.tower.encode`` calls ``normed`` and ``attended``; then call ``compute``
    once."""

    def normed(self, x: Tensor) -> None:
        """Called with the ``ln_1`` output (N, L, width) of each block."""

    def attended(self, block: int, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Called with the attention of each block. The return value replaces ``out``.

        Args:
            block: number of the block, from 0.
            out, q: (N, heads, L, d), or (N, heads, 1, d) if only the class token has a query.
            k, v: (N, heads, L, d).
        """
        return out

    def compute(self, target: Tensor) -> Tensor:
        """The map (N, P) of ``target`` (N,), logits of the pass: ≥ 0, unnormalised, at least fp32. The pass's graph is
        kept."""
        raise NotImplementedError


class Relevance(Cam):
    """Relevance from the blocks ``first_block`` and up (early blocks are noisy on small patches)."""

    def __init__(self, first_block: int = 0) -> None:
        self._first = first_block
        self._end: Tensor | None = None  # attention of the first block used, where the backward pass may stop
        self._tokens = 0
        self._row: Tensor | None = None  # r, during ``compute``
        self._asked = False

    def attended(self, block: int, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if block < self._first:
            return out
        # With activation checkpointing, a backward pass runs blocks again.
        if self._end is None and not self._asked:
            self._end, self._tokens = out, k.shape[2]
        return _CotangentHook.apply(out, q, k, v, self)  # type: ignore[no-any-return]

    def compute(self, target: Tensor) -> Tensor:
        if self._end is None:
            raise ValueError(f"relevance from block {self._first} on: the pass had no such block")
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
        """Called by backward passes at each block's attention, from the last block to the first."""
        if self._row is not None:  # not in the backward pass of the loss
            self._row = extend_row(self._row, q, k, v, d_out)


class GradCam(Cam):
    """Weights: the gradient summed over tokens; map: relu of the weighted sum over channels."""

    def __init__(self) -> None:
        self._x: Tensor | None = None
        self._asked = False

    def normed(self, x: Tensor) -> None:
        if not self._asked:
            self._x = x  # that of the last block is kept

    def compute(self, target: Tensor) -> Tensor:
        assert self._x is not None, "there was no pass"
        self._asked, x, self._x = True, self._x, None
        with activation_gradients_only():
            (gradient,) = torch.autograd.grad(target.sum(), x, retain_graph=True)
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            weight = gradient.to(wide).sum(1)
            return torch.einsum("nlc,nc->nl", x[:, 1:].to(wide), weight).relu_()


def build_cam(method: Method) -> Cam | None:
    """The CAM of a method; None if its masks are random."""
    if not method.by_cam:
        return None
    return GradCam() if method.cam == GRAD_CAM else Relevance(method.first_block or 0)


class _CotangentHook(torch.autograd.Function):
    """The identity on an attention's output. Its backward passes the cotangent with q, k and v to ``Relevance``.

    q, k and v are saved by autograd: they share memory with the attention's own saved tensors, and activation
    checkpointing recomputes them.
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
    """r + r·A for one block: by a Triton kernel where it can run, else with the block's maps in memory.

    Args:
        row: (N, L), at least fp32 in any precision of the network, because it is a sum of many small products.
        q, d_out: (N, heads, L, d), or (N, heads, 1, d) of the class token alone. d_out is ∂z/∂out.
        k, v: (N, heads, L, d).
    """
    if relevance_kernel.usable(row, q):
        return relevance_kernel.extend_row(row, q, k, v, d_out)
    return extend_row_with_maps(row, q, k, v, d_out)


def extend_row_with_maps(row: Tensor, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> Tensor:
    """``extend_row`` in plain PyTorch; the kernel is tested against it."""
    queries = q.shape[2]
    # Autocast would compute the products in a low precision.
    with torch.autocast(row.device.type, enabled=False):
        q, k, v, d_out = (tensor.to(row.dtype) for tensor in (q, k, v, d_out))
        attention = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
        positive = attention.mul_(d_out @ v.transpose(-2, -1)).relu_()
        return row + torch.einsum("nl,nhlm->nm", row[:, :queries], positive) / q.shape[1]
