"""Reports of a validation of masks: a table, curves over thresholds, and a contact sheet.

table.md  results.json      image masking rate, object masking rate and IoU by model, group and threshold
curves.png                  the same over thresholds
sheet.png                   image, object, mask and overlap, by the last model
index.html                  all of this, and the models (mask_page.py)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from cfmask.data.segmented import Segmented
from cfmask.evaluation.mask_validation import Part, Tallies, Validation
from cfmask.masking.validation import add_up, coverage, mask_rates, masks_at
from cfmask.report.figures import STYLED, broken, legend_below, new_figure, save
from cfmask.report.looks import looks
from cfmask.report.sheet import Cell, contact_sheet, hatched, pixels_of, stripes
from cfmask.report.tables import table
from cfmask.runtime.files import write_atomically

RATES = ("image masking rate", "object masking rate", "IoU")
CURVES, SHEET = "curves.png", "sheet.png"
_BY_CHANCE: dict[str, Any] = {"linestyle": ":", "color": "grey", "linewidth": 1}


@dataclass(frozen=True)
class MaskReport:
    """What a report shows."""

    validation: Validation
    names: Sequence[str]
    """Of the models, all different."""
    totals: Tallies
    """Of the models, over all parts."""
    missing: Sequence[str]
    """Keys of samples without a mask."""
    segmentation: str
    """Path of the masks."""

    @classmethod
    def of(cls, validation: Validation, names: Sequence[str], parts: Sequence[Part], segmentation: str) -> MaskReport:
        totals = [add_up(of_model) for of_model in zip(*(p.tallies for p in parts if p.tallies), strict=True)]
        return cls(validation, names, totals, [key for part in parts for key in part.missing], segmentation)

    def rates(self, number: int) -> tuple[str, list[str], list[list[str]]]:
        """A title, and the header and rows of a table of a model's rates by threshold and group, in percent."""
        method, of_model = self.validation.methods[number], self.totals[number]
        header = ["threshold", *(f"{group}: {rate}" for group in of_model for rate in ("image", "object", "IoU"))]
        columns = [values for sums in of_model.values() for values in sums.means()]
        rows = [
            [f"{threshold:g}", *("–" if c[i] != c[i] else f"{100 * c[i]:.1f}" for c in columns)]
            for i, threshold in enumerate(self.validation.thresholds)
        ]
        return f"{self.names[number]}: {method.mask} mask by {method.cam}, %", header, rows

    def notes(self) -> list[str]:
        """Sentences about the images that are counted, and those that are not."""
        counts = ", ".join(
            f"{group} {int(sums.images)} ({int(sums.images - sums.with_object)})"
            for group, sums in self.totals[0].items()
        )
        notes = [f"Images (without a pixel of the object): {counts}."]
        left_out = self.validation.segmented.left_out
        for why, names in (("they have no mask", self.missing), ("they are missing", left_out)):
            if names:
                notes.append(f"Excluded because {why}: {len(names)}, for example {names[0]}.")
        return notes + ([self.validation.segmented.note] if self.validation.segmented.note else [])


def write_report(out: Path, report: MaskReport, *, count: int, seed: int) -> tuple[str, list[Path]]:
    """Write the files named above into ``out``, except the page.

    Args:
        count: number of images on the contact sheet; 0: no sheet.
        seed: of the choice of these images.

    Returns:
        The table, and the files.

    Raises:
        UserError: a sample of the contact sheet cannot be read, or an image file cannot be written.
        OSError: another file cannot be written.
    """
    validation, names = report.validation, report.names
    tables = (report.rates(number) for number in range(len(names)))
    blocks = [f"{title}\n\n{table(header, rows)}" for title, header, rows in tables]
    text = "\n\n".join([*blocks, " ".join(report.notes())])
    write_atomically(out / "table.md", text + "\n")
    results = {
        "set": validation.segmented.where,
        "segmentation": report.segmentation,
        "thresholds": list(validation.thresholds),
        "without_mask": len(report.missing),
        "without_image": len(validation.segmented.left_out),
        "models": [
            {
                "name": name,
                "model": path,
                "mask": method.mask,
                "cam": method.cam,
                "first_block": method.first_block,
                "groups": {group: sums.to_result() for group, sums in of_model.items()},
            }
            for name, path, method, of_model in zip(
                names, validation.paths, validation.methods, report.totals, strict=True
            )
        ],
    }
    write_atomically(out / "results.json", json.dumps(results, indent=2))
    save(overlap_figure(validation.thresholds, names, report.totals), out / CURVES)
    written = [out / "table.md", out / "results.json", out / CURVES]
    if count and (samples := _choose(validation, count, seed)):
        _draw_sheet(out / SHEET, validation, names[-1], samples)
        written.append(out / SHEET)
    else:
        (out / SHEET).unlink(missing_ok=True)  # of an earlier command
        if count:
            text += "\n\nNo contact sheet: none of the chosen images has a pixel of the object."
    return text, written


