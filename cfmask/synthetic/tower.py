"""Pre-train the demo's small "CLIP": a ViT in open_clip's layout with a zero-shot head.

A caption is the name of an object on a kind of background ("star, bricks"), read from folder and file name. As on the
web, not every caption is precise: some name only the object's group ("sign, bricks"), so that fine-tuning has something
to teach. An image's caption is drawn again each time that the image is seen; with fixed captions, the tower would learn
by heart which images have a precise one.

As in CLIP, normalised image features are matched with normalised caption embeddings at a learnt temperature. There are
few captions, so all of them are candidates for every image. In place of CLIP's text tower, a caption's embedding is the
normalised sum of a learnt vector of its name and one of its background.

The zero-shot head averages a class's captions over all backgrounds, as CLIP averages over templates.
"""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfmask.data.shards import load_manifest
from cfmask.data.stream import eval_batches
from cfmask.models.head import build_tower, save_model
from cfmask.models.initial import model_info
from cfmask.models.tower import Classifier, Normalise
from cfmask.optim import warmup_then_cosine
from cfmask.recipe import Optim
from cfmask.runtime.progress import progress_bar
from cfmask.synthetic.shapes import BACKGROUNDS, CLASSES, PAPER

CONFIG = {
    "embed_dim": 128,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 56,
        "patch_size": 8,
        "width": 96,
        "layers": 4,
        "head_width": 32,
        "mlp_ratio": 4.0,
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
FEATURE_MEAN_SQUARE = 0.2
"""Mean square of a feature dimension, about that of CLIP. The pre-training loss sees normalised features and does not
set the scale, but the β of fine-tuning suits CLIP's scale."""
MAX_SCALE = 100.0
KINDS = (*BACKGROUNDS, PAPER)
GROUPS = {
    "sign": ("star", "arrow", "cross"),
    "curve": ("ring", "crescent", "heart"),
    "thing": ("house", "fish", "key", "mug"),
}
NAMED = 0.85
"""Share of captions that name the class. The others name its group."""
PARTS = 2
"""Parts of a batch, each computed by a thread of its own. Threads within an operator would wait for each other
thousands of times a step, which is twenty times slower on busy cores."""


def pretrain(
    shards: Path,
    out: Path,
    *,
    seed: int = 0,
    named: float = NAMED,
    steps: int = 1400,
    batch_size: int = 64,
    lr: float = 2e-3,
    weight_decay: float = 0.05,
    progress: bool = True,
) -> Path:
    """Train on the shards of one split and write a model file with tower and zero-shot head.

    Args:
        shards: a folder of shards, made of images whose names end in ``_<kind of background>``.
        out: the model file to write (.safetensors). The model's configuration is written beside it, as .json.
        named: share of captions that name the class instead of its group.
        seed: on one kind of machine, the same seed gives bitwise identical weights.

    Returns:
        Path of the configuration, for ``--model``; ``out`` is for ``--pretrained``.
    """
    config_path = out.with_suffix(".json")
    config_path.write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    manifest = load_manifest(shards)
    wnids = [wnid for wnid, _ in manifest.classes]
    info = model_info(str(config_path), classes=wnids, provenance=f"pre-trained for the demo, seed {seed}")

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            images, labels, kinds = _load(shards, progress)
            model = Classifier(build_tower(info), nn.Linear(CONFIG["embed_dim"], len(wnids)))  # type: ignore[arg-type]
            captions = _Captions(len(wnids), len(GROUPS), len(KINDS), CONFIG["embed_dim"])  # type: ignore[arg-type]
            normalise = Normalise(info.mean, info.std)
            settings = Optim(lr=lr, warmup_steps=60, batch_size=batch_size)
            _train(model, captions, normalise, images, labels, kinds, named, steps, settings, weight_decay, progress)
            with torch.no_grad():
                model.head.weight.copy_(captions.head())
                model.head.bias.zero_()
                _scale_features(model, normalise(images[:: max(1, len(images) // 512)]))
    finally:
        torch.set_num_threads(before)
    save_model(out, model, info)
    return config_path


class _Captions(nn.Module):
    """Embeddings of all captions, and the temperature. Names are those of the classes, then those of the groups."""

    def __init__(self, classes: int, groups: int, kinds: int, embed: int) -> None:
        super().__init__()
        self.classes = classes
        self.names = nn.Parameter(torch.randn(classes + groups, embed))
        self.kinds = nn.Parameter(torch.randn(kinds, embed))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def scale(self) -> Tensor:
        return self.logit_scale.exp().clamp(max=MAX_SCALE)

    def embeddings(self) -> Tensor:
        """(names, kinds, D), normalised."""
        names, kinds = F.normalize(self.names, dim=-1), F.normalize(self.kinds, dim=-1)
        return F.normalize(names[:, None] + kinds, dim=-1)

    def head(self) -> Tensor:
        """(classes, D): the mean of each class's captions, normalised, times the scale."""
        return self.scale() * F.normalize(self.embeddings()[: self.classes].mean(1), dim=-1)


def _names(labels: Tensor, named: float) -> Tensor:
    """Names for captions of images: numbers of classes, or with probability 1 - ``named`` of groups. int64 (N,)."""
    group = torch.tensor([[name in members for members in GROUPS.values()].index(True) for name in CLASSES])
    return torch.where(torch.rand(len(labels)) < named, labels, len(CLASSES) + group[labels])


def _train(
    model: Classifier,
    captions: _Captions,
    normalise: Normalise,
    images: Tensor,
    labels: Tensor,
    kinds: Tensor,
    named: float,
    steps: int,
    settings: Optim,
    weight_decay: float,
    progress: bool,
) -> None:
    parameters = [*model.visual.parameters(), *captions.parameters()]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    lr, warmup_steps = settings.lr, settings.warmup_steps
    assert lr is not None and warmup_steps is not None
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    order = torch.empty(0, dtype=torch.int64)
    right = torch.zeros(())

    def part(pixels: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The part's share of the batch's loss, its features, and its gradients."""
        features = F.normalize(model.visual(normalise(pixels)), dim=-1)
        logits = captions.scale() * features @ captions.embeddings().flatten(0, 1).T
        loss = F.cross_entropy(logits, wanted, reduction="sum") / settings.batch_size
        return loss.detach(), features.detach(), torch.autograd.grad(loss, parameters)

    with (
        ThreadPoolExecutor(PARTS, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        progress_bar(total=steps * settings.batch_size, unit=" images", desc="pre-train", disable=not progress) as bar,
    ):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * warmup_then_cosine(step, steps, warmup_steps)
            if len(order) < settings.batch_size:
                order = torch.randperm(len(images))
            chosen, order = order[: settings.batch_size], order[settings.batch_size :]
            wanted = _names(labels[chosen], named) * len(KINDS) + kinds[chosen]
            inputs = _augment(images[chosen]).chunk(PARTS), wanted.chunk(PARTS)
            losses, features, gradients = zip(*pool.map(part, *inputs), strict=True)
            for parameter, *shares in zip(parameters, *gradients, strict=True):
                parameter.grad = sum(shares[1:], shares[0])
            nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            optimizer.step()

            with torch.no_grad():
                answers = (torch.cat(features) @ captions.head().T).argmax(1)
                right = right.lerp((answers == labels[chosen]).float().mean(), 0.05 if step else 1.0)
            bar.update(settings.batch_size)
            if step % 20 == 0:
                bar.set_postfix_str(f"loss {sum(losses).item():.2f}, zero-shot {100 * right.item():.0f} %")


def _augment(images: Tensor, reach: int = 5) -> Tensor:
    """Flip at random and shift by up to ``reach`` pixels, edges mirrored. uint8 (N, 3, S, S) in and out."""
    n, _, size, _ = images.shape
    images = torch.where(torch.rand(n, 1, 1, 1) < 0.5, images.flip(-1), images)
    place = torch.arange(size) + torch.randint(-reach, reach + 1, (2, n, 1))
    y, x = (size - 1) - ((size - 1) - place.abs()).abs()
    return images[torch.arange(n)[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def _scale_features(model: Classifier, pixels: Tensor) -> None:
    """Scale the projection so that features have FEATURE_MEAN_SQUARE. Normalised features do not change."""
    mean_square = model.visual(pixels).square().mean()
    model.visual.proj.mul_((FEATURE_MEAN_SQUARE / mean_square).sqrt())  # type: ignore[union-attr, operator]


def _load(shards: Path, progress: bool) -> tuple[Tensor, Tensor, Tensor]:
    """All images of a split, uint8 (N, 3, S, S); their class labels and kinds of background, int64 (N,)."""
    manifest = load_manifest(shards)
    size = CONFIG["vision_cfg"]["image_size"]  # type: ignore[index]
    images, labels, kinds = [], [], []
    batches = eval_batches(manifest, image_size=size, batch_size=256, rank=0, world_size=1, loader_workers=1)
    with progress_bar(total=manifest.num_samples, unit=" images", desc="read", disable=not progress) as bar:
        for batch in batches:
            images.append(batch.images)
            labels.append(batch.labels)
            kinds += [KINDS.index(key.rsplit("_", 1)[1]) for key in batch.keys]
            bar.update(len(batch.labels))
    return torch.cat(images), torch.cat(labels), torch.tensor(kinds)
