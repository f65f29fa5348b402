"""The image tower: an open_clip VisionTransformer whose forward pass can drop or hide tokens and call a CAM's hooks,
and computes nothing that its features do not need."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cfmask.errors import UserError
from cfmask.kernels import fused
from cfmask.kernels.fused import Branch, add_norm, linear_before
from cfmask.masking.cam import Cam
from cfmask.models.attention import Attention


def replace_attention(visual: nn.Module) -> VisionTransformer:
    """Replace the attention of every block of an open_clip tower by ``Attention``, in place, with shared parameters.

    Raises:
        UserError: not a ViT with a class token and open_clip's default blocks. Relevance is defined for the class
            token's row of softmax attention maps.
    """
    if not isinstance(visual, VisionTransformer):
        raise UserError(
            f"The image tower is a {type(visual).__name__}; relevance needs an open_clip VisionTransformer. "
            "Choose a ViT model, for example ViT-B-32-quickgelu."
        )
    if visual.attn_pool is not None or visual.pool_type != "tok" or visual.proj is None:
        raise UserError(
            "The image tower pools by attention or by average, or has no projection; relevance needs the class token's "
            "row. Choose a ViT with class-token pooling, for example ViT-B-32-quickgelu."
        )
    for block in visual.transformer.resblocks:
        if not isinstance(block, ResidualAttentionBlock):
            raise UserError(
                f"The image tower's blocks are {type(block).__name__} (qk-norm or other variants), whose "
                "attention is not the softmax(q kᵀ/√d) that relevance is defined on. Choose another model."
            )
        if isinstance(block.attn, nn.MultiheadAttention):
            block.attn = Attention.sharing(block.attn)
        if isinstance(block.mlp.gelu, QuickGELU):
            block.mlp.gelu = fused.QuickGELU()
    visual.output_tokens = False
    return visual


def encode(
    visual: VisionTransformer,
    pixels: Tensor,
    *,
    keep: Tensor | None = None,
    hidden: Tensor | None = None,
    cam: Cam | None = None,
    recompute: bool = False,
    compiled: bool = False,
) -> Tensor:
    """Features (N, D) of a batch: class token after ln_post, projected, not normalised; at least fp32.

    Args:
        pixels: (N, 3, H, W), normalised.
        keep: (N, K) int64, patches that stay (0 … P-1); the others are dropped after the positional embedding and
            ln_pre. None keeps all.
        hidden: (N, P) bool, patches that no query of any block may see. The class token is never hidden.
        cam: hooks into the pass.
        recompute: activation checkpointing: keep only the input of each block, and recompute the rest in the backward
            pass.
        compiled: run blocks through torch.compile. It is ignored with a CAM, because the backward pass of a compiled
            block always computes gradients of weights.
    """
    x = embed(visual, pixels)
    if hidden is not None and not x.is_cuda:
        # Dropping hidden patches gives the same class token at less cost. On a GPU it would need a wait, for the number
        # of patches that are left.
        keep, hidden = visible_first(hidden)
    if keep is not None:
        tokens = F.pad(keep + 1, (1, 0))  # the class token, index 0, is always kept
        # Rows are indexed: the backward pass of a deterministic gather would sort every channel.
        x = x[torch.arange(x.shape[0], device=x.device)[:, None], tokens]
    hidden_tokens = None if hidden is None else F.pad(hidden, (1, 0), value=False)
    # (N · L, width) from here on, so that matrix products need no views.
    n, x = x.shape[0], x.flatten(0, 1)
    blocks = visual.transformer.resblocks
    branch: Branch | None = None
    for number, block in enumerate(blocks):
        last = number == len(blocks) - 1
        if compiled and cam is None:
            run = partial(_run_compiled, block, n=n, hidden=hidden_tokens, last=last)
        else:
            run = partial(_run_block, block, n=n, hidden=hidden_tokens, last=last, cam=cam, number=number)
        if recompute and torch.is_grad_enabled():
            # One tensor is kept for each block: the stream with the block's own branch added.
            x = checkpoint(partial(_run_whole_block, run), x, use_reentrant=False, preserve_rng_state=False)
        else:
            x, branch = run(x, branch)
    _, normed = add_norm(x, branch, visual.ln_post)
    # A small product, in full precision because features are compared by small differences.
    with torch.autocast(x.device.type, enabled=False):
        return normed.to(torch.promote_types(normed.dtype, torch.float32)) @ visual.proj


def embed(visual: VisionTransformer, pixels: Tensor) -> Tensor:
    """(N, L, width) tokens after ln_pre, of (N, 3, H, W) pixels.

    The convolution of patches is computed as a matrix product with one row for each patch. In deterministic mode cuDNN
    does not choose convolutions by their time, and its choice for B/16 is slow.
    """
    patch, (rows, columns) = visual.patch_size, visual.grid_size
    # Pixels beyond the last whole patch are ignored.
    whole = pixels[:, :, : rows * patch[0], : columns * patch[1]]
    cells = whole.unflatten(3, (columns, patch[1])).unflatten(2, (rows, patch[0])).permute(0, 2, 4, 1, 3, 5)
    low = torch.get_autocast_dtype(pixels.device.type) if torch.is_autocast_enabled(pixels.device.type) else None
    patches = torch.empty(cells.shape, dtype=low or pixels.dtype, device=pixels.device).copy_(cells)
    x = F.linear(patches.flatten(3).flatten(1, 2), visual.conv1.weight.flatten(1), visual.conv1.bias)
    class_token = visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
    x = torch.cat([class_token, x], 1) + visual.positional_embedding.to(x.dtype)
    return add_norm(visual.patch_dropout(x), None, visual.ln_pre)[1]


def _run_block(
    block: ResidualAttentionBlock,
    x: Tensor,
    branch: Branch | None,
    *,
    n: int,
    hidden: Tensor | None,
    last: bool,
    cam: Cam | None = None,
    number: int = 0,
) -> tuple[Tensor, Branch]:
    """One block. It leaves the branch of its MLP to the next block, which adds it in the pass of its first norm.

    Args:
        x, branch: (N · L, width), the stream, and the branch that the previous block has left.
        n: number of images, N.

    Returns:
        The stream without this block's MLP, and the MLP's branch, (N · L, width). The last block returns those of the
        class tokens alone, (N, width).
    """
    x, normed = add_norm(x, branch, block.ln_1)
    tokens = normed.view(n, -1, normed.shape[-1])
    tap = None
    if cam is not None:
        cam.normed(tokens)
        tap = partial(cam.attended, number)
    attended = linear_before(block.attn.out_proj, block.attn.attend(tokens, hidden, class_token_only=last, tap=tap))
    if last:
        x = x.view(n, -1, x.shape[-1])[:, 0]
    x, normed = add_norm(x, _scaled(block.ls_1, attended), block.ln_2)
    inner = linear_before(block.mlp.c_fc, normed)
    if isinstance(block.mlp.gelu, fused.QuickGELU):
        activated = fused.bias_quick_gelu(inner)
    else:
        activated = block.mlp.gelu(inner.complete())
    return x, _scaled(block.ls_2, linear_before(block.mlp.c_proj, activated))


def _scaled(scale: nn.Module, branch: Branch) -> Branch:
    """A branch through its LayerScale, if there is one, in the branch's dtype."""
    if isinstance(scale, nn.Identity):
        return branch
    return Branch(scale(branch.complete()).to(branch.value.dtype))