@STYLED
def overlap_figure(thresholds: Sequence[float], names: Sequence[str], totals: Tallies) -> Figure:
    """Rates over thresholds: a panel for each rate and group, a line for each model.

    Args:
        names: of the models, in the order of ``totals``.
    """
    groups = list(totals[0])
    figure = new_figure(1.3 * len(groups) + 0.3)
    axes = figure.subplots(len(groups), len(RATES), squeeze=False, sharex=True, sharey=True)
    order = np.argsort(thresholds)
    x = np.array(thresholds)[order]
    by_chance = len(names) == 1
    for row, group in zip(axes, groups, strict=True):
        for number, (axis, rate) in enumerate(zip(row, RATES, strict=True)):
            for look, of_model in zip(looks(names), totals, strict=True):
                values = 100 * np.array(of_model[group].means()[number])[order]
                axis.plot(x, values, **look.line(width=1.1))
            if rate == RATES[1] and by_chance:
                axis.plot(x, 100 * np.array(totals[0][group].means()[0])[order], **_BY_CHANCE)
            axis.set_ylim(-3, 103)  # lines at 0 and 100 are visible
            if group == groups[0]:
                axis.set_title(rate)
            if group == groups[-1]:
                axis.set_xlabel("CAM threshold")
        count = int(totals[0][group].images)
        row[0].set_ylabel(f"{broken(f'{group}, %', 18)}\n({count} image{'s' * (count != 1)})")
    handles = [Line2D([], [], **look.line(width=1.1)) for look in looks(names)]
    handles += [Line2D([], [], **_BY_CHANCE)] * by_chance
    legend_below(figure, handles, [*names, "by chance"][: len(handles)])
    return figure


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


def _draw_sheet(out: Path, validation: Validation, name: str, samples: Sequence[Segmented]) -> None:
    """Draw image, object, mask and their overlap, by the last model, ``name``, at the threshold of its method."""
    model, method = validation.models[-1], validation.methods[-1]
    assert method.threshold is not None and method.mask is not None
    cam, classes = validation.relevance(model, method, samples)
    mask = masks_at(cam, [method.threshold], method.mask)
    segmentation = torch.stack([s.mask for s in samples if s.mask is not None])
    found = mask_rates(mask.cpu(), coverage(segmentation, model.patch_size))
    shown = []
    for i, sample in enumerate(samples):
        picture = sample.image.permute(1, 2, 0).numpy()
        grid = mask[i, 0].cpu().view(model.visual.grid_size).numpy()
        masked = pixels_of(grid, model.patch_size, model.image_size)
        there = segmentation[i].numpy()
        shown.append(
            [
                Cell(picture, validation.segmented.classes[int(classes[i])][1]),
                Cell(hatched(picture, there), _percent(there.mean())),
                Cell(hatched(picture, masked), _percent(found.image[i, 0])),
                Cell(
                    _overlap(picture, there, masked), f"{_percent(found.object[i, 0])}\nIoU {_percent(found.iou[i, 0])}"
                ),
            ]
        )
    rows = (
        "image",
        "object, share of the image",
        f"{method.mask} mask, share of the image",
        "overlap, share of the object",
    )
    colours = (
        "Overlap: orange with white stripes is the object alone, blue with black stripes the mask alone, green with "
        "both stripes is both."
    )
    save(contact_sheet(rows, shown, note=f"{name}, threshold {method.threshold:g}. {colours}"), out)


def _percent(share: float | Tensor) -> str:
    value = 100 * float(share)
    return f"{value:.1f} %" if 0 < value < 1 else f"{value:.0f} %"


def _overlap(picture: np.ndarray, there: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """The picture in grey, with a colour for object, mask, and both, and stripes for readers without colour."""
    grey = picture.mean(2, keepdims=True).repeat(3, 2) * 0.5 + 96
    colours = {(True, True): (0, 158, 115), (True, False): (213, 94, 0), (False, True): (0, 114, 178)}
    for (in_object, in_mask), colour in colours.items():
        rows = (there == in_object) & (masked == in_mask)
        grey[rows] = 0.45 * grey[rows] + 0.55 * np.array(colour)
    grey[there & stripes(picture, share=0.2)] = 255
    grey[masked & stripes(picture, share=0.2, falling=True)] = 0
    return grey.astype(np.uint8)
