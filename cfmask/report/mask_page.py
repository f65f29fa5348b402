"""The page of a validation of masks: one file with its tables, curves, contact sheet, models and settings."""

from __future__ import annotations

from pathlib import Path

from cfmask.evaluation.model_origin import origin_of
from cfmask.report import page, run_blocks
from cfmask.report.masks import CURVES, SHEET, MaskReport
from cfmask.report.page import Html, Section
from cfmask.run_search import find_model
from cfmask.runtime.files import write_atomically

_RATES = (
    ("image masking rate", "masked share of the image"),
    ("object masking rate", "masked share of the object; a mask that ignores the image has the image masking rate"),
    ("IoU", "intersection over union of masked pixels and the object's"),
)
_CURVES = "Rates over the threshold of the CAM, by group of classes"
_SHEET = "Images, their objects, the masks and their overlap, by the last model"


def write_page(out: Path, report: MaskReport) -> Path:
    """Write the page beside the files of ``write_report``.

    Raises:
        OSError: it cannot be written.
    """
    lead = page.paragraph(f"How far masks fall on objects (appendix A.2 of the paper): {', '.join(report.names)}.")
    tables = [_table(report, number) for number in range(len(report.names))]
    curves = page.figure(out / CURVES, _CURVES, f"Line charts. {_CURVES}. The tables have the numbers.")
    sections = [
        Section("Rates", [page.facts(_RATES), *tables, *map(page.paragraph, report.notes()), curves]),
        Section("Contact sheet", [_sheet(out / SHEET)]),
        Section("Models", _models(report)),
        Section("Settings", _settings(report)),
    ]
    write_atomically(out / page.FILE, page.page(f"Masks: {out.resolve().name}", sections, lead=[lead]))
    return out / page.FILE


def _table(report: MaskReport, number: int) -> Html:
    """Rates of a model: three lines for each group, and a column for each threshold, which fits more screens than the
    lines and columns of table.md."""
    title, header, lines = report.rates(number)
    rows = [list(row) for row in zip(header, *lines, strict=True)]
    return page.table(title, rows[0], rows[1:], together=[3] * len(report.totals[number]))


def _sheet(path: Path) -> Html:
    if not path.exists():
        return page.paragraph("None was drawn.")
    return page.figure(path, _SHEET, f"Contact sheet. {_SHEET}.")


def _models(report: MaskReport) -> list[Html]:
    """Which files they are, what they mask, and their training runs."""
    origins = [origin_of(find_model(path)) for path in report.validation.paths]
    header = ["model", "mask", "CAM", "first block", "threshold of the contact sheet"]
    masks = [
        [name, method.mask, method.cam, method.first_block, method.threshold]
        for name, method in zip(report.names, report.validation.methods, strict=True)
    ]
    blocks = [run_blocks.models(report.names, origins), page.table("Masks of each model", header, masks)]
    runs = run_blocks.training_runs(origins)
    return [*blocks, page.subsection("Training runs", *run_blocks.training(runs))] if runs else blocks


def _settings(report: MaskReport) -> list[Html]:
    validation = report.validation
    classes = validation.segmented.classes
    groups = [
        [group, len(ids), ", ".join(classes[i][1] for i in sorted(ids)[:5]) + ", …" * (len(ids) > 5)]
        for group, ids in validation.groups.items()
    ]
    return [
        page.facts(
            [
                ("images", validation.segmented.where),
                ("segmentation", report.segmentation),
                ("thresholds", run_blocks.text_of(validation.thresholds)),
            ]
        ),
        page.table("Groups of classes", ["group", "classes", "which"], groups),
    ]
