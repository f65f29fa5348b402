#!/usr/bin/env python3
"""Do masks fall on the object? What models' CAMs mask, beside segmentation masks (appendix A.2 of the paper).

    python tools/validate_masks.py RUN --shards DIR --set train --segmentation MASKS --out mask-validation
    python tools/validate_masks.py RUN/checkpoints/step-* RUN --shards DIR --set val --segmentation MASKS

For each threshold and group of classes, averaged over images, in percent of pixels:

    image masking rate   of the image, what is masked
    object masking rate  of the object, what is masked (a mask that knew nothing would have the image masking rate)
    IoU                  of what is masked or the object, what is both

    OUT/table.md  results.json      the numbers; images without any pixel of the object are left out of the last two
    OUT/curves.png                  the same over thresholds
    OUT/sheet.png                   contact sheet of the last model: image, object, mask, overlap
    OUT/parts.jsonl                 what is done, shard by shard: stopped at any moment, the same command goes on there

MASKS are a folder of PNGs or run-length JSONs named by sample key, a COCO annotation file (panoptic, or run-length
encoded instances), or shards that tools/segment.py makes with Mask2Former.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cfmask.data.segmentation import Segmented, categories, class_groups, open_masks, segmented_samples  # noqa: E402
from cfmask.data.shards import Manifest, Shard, load_sets  # noqa: E402
from cfmask.data.stream import check_image_size  # noqa: E402
from cfmask.errors import UserError, exits_cleanly  # noqa: E402
from cfmask.evaluate import check_classes  # noqa: E402
from cfmask.files import sha256_of, write_atomically  # noqa: E402
from cfmask.masking.fills import OBJECT  # noqa: E402
from cfmask.masking.validation import THRESHOLDS, Tally, add_up, coverage, masks_at, rates, tally  # noqa: E402
from cfmask.models.head import ModelInfo  # noqa: E402
from cfmask.models.tower import Classifier, Normalise  # noqa: E402
from cfmask.recipe import Method, Recipe  # noqa: E402
from cfmask.report import table  # noqa: E402
from cfmask.runs import find_model  # noqa: E402
from cfmask.runtime.jsonl import append_lines, read_lines  # noqa: E402
from cfmask.step import camera_of  # noqa: E402
from tools._shared import (  # noqa: E402
    DATA_HELP,
    MODEL_HELP,
    add_compute_arguments,
    load_models,
    recorded_method,
)

RATES = ("image masking rate", "object masking rate", "IoU")

Tallies = list[dict[str, Tally]]
"""By model, by group."""


@dataclass(frozen=True)
class Part:
    """What one shard gave; no tallies if it has no mask. missing: keys of samples without one."""

    shard: str
    tallies: Tallies
    missing: list[str]

    def to_line(self) -> dict[str, Any]:
        tallies = [{group: t.to_lists() for group, t in of_model.items()} for of_model in self.tallies]
        return {"shard": self.shard, "missing": self.missing, "tallies": tallies}

    @classmethod
    def from_line(cls, line: dict[str, Any]) -> Part:
        tallies = [{group: Tally.from_lists(t) for group, t in of_model.items()} for of_model in line["tallies"]]
        return cls(line["shard"], tallies, line["missing"])


class Validation:
    """Models, with a set and its masks, and what is asked of them."""

    def __init__(
        self,
        models: Sequence[Classifier],
        methods: Sequence[Method],
        info: ModelInfo,
        manifest: Manifest,
        masks: str,
        groups: dict[str, frozenset[int]],
        thresholds: Sequence[float],
        *,
        device: str,
        batch_size: int,
        loader_workers: int,
    ) -> None:
        self.models = [model.to(device).eval().requires_grad_(False) for model in models]
        self.methods, self.manifest, self.groups, self.thresholds = methods, manifest, groups, thresholds
        self._normalise = Normalise(info.mean, info.std).to(device)
        self._masks, self._categories = open_masks(masks), categories(manifest.classes)
        self._device, self._batch_size, self._threads = device, batch_size, loader_workers
        self._wanted = np.array(sorted(frozenset().union(*groups.values())))
        self._first_ids = np.concatenate([[0], np.cumsum(manifest.sample_counts)])

    def ids(self, number: int) -> list[int]:
        """Samples of a shard that are of any group."""
        labels = self.manifest.open_index(self.manifest.shards[number]).labels
        return (self._first_ids[number] + np.flatnonzero(np.isin(labels, self._wanted))).tolist()

    def samples(self, ids: Sequence[int]):
        return segmented_samples(
            self.manifest,
            ids,
            self._masks,
            image_size=self.models[0].image_size,
            category=self._categories.__getitem__,
            threads=self._threads,
        )

    def relevance(self, model: Classifier, method: Method, samples: Sequence[Segmented]) -> Tensor:
        """CAM (N, P) of each sample's class."""
        camera = camera_of(method)
        assert camera is not None
        images = torch.stack([sample.image for sample in samples]).to(self._device)
        labels = torch.tensor([sample.label for sample in samples], device=self._device)
        # The pixels ask for a gradient and the weights do not, so nothing is kept for theirs.
        logits = model.classify(model.encode(self._normalise(images).requires_grad_(), cam=camera))
        return camera.of(logits.gather(1, labels[:, None]).squeeze(1))

    def part(self, shard: Shard, ids: Sequence[int], bar: tqdm) -> Part:
        """Go through one shard's samples."""
        batches: list[Tallies] = []
        missing: list[str] = []
        batch: list[Segmented] = []

        def settle() -> None:
            segmentation = torch.stack([s.mask for s in batch if s.mask is not None]).to(self._device)
            labels = np.array([sample.label for sample in batch])
            of_batch: Tallies = []
            for model, method in zip(self.models, self.methods, strict=True):
                cam = self.relevance(model, method, batch)
                found = rates(
                    masks_at(cam, self.thresholds, method.mask or OBJECT), coverage(segmentation, model.patch_size)
                )
                chosen = {
                    group: torch.from_numpy(np.isin(labels, list(classes))).to(self._device)
                    for group, classes in self.groups.items()
                }
                of_batch.append({group: tally(found, rows) for group, rows in chosen.items()})
            batches.append(of_batch)
            batch.clear()

        for sample in self.samples(ids):
            if sample.mask is None:
                missing.append(sample.key)
            else:
                batch.append(sample)
            if len(batch) == self._batch_size:
                settle()
            bar.update()
        if batch:
            settle()
        return Part(shard.name, [add_up(of_model) for of_model in zip(*batches, strict=True)], missing)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    check_arguments(arguments)
    models, info = load_models(arguments.models)
    methods = [method_of(path, arguments) for path in arguments.models]
    [manifest] = load_sets(arguments.shards, [arguments.set]).values()
    check_classes(manifest, info.classes)
    check_image_size(manifest, models[0].image_size)
    validation = Validation(
        models,
        methods,
        info,
        manifest,
        arguments.segmentation,
        class_groups(manifest.classes, arguments.groups),
        arguments.thresholds,
        device=arguments.device,
        batch_size=arguments.batch_size,
        loader_workers=arguments.loader_workers,
    )
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        done = claim(arguments.out / "parts.jsonl", identity(arguments, validation), arguments.out)
        parts = go_through(validation, done, arguments.out / "parts.jsonl", arguments.allow_missing_masks)
        report(validation, parts, arguments)
    except OSError as error:
        raise UserError(f"{arguments.out} cannot be written ({error.strerror}). Choose another --out.") from None


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("models", nargs="+", metavar="MODEL", help=MODEL_HELP)
    p.add_argument("--shards", required=True, metavar="DIR_OR_URL", help=DATA_HELP)
    p.add_argument("--set", default="val", metavar="SET", help="folder under --shards (default: val)")
    p.add_argument("--segmentation", required=True, metavar="PATH", help="segmentation masks of the set; see above")
    p.add_argument(
        "--groups",
        nargs="+",
        metavar="GROUP",
        help="classes to average over: dog, cat, bird (ImageNet's 118, 5 and 21), all, or a class of the set by folder "
        "or display name (default: those of the first four that the set has; all is then these three together)",
    )
    p.add_argument(
        "--thresholds",
        nargs="+",
        type=float,
        default=THRESHOLDS,
        metavar="X",
        help="CAM thresholds, in 0…1 (default: 0.1 0.2 … 0.9)",
    )
    p.add_argument("--mask", choices=("object", "context"), help="what is masked (default: the run's, or object)")
    p.add_argument(
        "--cam", choices=("relevance", "grad-cam"), help="class activation map (default: the run's, or relevance)"
    )
    p.add_argument(
        "--first-block", type=int, metavar="N", help="first block that relevance uses (default: the run's, or 0)"
    )
    p.add_argument(
        "--allow-missing-masks",
        action="store_true",
        help="leave out samples that have no mask, and say how many (default: an error)",
    )
    p.add_argument("--count", type=int, default=8, metavar="N", help="images on the contact sheet (default: 8)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of these images (default: 0)")
    add_compute_arguments(p, batch_size=64)  # a CAM needs a backward pass, and its memory
    p.add_argument(
        "--out",
        type=Path,
        default=Path("mask-validation"),
        metavar="DIR",
        help="folder for the numbers and pictures above (default: mask-validation)",
    )
    return p


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises: UserError: values out of range."""
    if not all(0 <= threshold < 1 for threshold in arguments.thresholds):
        raise UserError("--thresholds must lie in 0…1, 1 excluded: no patch's relevance is above its image's maximum.")
    if len(set(arguments.thresholds)) != len(arguments.thresholds):
        raise UserError(f"--thresholds has a value twice: {' '.join(map(str, arguments.thresholds))}.")
    for flag, least in (("batch_size", 1), ("loader_workers", 0), ("count", 0), ("seed", 0)):
        if getattr(arguments, flag) < least:
            raise UserError(f"--{flag.replace('_', '-')} must be at least {least}.")


def method_of(path: str, arguments: argparse.Namespace) -> Method:
    """What is asked for, else what the model's run did, else the paper's."""
    recorded = recorded_method(path)
    if recorded is None or not recorded.by_cam:
        recorded = Recipe().resolved().method
    mask, cam = arguments.mask or recorded.mask, arguments.cam or recorded.cam
    first_block = recorded.first_block if cam == recorded.cam else None
    method = Method(
        mask=mask,
        fill=recorded.fill,
        threshold=recorded.threshold if mask == recorded.mask else None,
        cam=cam,
        first_block=first_block if arguments.first_block is None else arguments.first_block,
    )
    return Recipe(method=method).resolved().method


def identity(arguments: argparse.Namespace, validation: Validation) -> dict[str, Any]:
    """What decides the numbers: parts of two validations can be put together only if all of it is the same."""
    return {
        "models": [sha256_of(find_model(path)) for path in arguments.models],
        "cams": [[m.mask, m.cam, m.first_block] for m in validation.methods],
        "set": validation.manifest.digest,
        "segmentation": str(Path(arguments.segmentation).absolute()),
        "groups": {name: sorted(ids) for name, ids in validation.groups.items()},
        "thresholds": list(arguments.thresholds),
    }


def claim(path: Path, asked: dict[str, Any], out: Path) -> list[Part]:
    """The parts that are done; begins the file if there is none.

    Raises:
        UserError: it is of another validation.
    """
    lines = read_lines(path)
    if not lines:
        append_lines(path, [asked])
        return []
    begun, *parts = lines
    if begun != asked:
        other = ", ".join(name for name in asked if begun.get(name) != asked[name])
        raise UserError(
            f"{out} holds a validation of other {other}. Choose another --out, or delete {path} if it is not needed."
        )
    return [Part.from_line(line) for line in parts]


def go_through(validation: Validation, done: Sequence[Part], record: Path, allow_missing: bool) -> list[Part]:
    """What is not done yet, shard by shard.

    Raises:
        UserError: samples without a mask, unless that is allowed; none that has one.
    """
    shards = validation.manifest.shards
    parts = {part.shard: part for part in done}
    ids = [validation.ids(number) for number in range(len(shards))]
    if not any(ids):
        raise UserError(f"{validation.manifest.root} has no sample of {', '.join(validation.groups)}.")
    there = sum(len(rows) for rows, shard in zip(ids, shards, strict=True) if shard.name in parts)
    with tqdm(total=sum(map(len, ids)), initial=there, unit="image", desc="masks", dynamic_ncols=True) as bar:
        for shard, rows in zip(shards, ids, strict=True):
            if rows and shard.name not in parts:
                part = validation.part(shard, rows, bar)
                if part.missing and not allow_missing:
                    raise UserError(
                        f"{len(part.missing)} of {len(rows)} samples of {validation.manifest.place(shard)} have no "
                        f"mask, {part.missing[0]} for one. A mask is named by its sample's key, or like the file that "
                        f"the image was; a name that is there twice names none. --allow-missing-masks leaves such "
                        f"samples out, and says how many."
                    )
                append_lines(record, [part.to_line()])
                parts[shard.name] = part
    if not any(part.tallies for part in parts.values()):
        raise UserError(f"None of the {sum(map(len, ids))} samples has a mask.")
    return [parts[shard.name] for shard in shards if shard.name in parts]


# --- what came of it --------------------------------------------------------------------------------------------------


def report(validation: Validation, parts: Sequence[Part], arguments: argparse.Namespace) -> None:
    """Write and print what the parts make together."""
    out, paths, thresholds = arguments.out, arguments.models, validation.thresholds
    totals: Tallies = [add_up(of_model) for of_model in zip(*(p.tallies for p in parts if p.tallies), strict=True)]
    missing = [key for part in parts for key in part.missing]

    text = as_text(paths, validation.methods, totals, thresholds, missing)
    write_atomically(out / "table.md", text + "\n")
    results = {
        "set": str(validation.manifest.root),
        "segmentation": arguments.segmentation,
        "thresholds": list(thresholds),
        "without_mask": len(missing),
        "models": [
            {
                "model": path,
                "mask": method.mask,
                "cam": method.cam,
                "first_block": method.first_block,
                "groups": {group: sums.to_result() for group, sums in of_model.items()},
            }
            for path, method, of_model in zip(paths, validation.methods, totals, strict=True)
        ],
    }
    write_atomically(out / "results.json", json.dumps(results, indent=2))
    draw_curves(out / "curves.png", paths, validation.methods, totals, thresholds)
    pictures = [out / "curves.png"]
    if arguments.count:
        samples = choose(validation, arguments.count, arguments.seed)
        draw_sheet(out / "sheet.png", validation, samples)
        pictures.append(out / "sheet.png")
    print(text)
    print("\nwritten:", *(out / "table.md", out / "results.json", *pictures))


def as_text(
    paths: Sequence[str],
    methods: Sequence[Method],
    totals: Tallies,
    thresholds: Sequence[float],
    missing: Sequence[str],
) -> str:
    """A table a model: thresholds × groups × rates."""
    blocks = []
    for path, method, of_model in zip(paths, methods, totals, strict=True):
        header = ["threshold", *(f"{group}: {rate}" for group in of_model for rate in ("image", "object", "IoU"))]
        columns = [values for sums in of_model.values() for values in sums.means()]
        rows = [
            [f"{threshold:g}", *("–" if c[i] != c[i] else f"{100 * c[i]:.1f}" for c in columns)]
            for i, threshold in enumerate(thresholds)
        ]
        blocks.append(f"{path}: {method.mask} mask by {method.cam}, %\n\n{table(header, rows)}")
    counts = ", ".join(
        f"{group} {int(sums.images)} ({int(sums.images - sums.with_object)})" for group, sums in totals[0].items()
    )
    blocks.append(f"Images (without a pixel of the object): {counts}.")
    if missing:
        blocks[-1] += f" Left out, because they have no mask: {len(missing)}, {missing[0]} for one."
    return "\n\n".join(blocks)


def draw_curves(
    out: Path, paths: Sequence[str], methods: Sequence[Method], totals: Tallies, thresholds: Sequence[float]
) -> None:
    """Rates over thresholds: a panel a rate and group, a line a model."""
    plt = _pyplot()
    groups = list(totals[0])
    figure, axes = plt.subplots(
        len(groups),
        len(RATES),
        figsize=(3.4 * len(RATES), 2.5 * len(groups) + 0.5),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    order = np.argsort(thresholds)
    x = np.array(thresholds)[order]
    for row, group in zip(axes, groups, strict=True):
        for number, (axis, rate) in enumerate(zip(row, RATES, strict=True)):
            for path, of_model in zip(paths, totals, strict=True):
                values = 100 * np.array(of_model[group].means()[number])[order]
                axis.plot(x, values, "o-", markersize=3, linewidth=1.2, label=path)
            if rate == RATES[1] and len(paths) == 1:
                by_chance = 100 * np.array(totals[0][group].means()[0])[order]
                axis.plot(x, by_chance, ":", color="grey", linewidth=1, label="by chance")
            axis.grid(alpha=0.3)
            axis.set_ylim(-3, 103)  # a line at 0 or 100 is seen whole
            if group == groups[0]:
                axis.set_title(f"{rate}, %", fontsize=9)
            if group == groups[-1]:
                axis.set_xlabel("threshold", fontsize=8)
        count = int(totals[0][group].images)
        row[0].set_ylabel(f"{group} ({count} image{'s' * (count != 1)})", fontsize=9)
    handles, labels = axes[0][1].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=max(1, min(3, 120 // max(map(len, labels)))), fontsize=8
    )
    figure.savefig(out, dpi=110)
    plt.close(figure)


def choose(validation: Validation, count: int, seed: int) -> list[Segmented]:
    """Samples to look at: of each group in turn, with an object where there is one, whatever was computed before."""
    rng = np.random.default_rng(seed)
    everything = [i for number in range(len(validation.manifest.shards)) for i in validation.ids(number)]
    ids = rng.permutation(everything)[: 8 * count].tolist()
    found = [sample for sample in validation.samples(ids) if sample.mask is not None and sample.mask.any()]
    single = {name: ids for name, ids in validation.groups.items() if len(validation.groups) == 1 or name != "all"}
    queues = [[s for s in found if s.label in classes] for classes in single.values()]
    chosen: list[Segmented] = []
    while len(chosen) < count and any(queues):
        for queue in queues:
            if queue and len(chosen) < count:
                sample = queue.pop(0)
                if all(sample is not other for other in chosen):
                    chosen.append(sample)
    return sorted(chosen, key=lambda sample: (sample.label, sample.key))


def draw_sheet(out: Path, validation: Validation, samples: Sequence[Segmented]) -> None:
    """Contact sheet of the last model: image, M_seg, M_CAM and their overlap at the threshold of its method."""
    plt = _pyplot()
    model, method = validation.models[-1], validation.methods[-1]
    assert method.threshold is not None and method.mask is not None
    if not samples:
        raise UserError(
            "No sample has a mask with a pixel in it, so there is nothing to show: --count 0 asks for none."
        )
    cam = validation.relevance(model, method, samples)
    mask = masks_at(cam, [method.threshold], method.mask)
    segmentation = torch.stack([s.mask for s in samples if s.mask is not None])
    found = rates(mask.cpu(), coverage(segmentation, model.patch_size))

    size, patch = model.image_size, model.patch_size
    figure, axes = plt.subplots(
        len(samples), 4, figsize=(8, 2.15 * len(samples) + 0.5), squeeze=False, layout="constrained"
    )
    names = validation.manifest.classes
    for i, (row, sample) in enumerate(zip(axes, samples, strict=True)):
        picture = sample.image.permute(1, 2, 0).numpy()
        grid = mask[i, 0].cpu().view(model.visual.grid_size).numpy().repeat(patch, 0).repeat(patch, 1)
        masked = np.zeros((size, size), bool)
        masked[: grid.shape[0], : grid.shape[1]] = grid
        there = segmentation[i].numpy()
        row[0].imshow(picture)
        row[1].imshow(_lit(picture, there))
        row[2].imshow(_lit(picture, masked))
        row[3].imshow(_overlap(picture, there, masked))
        row[0].set_title(names[sample.label][1], fontsize=8)
        row[1].set_title(f"object: {_percent(there.mean())} of the image", fontsize=8)
        row[2].set_title(f"{method.mask} mask: {_percent(found.image[i, 0])} of the image", fontsize=8)
        row[3].set_title(f"{_percent(found.object[i, 0])} of the object, IoU {_percent(found.iou[i, 0])}", fontsize=8)
        for axis in row:
            axis.set_axis_off()
    figure.suptitle(
        f"threshold {method.threshold:g}; right: green is both, orange object alone, blue mask alone", fontsize=9
    )
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _percent(share: float | Tensor) -> str:
    value = 100 * float(share)
    return f"{value:.1f} %" if 0 < value < 1 else f"{value:.0f} %"


def _lit(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture, pale where the mask is not."""
    shown = picture.copy()
    shown[~mask] = 255 - (255 - shown[~mask]) // 5
    return shown


def _overlap(picture: np.ndarray, there: np.ndarray, masked: np.ndarray) -> np.ndarray:
    grey = picture.mean(2, keepdims=True).repeat(3, 2) * 0.5 + 96
    colours = {(True, True): (0, 158, 115), (True, False): (213, 94, 0), (False, True): (0, 114, 178)}
    for (in_object, in_mask), colour in colours.items():
        rows = (there == in_object) & (masked == in_mask)
        grey[rows] = 0.45 * grey[rows] + 0.55 * np.array(colour)
    return grey.astype(np.uint8)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


if __name__ == "__main__":
    sys.exit(main())
