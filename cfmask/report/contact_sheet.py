"""A contact sheet of what a model is trained on: image, CAM, mask, donor, counterfactual image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cfmask.data.images import EXTENSIONS, crop, decode
from cfmask.data.shards import Manifest
from cfmask.data.stream import eval_batches
from cfmask.errors import UserError
from cfmask.masking.cam import Relevance, build_cam
from cfmask.masking.fills import DrawSpec, draw
from cfmask.masking.masks import normalised
from cfmask.models.head import ModelInfo
from cfmask.models.tower import Classifier, Normalise
from cfmask.recipe import Method
from cfmask.report.figures import new_figure, save
from cfmask.step import counterfactual


def images_of_files(
    paths: Sequence[Path], count: int, size: int, classes: Sequence[str]
) -> tuple[Tensor, list[int | None]]:
    """Read ``count`` images of the files and folders, spread over them.

    Returns:
        Images (N, 3, size, size) uint8; class ids, where a file's folder is named after one of ``classes``.

    Raises:
        UserError: no image, or one that cannot be read.
    """
    endings = {".jpeg", ".tiff", *(f".{extension}" for extension in EXTENSIONS.values())}
    files: list[Path] = []
    for path in paths:
        files += sorted(p for p in path.rglob("*") if p.suffix.lower() in endings) if path.is_dir() else [path]
    if not files:
        raise UserError(f"There is no image under {', '.join(map(str, paths))}.")
    images = []
    chosen = files[:: max(1, len(files) // count)][:count]
    for file in chosen:
        try:
            images.append(crop(decode(file.read_bytes()), size))
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}.") from error
        except UserError as reason:
            raise UserError(f"{file} cannot be used: {reason}.") from None
    folders = [file.parent.name for file in chosen]
    return torch.stack(images), [classes.index(name) if name in classes else None for name in folders]


def images_of_set(manifest: Manifest, count: int, size: int, seed: int) -> tuple[Tensor, list[int | None]]:
    """``count`` images of the beginning of a set, chosen at random, and their class ids."""
    batch_size = min(manifest.num_samples, 256)
    batch = next(
        iter(eval_batches(manifest, image_size=size, batch_size=batch_size, rank=0, world_size=1, loader_workers=0))
    )
    chosen = np.random.default_rng(seed).permutation(len(batch.labels))[:count]
    return batch.images[chosen], [int(label) for label in batch.labels[chosen]]


def draw_contact_sheet(
    out: Path,
    model: Classifier,
    info: ModelInfo,
    images: Tensor,
    labels: Sequence[int | None],
    method: Method,
    seed: int = 0,
) -> None:
    """Write the contact sheet, a row for each image.

    Args:
        images: (N, 3, S, S) uint8.
        labels: class ids; for None, the CAM is that of the predicted class.
        seed: of the random draws of masks and donors.
    """
    cam_hook = build_cam(method) or Relevance()  # a random mask is shown beside relevance too
    logits = model.classify(model.encode(Normalise(info.mean, info.std)(images), cam=cam_hook))
    predicted = logits.argmax(1)
    classes = torch.tensor([int(predicted[i]) if label is None else label for i, label in enumerate(labels)])
    cam = cam_hook.compute(logits.gather(1, classes[:, None]).squeeze(1))
    draws = draw(DrawSpec.of(method, model.patches), len(images), np.random.default_rng(seed))
    result = counterfactual(images, cam, draws, method, model.patch_size)

    size, patch = model.image_size, model.patch_size
    whole = size // patch * patch  # pixels of a side that patches cover
    heat = normalised(cam).view(len(images), 1, *model.visual.grid_size)
    heat = torch.nn.functional.interpolate(heat, size=(whole, whole), mode="bilinear", align_corners=False)
    names = info.class_names or info.classes
    figure = new_figure(2.15 * len(images), width=9.5)
    axes = figure.subplots(len(images), 5, squeeze=False)
    for axis, title in zip(axes[0], ("", "CAM", "", "donor", "counterfactual"), strict=True):
        axis.set_title(title, fontsize=8)
    for i, row in enumerate(axes):
        picture = images[i].permute(1, 2, 0).numpy()
        grid = result.mask[i].view(model.visual.grid_size).numpy().repeat(patch, 0).repeat(patch, 1)
        row[0].imshow(picture)
        true_class = "" if labels[i] is None else f"{names[classes[i]]}, "
        row[0].set_title(f"{true_class}predicted: {names[predicted[i]]}", fontsize=8)
        row[1].imshow(picture)
        extent = (-0.5, whole - 0.5, whole - 0.5, -0.5)
        row[1].imshow(heat[i, 0].numpy(), cmap="inferno", alpha=0.6, vmin=0, vmax=1, extent=extent)
        row[1].set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
        pale = picture.copy()
        pale[:whole, :whole][grid] = 255 - (255 - pale[:whole, :whole][grid]) // 5
        row[2].imshow(pale)
        row[2].set_title(f"{method.mask} mask: {100 * result.mask[i].float().mean():.0f} % of patches", fontsize=8)
        if draws.donors is not None and draws.donors.dim() == 1:
            row[3].imshow(images[draws.donors[i]].permute(1, 2, 0).numpy())
        else:
            note = "a donor\nper patch" if draws.donors is not None else "no fill"
            row[3].text(0.5, 0.5, note, ha="center", va="center", transform=row[3].transAxes, fontsize=9)
        changed = result.images[i].permute(1, 2, 0).numpy()
        if method.fill == "no-fill":
            changed = picture.copy()
            changed[:whole, :whole][grid] = 0
        row[4].imshow(changed)
        for axis in row:
            axis.set_axis_off()
    save(figure, out, dpi=110)
