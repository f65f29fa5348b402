"""What a block computes between its matrix products, each piece in one pass over memory where Triton can launch.

Every function here has two ways: kernels of ``fused_kernels`` with gradients of their own, and plain PyTorch, which is
the oracle and the path of CPUs, fp64 and torch.compile. ``fused_path`` says which one a tensor takes.

A linear layer whose output is added to the residual stream, or goes through QuickGELU, leaves its bias to the kernel
that reads the output next (``linear_before``): so the bias's gradient, a sum over all tokens, costs no pass of its own.
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
    """Backward passes inside compute no parameter's gradient.

    PyTorch's operators see for themselves whether a pass asks for it; an autograd.Function cannot. A variable of the
    module rather than of the thread: backward passes of a GPU run in a thread of the engine.
    """
    global _activations_only
    before, _activations_only = _activations_only, True
    try:
        yield
    finally:
        _activations_only = before


class Branch(NamedTuple):
    """What is to be added to the residual stream, (…, C), and a bias (C,) that it does not have yet, or None."""

    value: Tensor
    bias: Tensor | None = None

    def complete(self) -> Tensor:
        return self.value if self.bias is None else self.value + self.bias.to(self.value.dtype)


def fused_path(x: Tensor) -> bool:
    """Whether ``x`` is computed on by kernels."""
    return usable(x)


def linear_before(layer: nn.Linear, x: Tensor) -> Branch:
    """``layer(x)``, its bias left to the next kernel where there will be one."""
    if fused_path(x) and layer.bias is not None:
        return Branch(F.linear(x, layer.weight), layer.bias)
    return Branch(layer(x))


def add_norm(x: Tensor, branch: Branch | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The residual stream with a branch added, and ``norm`` of it, in the stream's dtype with statistics in fp32.

    Args:
        x: (…, C). branch: None adds nothing. norm: a LayerNorm, or an Identity.
    """
    if fused_path(x) and isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None:
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
    """QuickGELU as SiLU(1.702 x) / 1.702: one tensor is kept for the backward pass where open_clip's module keeps two,
    and the widest of a block; and the two factors cancel in its derivative, which is one kernel."""

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
    """QuickGELU in place of open_clip's module; it has no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return bias_quick_gelu(Branch(x))


def split_heads(x: Tensor, weight: Tensor, bias: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, or keys and values, from one projection.

    Args:
        x: (N, L, C). weight, bias: (parts · C, C) and (parts · C,).

    Returns:
        ``parts`` tensors (N, heads, L, d), views of one. Their gradients are joined where the projection's backward
        pass wants them; autograd would stack them, and then copy all of it once more.
    """
    n, length, _ = x.shape
    parts = len(weight) // x.shape[-1]
    x = x.flatten(0, 1)
    if fused_path(x):
        # The product adds the bias, and _SplitHeads has its gradient for next to nothing.
        joined = F.linear(x, weight, bias.detach())
        return _SplitHeads.apply(joined.view(n, length, parts, heads, -1), bias)  # type: ignore[no-any-return]
    joined = F.linear(x, weight, bias)
    return _SplitHeads.apply(joined.view(n, length, parts, heads, -1), None)  # type: ignore[no-any-return]


class _SplitHeads(torch.autograd.Function):
    """(N, L, parts, heads, d) → its parts, each (N, heads, L, d), as views. ``bias``, if it is given, has been added
    already, and gets its gradient."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        return joined.permute(2, 0, 3, 1, 4).unbind(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        n, heads, length, size = gradients[0].shape
        if fused_path(gradients[0]):
            sums = ctx.needs_input_grad[1] and not _activations_only
            joined, d_bias = fused_kernels.join(gradients, sums=sums)
            return joined.view(n, length, len(gradients), heads, size), d_bias
        joined = gradients[0].new_empty(n, length, len(gradients), heads, size)
        for part, gradient in enumerate(gradients):
            joined[:, :, part].copy_(gradient.transpose(1, 2))
        return joined, None