def _run_whole_block(run: Callable[..., tuple[Tensor, Branch]], x: Tensor) -> Tensor:
    x, branch = run(x, None)
    return x + branch.complete()


def store_products_in(model: Classifier, dtype: torch.dtype) -> None:
    """Convert the matrices of a frozen Classifier, in place, to the dtype to which autocast would cast them in every
    pass.

    Results are the same, without the casts and in half the memory. Norms, biases, embeddings and the head stay in fp32.
    """
    visual = model.visual
    layers: list[tuple[nn.Module, str]] = [(visual.conv1, "weight")]
    for block in visual.transformer.resblocks:
        layers += [(block.attn, "in_proj_weight"), (block.attn.out_proj, "weight")]
        layers += [(block.mlp.c_fc, "weight"), (block.mlp.c_proj, "weight")]
    for layer, name in layers:
        parameter = getattr(layer, name)
        if parameter.requires_grad:
            raise ValueError("weights that are trained stay in fp32")
        parameter.data = parameter.data.to(dtype)


class Compiled:
    """A function through torch.compile. After a failure, which it warns of once, it runs uncompiled."""

    def __init__(self, function: Callable, backend: str | Callable = "inductor") -> None:
        self._plain, self._backend = function, backend
        self._compiled: Callable | None = None
        self._failed = False

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not self._failed:
            try:
                if self._compiled is None:  # only now, because the compiler takes seconds to import
                    self._compiled = torch.compile(self._plain, backend=self._backend)
                return self._compiled(*arguments, **options)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of any type
                self._failed = True
                reason = " ".join(str(error).split())[:300]
                warnings.warn(
                    f"torch.compile fails ({type(error).__name__}: {reason}); blocks run uncompiled", stacklevel=2
                )
        return self._plain(*arguments, **options)


