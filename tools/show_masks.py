#!/usr/bin/env python3
"""A contact sheet of what the model is trained on: image, CAM over it, mask, donor, counterfactual image.

    python tools/show_masks.py RUN --shards DIR --set val --out masks.png
    python tools/show_masks.py MODEL --images photos/*.jpg --out masks.png

The CAM is for the true class where it is known (shards; or a parent folder named after a class), else for the
class that the model answers.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

try:
    import numpy as np
    import torch
    from torch import Tensor

    from cfmask.data.images import EXTENSIONS, crop, decode
    from cfmask.data.shards import Manifest, load_sets
    from cfmask.data.stream import eval_batches
    from cfmask.errors import UserError
    from cfmask.masking.cam import (
        Relevance,
        build_cam,
    )
    from cfmask.masking.fills import DrawSpec, draw
    from cfmask.masking.masks import normalised
    from cfmask.models.head import ModelInfo
    from cfmask.models.tower import Classifier, Normalise
    from cfmask.recipe import Method, Recipe
    from cfmask.runtime.command import exits_cleanly
    from cfmask.step import counterfactual
    from cfmask.tool_arguments import DATA_HELP, MODEL_HELP, load_models, recorded_method
    from tools._progress import stages
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--images", nargs="+", type=Path, metavar="FILE", help="image files, or folders of them")
    parser.add_argument("--shards", metavar="DIR_OR_URL", help=DATA_HELP)
    parser.add_argument("--set", default="val", metavar="SET", help="folder under --shards (default: val)")
    parser.add_argument("--count", type=int, default=8, metavar="N", help="images on the contact sheet (default: 8)")
    parser.add_argument(
        "--mask", choices=("object", "context", "random"), help="what is masked (default: the run's, or object)"
    )
    parser.add_argument(
        "--fill",
        choices=("single-fill", "multi-fill", "no-fill"),
        help="what comes in its place (default: the run's, or single-fill)",
    )
    parser.add_argument(
        "--threshold", type=float, metavar="X", help="CAM threshold, in 0…1 (default: the run's, or the paper's)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of images and donors (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("masks.png"), metavar="FILE", help="picture to write (default: masks.png)"
    )
    arguments = parser.parse_args(argv)
    if bool(arguments.images) == bool(arguments.shards):
        raise UserError("Give either --images or --shards: what to show the masks of.")

    with stages(3) as begin:
        begin("reading the model")
        [model], info = load_models([arguments.model])
        method = _method(arguments)
        begin("reading images")
        if arguments.images:
            images, labels = _from_files(arguments.images, arguments.count, model.image_size, info)
        else:
            [manifest] = load_sets(arguments.shards, [arguments.set]).values()
            images, labels = _from_shards(manifest, arguments.count, model.image_size, arguments.seed)
        begin("masking and drawing")
        draw_sheet(arguments.out, model, info, images, labels, method, arguments.seed)
    print(f"written: {arguments.out}")


def _method(arguments: argparse.Namespace) -> Method:
    recorded = recorded_method(arguments.model) or Method()
    if not recorded.masked or arguments.mask or arguments.fill:
        method = Method(mask=arguments.mask, fill=arguments.fill, threshold=arguments.threshold)
    elif arguments.threshold is not None:
        method = replace(recorded, threshold=arguments.threshold)
    else:
        method = recorded
    return Recipe(method=method).resolved().method


def _from_files(paths: list[Path], count: int, size: int, info: ModelInfo) -> tuple[Tensor, list[int | None]]:
    endings = {".jpeg", ".tiff", *(f".{extension}" for extension in EXTENSIONS.values())}
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix.lower() in endings)
        else:
            files.append(path)
    if not files:
        raise UserError(f"There is no image under {', '.join(map(str, paths))}.")
    chosen = files[:: max(1, len(files) // count)][:count]
    images, labels = [], []
    for file in chosen:
        try:
            images.append(crop(decode(file.read_bytes()), size))
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}.") from error
        except UserError as reason:
            raise UserError(f"{file} cannot be used: {reason}.") from None
        labels.append(info.classes.index(file.parent.name) if file.parent.name in info.classes else None)
    return torch.stack(images), labels


def _from_shards(manifest: Manifest, count: int, size: int, seed: int) -> tuple[Tensor, list[int | None]]:
    batches = eval_batches(
        manifest, image_size=size, batch_size=min(manifest.num_samples, 256), rank=0, world_size=1, loader_workers=0
    )
    batch = next(iter(batches))
    chosen = np.random.default_rng(seed).permutation(len(batch.labels))[:count]
    return batch.images[chosen], [int(label) for label in batch.labels[chosen]]


def draw_sheet(
    out: Path,
    model: Classifier,
    info: ModelInfo,
    images: Tensor,
    labels: list[int | None],
    method: Method,
    seed: int = 0,
) -> None:
    """Write the contact sheet. images: (N, 3, S, S) uint8; labels: class ids, None where unknown."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    normalise = Normalise(info.mean, info.std)
    cam_hook = build_cam(method) or Relevance()  # a random mask is shown beside relevance too
    logits = model.classify(model.encode(normalise(images), cam=cam_hook))
    answers = logits.argmax(1)
    known = torch.tensor([int(answers[i]) if label is None else label for i, label in enumerate(labels)])
    cam = cam_hook.compute(logits.gather(1, known[:, None]).squeeze(1))
    draws = draw(DrawSpec.of(method, model.patches), len(images), np.random.default_rng(seed))
    cf = counterfactual(images, cam, draws, method, model.patch_size)

    size, patch = model.image_size, model.patch_size
    whole = size // patch * patch
    columns = ["image", "CAM", f"{method.mask} mask", "donor", "counterfactual"]
    figure, axes = plt.subplots(
        len(images), len(columns), figsize=(1.9 * len(columns), 2.15 * len(images)), squeeze=False, layout="constrained"
    )
    names = info.class_names or info.classes
    heat = normalised(cam).view(len(images), 1, *model.visual.grid_size)
    heat = torch.nn.functional.interpolate(heat, size=(whole, whole), mode="bilinear", align_corners=False)
    for i, row in enumerate(axes):
        picture = images[i].permute(1, 2, 0).numpy()
        grid = cf.mask[i].view(model.visual.grid_size).numpy().repeat(patch, 0).repeat(patch, 1)
        hidden = picture.copy()
        hidden[:whole, :whole][grid] = 255 - (255 - hidden[:whole, :whole][grid]) // 5
        changed = cf.images[i].permute(1, 2, 0).numpy()
        if method.fill == "no-fill":
            changed = picture.copy()
            changed[:whole, :whole][grid] = 0
        row[0].imshow(picture)
        row[1].imshow(picture)
        row[1].imshow(
            heat[i, 0].numpy(), cmap="inferno", alpha=0.6, vmin=0, vmax=1, extent=(-0.5, whole - 0.5, whole - 0.5, -0.5)
        )
        row[1].set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
        row[2].imshow(hidden)
        if draws.donors is not None and draws.donors.dim() == 1:
            row[3].imshow(images[draws.donors[i]].permute(1, 2, 0).numpy())
        else:
            note = "a donor\nper patch" if draws.donors is not None else "no fill"
            row[3].text(0.5, 0.5, note, ha="center", va="center", transform=row[3].transAxes, fontsize=9)
        row[4].imshow(changed)
        truth = "" if labels[i] is None else f"{names[known[i]]}, "
        row[0].set_title(f"{truth}answer: {names[answers[i]]}", fontsize=8)
        row[2].set_title(f"{method.mask} mask: {100 * cf.mask[i].float().mean():.0f} % of patches", fontsize=8)
        for axis, title in zip(row, columns, strict=True):
            axis.set_axis_off()
            if i == 0 and title in ("CAM", "donor", "counterfactual"):
                axis.set_title(title, fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
