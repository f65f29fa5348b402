"""One training step by the authors' algorithm, which the fused step is compared with.

It is written from the method's description, in the plainest way and with no work added. Every pass runs the modules of
the unmodified tower with attention maps in memory, one pass after the other:

    CAM forward 1F, CAM backward 1F, masked teacher 1F, clean student 1F, masked student 1F, joint backward 4F      9F

F is one forward of the tower. Object mask, single-fill and feature distillation: the paper's headline row.

Source: Xiao et al., "Masked Images Are Counterfactual Samples for Robust Fine-tuning", CVPR 2023; relevance by Chefer
et al., ICCV 2021.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

THRESHOLD, BETA = 0.3, 30.0


class StepResult(NamedTuple):
    loss: Tensor
    """Scalar."""
    mask: Tensor
    """Masked patches, (N, P) bool."""


def authors_step(
    student: VisionTransformer,
    head: nn.Linear,
    teacher: VisionTransformer,
    normalise: nn.Module,
    images: Tensor,
    labels: Tensor,
    donors: Tensor,
) -> StepResult:
    """Add a batch's gradients to the parameters of ``student`` and ``head``.

    Args:
        student, teacher: open_clip's own towers with class token and projection. The teacher is frozen.
        normalise: maps pixels (N, 3, H, W) to the towers' input.
        images: (N, 3, H, W) uint8 or [0, 1]; H and W are multiples of the patch size.
        labels: (N,) int64.
        donors: (N,) int64, the images whose patches replace masked ones.
    """
    patch = student.patch_size[0]

    features, maps = forward(student, normalise(images))
    target = classify(head, features).gather(1, labels[:, None]).sum()
    cam = relevance(maps, torch.autograd.grad(target, maps))
    mask = cam / (cam.amax(1, keepdim=True) + 1e-8) > THRESHOLD
    del features, maps, target  # and the graph of the pass

    masked = normalise(single_fill(images, mask, donors, patch))
    with torch.no_grad():
        teacher_features, _ = forward(teacher, masked)
    logits = classify(head, forward(student, normalise(images))[0])
    student_features, _ = forward(student, masked)
    loss = F.cross_entropy(logits, labels) + BETA * F.mse_loss(student_features, teacher_features)
    loss.backward()
    return StepResult(loss.detach(), mask)


def forward(visual: VisionTransformer, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Features (N, D), and the attention maps of each block (N, heads, L, L), in the graph."""
    x, maps = visual._embeds(pixels), []
    for block in visual.transformer.resblocks:
        attended, attention = attend(block.attn, block.ln_1(x))
        x = x + block.ls_1(attended)
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
        maps.append(attention)
    pooled, _ = visual._pool(x)
    return pooled @ visual.proj, maps


def attend(attn: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Self-attention (N, L, width) and its maps (N, heads, L, L)."""
    n, length, width = x.shape
    qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = qkv.view(n, length, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    attention = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
    return attn.out_proj((attention @ v).transpose(1, 2).reshape(n, length, width)), attention


def classify(head: nn.Linear, features: Tensor) -> Tensor:
    """(N, classes) logits."""
    return head(F.normalize(features, dim=-1))


@torch.no_grad()
def relevance(maps: list[Tensor], gradients: tuple[Tensor, ...]) -> Tensor:
    """(N, P): the class token's row of R = (I + A_D) … (I + A_1), A = mean over heads of relu(P ⊙ ∂z/∂P).

    All of R is computed, in fp32 or wider in every precision.
    """
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    n, _, length, _ = maps[0].shape
    with torch.autocast(maps[0].device.type, enabled=False):
        product = torch.eye(length, dtype=dtype, device=maps[0].device).expand(n, length, length)
        for attention, gradient in zip(maps, gradients, strict=True):
            a = (attention.to(dtype) * gradient.to(dtype)).relu().mean(1)
            product = product + a @ product
    return product[:, 0, 1:]


def single_fill(images: Tensor, mask: Tensor, donors: Tensor, patch: int) -> Tensor:
    """Replace masked patches (N, P) by the donors' patches, through an index of the image that each pixel is from."""
    n, channels, height, width = images.shape
    pixels = mask.view(n, 1, height // patch, width // patch)
    pixels = pixels.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    own = torch.arange(n, device=images.device)
    source = torch.where(pixels, donors.view(n, 1, 1, 1), own.view(n, 1, 1, 1))
    return images.gather(0, source.expand(n, channels, height, width))