_run_compiled = Compiled(_run_block)


def visible_first(hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Drop as many hidden patches as possible while all images of the batch keep the same number. Waits for the device.

    Args:
        hidden: (N, P) bool.

    Returns:
        The patches to keep, (N, K) int64, the visible ones first; and which of them to hide, (N, K) bool or None.
    """
    most = int((~hidden).sum(1).max())
    keep = hidden.to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    left = hidden.gather(1, keep)
    return keep, left if bool(left.any()) else None


class ClassifierOutput(NamedTuple):
    """Output of a ``Classifier``."""

    features: Tensor
    """(N, D), not normalised."""
    logits: Tensor
    """(N, classes)."""
    clean_logits: Tensor | None
    """Logits of the ``clean_features`` that were passed in."""


class Classifier(nn.Module):
    """Image tower and linear head.

    State dict: ``visual.*`` exactly as in an open_clip CLIP, ``head.weight`` (classes, D), ``head.bias``.
    """

    recompute = False
    """Activation checkpointing (``encode``)."""

    compiled = False
    """Run passes without a CAM through torch.compile (``encode``)."""

    def __init__(self, visual: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.visual = replace_attention(visual)
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

    def encode(
        self, pixels: Tensor, *, keep: Tensor | None = None, hidden: Tensor | None = None, cam: Cam | None = None
    ) -> Tensor:
        """``encode`` of this model's tower."""
        return encode(
            self.visual,
            pixels,
            keep=keep,
            hidden=hidden,
            cam=cam,
            recompute=self.recompute,
            compiled=self.compiled,
        )

    def classify(self, features: Tensor) -> Tensor:
        """(N, D) unnormalised features → (N, classes) logits. The head's input is L2-normalised."""
        with torch.autocast(features.device.type, enabled=False):
            return self.head(F.normalize(features, dim=-1))

    def forward(
        self,
        pixels: Tensor,
        *,
        keep: Tensor | None = None,
        hidden: Tensor | None = None,
        clean_features: Tensor | None = None,
    ) -> ClassifierOutput:
        """Features and logits; ``keep`` and ``hidden`` as in ``encode``.

        A counterfactual pass also classifies the detached features of the clean pass, so that every parameter takes
        part in the one pass whose gradients DDP synchronises."""
        features = self.encode(pixels, keep=keep, hidden=hidden)
        clean = None if clean_features is None else self.classify(clean_features)
        return ClassifierOutput(features, self.classify(features), clean)


class Normalise(nn.Module):
    """Pixels → the tower's input, by mean and standard deviation of each channel."""

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
