"""Reports of a validation of masks: a table, curves over thresholds, and a contact sheet.

table.md  results.json      image masking rate, object masking rate and IoU by model, group and threshold
curves.png                  the same over thresholds
sheet.png                   image, object, mask and overlap, by the last model
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from torch import Tensor

from cfmask.data.segmented import Segmented
from cfmask.evaluation.mask_validation import Part, Tallies, Validation
from cfmask.masking.validation import add_up, coverage, mask_rates, masks_at
from cfmask.report.figures import STYLE, legend_below, new_figure, save
from cfmask.report.tables import table
from cfmask.runtime.files import write_atomically

RATES = ("image masking rate", "object masking rate", "IoU")


def write_report(
    out: Path, validation: Validation, parts: Sequence[Part], *, segmentation: str, count: int, seed: int
) -> tuple[str, list[Path]]:
    """Write the files named above into ``out``.

    Args:
        segmentation: path of the masks.
        count: number of images on the contact sheet; 0: no sheet.
        seed: of the choice of these images.

    Returns:
        The table, and the files.

    Raises:
        UserError: a sample of the contact sheet cannot be read, or an image file cannot be written.
        OSError: another file cannot be written.
    """
    totals = [add_up(of_model) for of_model in zip(*(p.tallies for p in parts if p.tallies), strict=True)]
    missing = [key for part in parts for key in part.missing]
    text = _as_text(validation, totals, missing)
    write_atomically(out / "table.md", text + "\n")
    results = {
        "set": validation.segmented.where,
        "segmentation": segmentation,
        "thresholds": list(validation.thresholds),
        "without_mask": len(missing),
        "without_image": len(validation.segmented.left_out),
        "models": [
            {
                "model": path,
                "mask": method.mask,
                "cam": method.cam,
                "first_block": method.first_block,
                "groups": {group: sums.to_result() for group, sums in of_model.items()},
            }
            for path, method, of_model in zip(validation.paths, validation.methods, totals, strict=True)
        ],
    }
    write_atomically(out / "results.json", json.dumps(results, indent=2))
    _draw_curves(out / "curves.png", validation, totals)
    written = [out / "table.md", out / "results.json", out / "curves.png"]
    if count and (samples := _choose(validation, count, seed)):
        _draw_sheet(out / "sheet.png", validation, samples)
        written.append(out / "sheet.png")
    elif count:
        text += "\n\nNo contact sheet: none of the chosen images has a pixel of the object."
    return text, written


def _as_text(validation: Validation, totals: Tallies, missing: Sequence[str]) -> str:
    """A table for each model, of rates by threshold and group.

    Args:
        missing: keys of samples without a mask.
    """
    blocks = []
    for path, method, of_model in zip(validation.paths, validation.methods, totals, strict=True):
        header = ["threshold", *(f"{group}: {rate}" for group in of_model for rate in ("image", "object", "IoU"))]
        columns = [values for sums in of_model.values() for values in sums.means()]
        rows = [
            [f"{threshold:g}", *("–" if c[i] != c[i] else f"{100 * c[i]:.1f}" for c in columns)]
            for i, threshold in enumerate(validation.thresholds)
        ]
        blocks.append(f"{path}: {method.mask} mask by {method.cam}, %\n\n{table(header, rows)}")
    counts = ", ".join(
        f"{group} {int(sums.images)} ({int(sums.images - sums.with_object)})" for group, sums in totals[0].items()
    )
    notes = [f"Images (without a pixel of the object): {counts}."]
    for why, names in (("they have no mask", missing), ("they are missing", validation.segmented.left_out)):
        if names:
            notes.append(f"Excluded because {why}: {len(names)}, for example {names[0]}.")
    if validation.segmented.note:
        notes.append(validation.segmented.note)
    return "\n\n".join([*blocks, " ".join(notes)])


@rc_context(STYLE)
def _draw_curves(out: Path, validation: Validation, totals: Tallies) -> None:
    """Rates over thresholds: a panel for each rate and group, a line for each model."""
    groups = list(totals[0])
    figure = new_figure(2.5 * len(groups), width=3.4 * len(RATES))
    axes = figure.subplots(len(groups), len(RATES), squeeze=False, sharex=True, sharey=True)
    order = np.argsort(validation.thresholds)
    x = np.array(validation.thresholds)[order]
    for row, group in zip(axes, groups, strict=True):
        for number, (axis, rate) in enumerate(zip(row, RATES, strict=True)):
            for path, of_model in zip(validation.paths, totals, strict=True):
                values = 100 * np.array(of_model[group].means()[number])[order]
                axis.plot(x, values, "o-", markersize=3, linewidth=1.2, label=path)
            if rate == RATES[1] and len(validation.paths) == 1:
                by_chance = 100 * np.array(totals[0][group].means()[0])[order]
                axis.plot(x, by_chance, ":", color="grey", linewidth=1, label="by chance")
            axis.set_ylim(-3, 103)  # lines at 0 and 100 are visible
            if group == groups[0]:
                axis.set_title(f"{rate}, %")
            if group == groups[-1]:
                axis.set_xlabel("threshold")
        count = int(totals[0][group].images)
        row[0].set_ylabel(f"{group} ({count} image{'s' * (count != 1)})")
    legend_below(figure, *axes[0][1].get_legend_handles_labels())
    save(figure, out, dpi=110)


# --- contact sheet ----------------------------------------------------------------------------------------------------


def _choose(validation: Validation, count: int, seed: int) -> list[Segmented]:
    """Samples for the contact sheet, with a pixel of the object, from each group in turn."""
    rng = np.random.default_rng(seed)
    everything = [i for chunk in validation.segmented.chunks for i in chunk.ids]
    ids = rng.permutation(everything)[: 8 * count].tolist()
    found = [sample for sample in validation.segmented.samples(ids) if sample.mask is not None and sample.mask.any()]
    single = {name: ids for name, ids in validation.groups.items() if len(validation.groups) == 1 or name != "all"}
    queues = [[s for s in found if s.classes[0] in classes] for classes in single.values()]
    chosen: list[Segmented] = []
    while len(chosen) < count and any(queues):
        for queue in queues:
            if queue and len(chosen) < count:
                sample = queue.pop(0)
                if all(sample is not other for other in chosen):
                    chosen.append(sample)
    return sorted(chosen, key=lambda sample: (sample.classes, sample.key))


def _draw_sheet(out: Path, validation: Validation, samples: Sequence[Segmented]) -> None:
    """Draw image, object, mask and their overlap, by the last model at the threshold of its method."""
    model, method = validation.models[-1], validation.methods[-1]
    assert method.threshold is not None and method.mask is not None
    cam, classes = validation.relevance(model, method, samples)
    mask = masks_at(cam, [method.threshold], method.mask)
    segmentation = torch.stack([s.mask for s in samples if s.mask is not None])
    found = mask_rates(mask.cpu(), coverage(segmentation, model.patch_size))

    size, patch = model.image_size, model.patch_size
    figure = new_figure(2.15 * len(samples) + 0.5)
    axes = figure.subplots(len(samples), 4, squeeze=False)
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
        row[0].set_title(validation.segmented.classes[int(classes[i])][1], fontsize=8)
        row[1].set_title(f"object: {_percent(there.mean())} of the image", fontsize=8)
        row[2].set_title(f"{method.mask} mask: {_percent(found.image[i, 0])} of the image", fontsize=8)
        row[3].set_title(f"{_percent(found.object[i, 0])} of the object, IoU {_percent(found.iou[i, 0])}", fontsize=8)
        for axis in row:
            axis.set_axis_off()
    figure.suptitle(
        f"threshold {method.threshold:g}; right: green is both, orange object alone, blue mask alone", fontsize=9
    )
    save(figure, out, dpi=110)


def _percent(share: float | Tensor) -> str:
    value = 100 * float(share)
    return f"{value:.1f} %" if 0 < value < 1 else f"{value:.0f} %"


def _lit(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture, pale outside of the mask."""
    shown = picture.copy()
    shown[~mask] = 255 - (255 - shown[~mask]) // 5
    return shown


def _overlap(picture: np.ndarray, there: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """The picture in grey, with colours for object, mask, and both."""
    grey = picture.mean(2, keepdims=True).repeat(3, 2) * 0.5 + 96
    colours = {(True, True): (0, 158, 115), (True, False): (213, 94, 0), (False, True): (0, 114, 178)}
    for (in_object, in_mask), colour in colours.items():
        rows = (there == in_object) & (masked == in_mask)
        grey[rows] = 0.45 * grey[rows] + 0.55 * np.array(colour)
    return grey.astype(np.uint8)
