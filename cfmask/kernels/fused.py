"""Operations between the matrix products of a block, each in one pass over memory where Triton can launch.

Every function has two paths: kernels of ``fused_kernels`` with their own gradients; and plain PyTorch, which the
kernels are tested against, and which CPUs, fp64 and torch.compile use. ``triton_support.usable`` decides for a tensor.

A linear layer whose output is added to the residual stream, or goes through QuickGELU, leaves its bias to the kernel
that reads the output next (``linear_before``). So the bias's gradient, a sum over all tokens, needs no pass of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfmask.kernels import fused_kernels
from cfmask.kernels.triton_support import usable

_activations_only = False


@contextlib.contextmanager
def activation_gradients_only() -> Iterator[None]:
    """Within this context, backward passes compute no gradients of parameters.

    PyTorch's operators know whether a backward pass needs them; an autograd.Function does not. This is a variable of
    the module and not of the thread, because autograd runs a GPU's backward passes in a thread of its own."""
    global _activations_only
    before, _activations_only = _activations_only, True
    try:
        yield
    finally:
        _activations_only = before


class Branch(NamedTuple):
    """A branch to be added to the residual stream."""

    value: Tensor
    """(…, C)."""
    bias: Tensor | None = None
    """(C,), a bias that ``value`` does not include yet."""

    def complete(self) -> Tensor:
        return self.value if self.bias is None else self.value + self.bias.to(self.value.dtype)


def linear_before(layer: nn.Linear, x: Tensor) -> Branch:
    """``layer(x)``, without its bias if a kernel will add it."""
    if usable(x) and layer.bias is not None:
        return Branch(F.linear(x, layer.weight), layer.bias)
    return Branch(layer(x))


def add_norm(x: Tensor, branch: Branch | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The residual stream x (…, C) plus a branch, and the ``norm`` (LayerNorm or Identity) of the sum. Both are in the
    stream's dtype; statistics are in fp32."""
    if usable(x) and isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None:
        value, bias = branch or (None, None)
        return _AddNorm.apply(x, value, bias, norm.weight, norm.bias, norm.eps)  # type: ignore[no-any-return]
    if branch is not None:
        x = x + branch.complete()
    return x, norm(x).to(x.dtype)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        branch_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        total, normed = fused_kernels.add_norm(x, branch, branch_bias, weight, bias, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return (total.view_as(total) if branch is None else total), normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        d_total, d_normed = gradients
        total, weight = ctx.saved_tensors
        _, needs_branch, *needs_parameters, _ = ctx.needs_input_grad
        if d_normed is None:  # the loss does not depend on the normalised stream
            d_x = d_total
            d_bias = None
            if d_x is not None and needs_parameters[0] and not _activations_only:
                d_bias = d_x.flatten(0, -2).sum(0, dtype=torch.float32)
            return d_x, d_x if needs_branch else None, d_bias, None, None, None
        sums = any(needs_parameters) and not _activations_only
        d_x, d_parameters = fused_kernels.add_norm_backward(total, d_total, d_normed, weight, ctx.eps, sums=sums)
        d_weight, d_bias, d_branch_bias = (None, None, None) if d_parameters is None else d_parameters
        wanted = zip(needs_parameters, (d_branch_bias, d_weight, d_bias), strict=True)
        return d_x, d_x if needs_branch else None, *(d if need else None for need, d in wanted), None


def bias_quick_gelu(x: Branch) -> Tensor:
    """QuickGELU, u · σ(1.702 u), of u = x (…, C) with its bias (C,)."""
    if x.bias is not None:
        return _BiasQuickGELU.apply(x.value, x.bias)  # type: ignore[no-any-return]
    return _QuickGELU.apply(x.value)  # type: ignore[no-any-return]


class _BiasQuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        return fused_kernels.bias_quick_gelu(x, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        x, bias = ctx.saved_tensors
        sums = ctx.needs_input_grad[1] and not _activations_only
        return fused_kernels.bias_quick_gelu_backward(x, bias, gradients[0], sums=sums)


class _QuickGELU(torch.autograd.Function):
    """QuickGELU as SiLU(1.702 x) / 1.702. It saves one tensor for the backward pass where open_clip's module saves two,
    the widest of a block. The two factors cancel in the derivative, which is one kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scaled = 1.702 * x
        ctx.save_for_backward(scaled)
        return F.silu(scaled).mul_(1 / 1.702)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (scaled,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradients[0], scaled)


class QuickGELU(nn.Module):
    """Replaces open_clip's module; it has no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return bias_quick_gelu(Branch(x))


def split_heads(x: Tensor, weight: Tensor, bias: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, or keys and values, from one projection.

    Args:
        x: (N, L, C). weight, bias: (parts · C, C) and (parts · C,).

    Returns:
        ``parts`` tensors (N, heads, L, d), views of one tensor. Their gradients are written side by side, as the
        backward pass of the projection needs them; autograd would stack them and copy the result once more.
    """
    n, length, _ = x.shape
    parts = len(weight) // x.shape[-1]
    x = x.flatten(0, 1)
    if usable(x):
        # The product adds the bias; _SplitHeads computes its gradient at almost no cost.
        joined = F.linear(x, weight, bias.detach())
        return _SplitHeads.apply(joined.view(n, length, parts, heads, -1), bias)  # type: ignore[no-any-return]
    joined = F.linear(x, weight, bias)
    return _SplitHeads.apply(joined.view(n, length, parts, heads, -1), None)  # type: ignore[no-any-return]


class _SplitHeads(torch.autograd.Function):
    """(N, L, parts, heads, d) → its parts, each (N, heads, L, d), as views. ``bias`` was added already; its gradient is
    computed here."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        return joined.permute(2, 0, 3, 1, 4).unbind(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        n, heads, length, size = gradients[0].shape
        if usable(gradients[0]):
            sums = ctx.needs_input_grad[1] and not _activations_only
            joined, d_bias = fused_kernels.join(gradients, sums=sums)
            return joined.view(n, length, len(gradients), heads, size), d_bias
        joined = gradients[0].new_empty(n, length, len(gradients), heads, size)
        for part, gradient in enumerate(gradients):
            joined[:, :, part].copy_(gradient.transpose(1, 2))
        return joined, None
