"""The image tower: an open_clip VisionTransformer whose forward pass can drop, hide and trace tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from cfmask.errors import UserError
from cfmask.models.attention import Attention, Trace


def adopt(visual: nn.Module) -> VisionTransformer:
    """Give every block of an open_clip tower our Attention, in place, sharing its parameters.

    Raises:
        UserError: not a plain ViT with a class token and open_clip's default blocks: relevance is defined
            on the class token's row of softmax attention maps.
    """
    if not isinstance(visual, VisionTransformer):
        raise UserError(
            f"The image tower is a {type(visual).__name__}; relevance needs an open_clip VisionTransformer. "
            "Choose a ViT model, for example ViT-B-32-quickgelu."
        )
    if visual.attn_pool is not None or visual.pool_type != "tok" or visual.proj is None:
        raise UserError(
            "The image tower pools by attention or by average, or has no projection; relevance is read from "
            "the class token's row. Choose a ViT with class-token pooling, for example ViT-B-32-quickgelu."
        )
    for block in visual.transformer.resblocks:
        if not isinstance(block, ResidualAttentionBlock):
            raise UserError(
                f"The image tower's blocks are {type(block).__name__} (qk-norm or other variants), whose "
                "attention is not the softmax(q kᵀ/√d) that relevance is defined on. Choose another model."
            )
        if isinstance(block.attn, nn.MultiheadAttention):
            block.attn = Attention.sharing(block.attn)
    visual.output_tokens = False
    return visual


def encode(
    visual: VisionTransformer,
    pixels: Tensor,
    *,
    keep: Tensor | None = None,
    hidden: Tensor | None = None,
    trace: bool = False,
) -> tuple[Tensor, list[Trace]]:
    """Features of a batch and, if asked for, what each block's attention leaves for relevance.

    Args:
        pixels: (N, 3, H, W), normalised.
        keep: (N, K) int64, patches that stay (0 … P-1); the others are dropped after the positional
            embedding and ln_pre. None keeps all.
        hidden: (N, P) bool, patches that no query of any block may see. The class token is never hidden.
            For the class token this equals dropping them.
        trace: keep the blocks' traces. Without a graph that would hold them anyway, they are most of the memory.

    Returns:
        features (N, D): class token after ln_post, projected, not normalised; and the blocks' traces,
        first block first, or none.
    """
    x = visual._embeds(pixels)
    if keep is not None:
        tokens = F.pad(keep + 1, (1, 0))  # the class token, index 0, always stays
        x = x.gather(1, tokens[..., None].expand(-1, -1, x.shape[-1]))
    hidden_tokens = None if hidden is None else F.pad(hidden, (1, 0), value=False)

    traces = []
    for block in visual.transformer.resblocks:
        attended, left = block.attn.attend(block.ln_1(x), hidden_tokens)
        if trace:
            traces.append(left)
        x = x + block.ls_1(attended)
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
    # ln_post works token by token, so the class token can be taken before it as well as after.
    return visual.ln_post(x[:, 0]) @ visual.proj, traces


class Classifier(nn.Module):
    """Image tower and linear head: the model that is trained, and whose weights are averaged.

    State dict: ``visual.*`` exactly as in an open_clip CLIP, ``head.weight`` (classes, D), ``head.bias``.
    """

    def __init__(self, visual: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.visual = adopt(visual)
        self.head = head
        if head.in_features != self.visual.output_dim:
            raise UserError(
                f"The head takes {head.in_features}-d features, the tower gives {self.visual.output_dim}-d "
                "ones: they belong to different models. Build the head with the tower's own model."
            )

    @property
    def image_size(self) -> int:
        return self.visual.image_size[0]

    @property
    def patch_size(self) -> int:
        return self.visual.patch_size[0]

    @property
    def patches(self) -> int:
        """Patches of an image, P; masks are (N, P)."""
        return self.visual.grid_size[0] * self.visual.grid_size[1]

    def classify(self, features: Tensor) -> Tensor:
        """(N, D) features as the tower gives them → (N, classes) logits; the head sees them normalised."""
        return self.head(F.normalize(features, dim=-1))

    def forward(
        self,
        pixels: Tensor,
        *,
        keep: Tensor | None = None,
        hidden: Tensor | None = None,
        head_input: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Features (N, D) and logits (N, classes); ``keep`` and ``hidden`` as in ``encode``.

        ``head_input`` gives the head other features than this pass's own. A counterfactual pass hands in
        the clean pass's, detached, so that every parameter takes part in the one pass whose gradients DDP
        synchronises.
        """
        features, _ = encode(self.visual, pixels, keep=keep, hidden=hidden)
        return features, self.classify(features if head_input is None else head_input)


class Normalise(nn.Module):
    """uint8 or [0, 1] pixels → the tower's input, by its mean and standard deviation per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 in 0…255 or floating point in 0…1 → same shape, the dtype of the mean."""
        unit = images.to(self.mean.dtype)
        if images.dtype == torch.uint8:
            unit = unit / 255
        return (unit - self.mean) / self.std
