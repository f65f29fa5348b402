"""A contact sheet of what a model is trained on: image, CAM, mask, donor, counterfactual image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cfmask.data.images import EXTENSIONS, crop, decode
from cfmask.data.shards import Manifest
from cfmask.data.stream import eval_batches
from cfmask.errors import UserError
from cfmask.masking.cam import Relevance, build_cam
from cfmask.masking.fills import MULTI_FILL, NO_FILL, SINGLE_FILL, Draws, DrawSpec, draw
from cfmask.masking.masks import normalised
from cfmask.models.head import ModelInfo, load_model
from cfmask.models.tower import Classifier, Normalise
from cfmask.recipe import Method
from cfmask.report.figures import save
from cfmask.report.sheet import Cell, contact_sheet, hatched, heat_map, pixels_of
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


def images_to_read(count: int) -> int:
    """Images to read for a sheet of ``count`` samples: a single one needs another image as its donor."""
    return max(count, 2)


def draw_contact_sheet(
    out: Path,
    model: Classifier,
    info: ModelInfo,
    images: Tensor,
    labels: Sequence[int | None],
    method: Method,
    count: int,
    seed: int = 0,
) -> None:
    """Write the contact sheet, a column for each sample. Donors are drawn as in training, except that the draw is
    repeated until none of the samples is its own donor.

    Args:
        images: (N, 3, S, S) uint8: the samples and possible donors. With one image, the sheet says that there is none.
        labels: class ids; for None, the CAM is that of the predicted class.
        count: samples to show, the first of the images.
        seed: of the random draws of masks and donors.
    """
    cam_hook = build_cam(method) or Relevance()  # a random mask is shown beside relevance too
    logits = model.classify(model.encode(Normalise(info.mean, info.std)(images), cam=cam_hook))
    predicted = logits.argmax(1)
    classes = torch.tensor([int(predicted[i]) if label is None else label for i, label in enumerate(labels)])
    cam = cam_hook.compute(logits.gather(1, classes[:, None]).squeeze(1))
    draws = draws_for_sheet(method, model.patches, len(images), count, seed)
    result = counterfactual(images, cam, draws, method, model.patch_size)

    size, patch = model.image_size, model.patch_size
    whole = size // patch * patch  # pixels of a side that patches cover
    heat = normalised(cam).view(len(images), 1, *model.visual.grid_size)
    heat = torch.nn.functional.interpolate(heat, size=(whole, whole), mode="bilinear", align_corners=False)
    pictures = images.permute(0, 2, 3, 1).numpy()
    changed = result.images.permute(0, 2, 3, 1).numpy()
    names = info.class_names or info.classes
    shown = []
    for i in range(min(count, len(images))):
        name, guess = names[classes[i]], names[predicted[i]]
        masked = pixels_of(result.mask[i].view(model.visual.grid_size).numpy(), patch, size)
        share = f"{100 * result.mask[i].float().mean():.0f} %"
        donor, counterfactual_image = _donor(i, draws, method, pictures, [names[c] for c in classes]), changed[i]
        if method.fill == NO_FILL:
            counterfactual_image = np.where(masked[..., None], 0, pictures[i]).astype(np.uint8)
        shown.append(
            [
                Cell(
                    pictures[i], name if labels[i] is not None and guess == name else _caption(labels[i], name, guess)
                ),
                Cell(heat_map(pictures[i], heat[i, 0].numpy())),
                Cell(hatched(pictures[i], masked), share),
                donor,
                Cell(counterfactual_image),
            ]
        )
    whose = "true class" if all(label is not None for label in labels[:count]) else "class"
    rows = ("image", f"CAM of its {whose}", f"{method.mask} mask, share of patches", "donor", "counter-\nfactual image")
    note = "→: the predicted class, where it is another one or the true class is unknown."
    save(contact_sheet(rows, shown, note=note if any("→" in cells[0].caption for cells in shown) else ""), out)


def draw_sheet_of_run(out: Path, file: Path, method: Method, manifest: Manifest, *, count: int = 6) -> None:
    """Write the contact sheet of images of a set, as a model sees them that was trained with masks.

    Args:
        file: model file.
        method: resolved, with a mask.
        count: samples to show.

    Raises:
        UserError: the model or the set cannot be read.
        OSError: likewise.
    """
    model, info = load_model(file)
    images, labels = images_of_set(manifest, images_to_read(count), model.image_size, seed=0)
    draw_contact_sheet(out, model, info, images, labels, method, count)


def draws_for_sheet(method: Method, patches: int, n: int, count: int, seed: int) -> Draws:
    """Draws for n images, of which none of the first ``count`` is its own donor, unless there is only one image."""
    spec, rng = DrawSpec.of(method, patches), np.random.default_rng(seed)
    if spec is not None and spec.fill == MULTI_FILL and n == 1:
        spec = replace(spec, fill=SINGLE_FILL)  # multi-fill cannot be drawn without other images
    while True:
        draws = draw(spec, n, rng)
        if n == 1 or draws.donors is None or draws.donors.dim() > 1:
            return draws
        if bool((draws.donors != torch.arange(n))[:count].all()):  # on average every third draw, or more
            return draws


def _caption(label: int | None, name: str, guess: str) -> str:
    return f"→ {guess}" if label is None else f"{name}\n→ {guess}"


def _donor(i: int, draws: Draws, method: Method, pictures: np.ndarray, names: Sequence[str]) -> Cell:
    if draws.donors is None:
        return Cell("no fill: patches are removed")
    if len(pictures) == 1:
        return Cell("none: there is no other image")
    if draws.donors.dim() > 1:
        return Cell("a donor for each patch")
    donor = int(draws.donors[i])
    return Cell(pictures[donor], names[donor])
