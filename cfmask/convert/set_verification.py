"""Chooses the sets to verify, and combines the verdicts on a set's shards."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cfmask import urls
from cfmask.convert.verification import Check, Problem, Verdict
from cfmask.data.shards import MANIFEST, Manifest, load_manifest
from cfmask.errors import UserError


@dataclass
class SetReport:
    """The result for a set.

    problems: by shard's name; "" for those of the set itself.
    warnings: what may be a mistake, but is no problem of a shard.
    """

    manifest: Manifest
    problems: dict[str, list[Problem]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def bad_shards(self) -> int:
        return len(self.problems.keys() - {""})


def find_sets(given: str) -> list[Manifest]:
    """The set in the folder ``given``, or all sets in its subfolders."""
    if urls.is_remote(given):
        raise UserError(f"{given} is a URL, but shards are verified where their files are: run this there.")
    folder = Path(given).expanduser().absolute()
    if folder.is_dir() and not (folder / MANIFEST).exists():
        children = [child for child in sorted(folder.iterdir()) if child.is_dir()]
        # A child with tars and no manifest is an unfinished conversion: load_manifest reports it.
        if sets := [child for child in children if (child / MANIFEST).exists() or any(child.glob("*.tar"))]:
            return [load_manifest(child, check_files=False) for child in sets]
    return [load_manifest(folder, check_files=False)]


def checks_of(manifest: Manifest, full: bool) -> list[Check]:
    foreign = manifest.is_indexed
    return [
        Check(
            root=Path(manifest.root),
            shard=shard,
            store=manifest.store,
            image_size=manifest.image_size,
            num_classes=manifest.num_classes,
            label_from=manifest.made["label_from"] if foreign else "",
            label_field=manifest.made["label_field"] if foreign else "class",
            class_ids=tuple(manifest.made.get("class_ids", ())),
            foreign=foreign,
            full=full,
        )
        for shard in manifest.shards
    ]


def report_on(manifest: Manifest, verdicts: list[Verdict], full: bool) -> SetReport:
    """Combine a set's verdicts, and check what concerns the whole set."""
    report = SetReport(manifest, {verdict.name: list(verdict.problems) for verdict in verdicts if verdict.problems})
    if all(verdict.class_counts or not manifest.num_classes for verdict in verdicts):
        counts = [sum(of_class) for of_class in zip(*(verdict.class_counts for verdict in verdicts), strict=True)]
        pairs = enumerate(zip(counts, manifest.class_counts, strict=True))
        if wrong := [i for i, (ours, theirs) in pairs if ours != theirs]:
            what = (
                f"the manifest's class histogram differs from that of the indexes in {len(wrong)} classes: class "
                f"{wrong[0]} has {counts[wrong[0]]} samples, not {manifest.class_counts[wrong[0]]}"
            )
            remedy = "Delete the manifest and run the conversion (or tools/index_shards.py) again."
            report.problems[""] = [Problem("histogram", what, remedy)]
    names = {shard.name for shard in manifest.shards}
    for extra in sorted({path.name for path in Path(manifest.root).glob("*.tar")} - names):
        report.warnings.append(f"{extra} is not in the manifest, so it is not read. Is it of another set?")
    if full and any(not shard.sha256 for shard in manifest.shards):
        report.warnings.append(
            "the set was indexed without --checksums: changed bytes that still decode are not found. "
            "`python tools/index_shards.py … --checksums` records checksums from now on."
        )
    return report


def as_json(report: SetReport) -> dict[str, Any]:
    manifest = report.manifest
    return {
        "set": str(manifest.root),
        "shards": len(manifest.shards),
        "samples": manifest.num_samples,
        "bytes": manifest.num_bytes,
        "bad_shards": report.bad_shards,
        "problems": [
            {"shard": name, **asdict(problem)} for name, problems in report.problems.items() for problem in problems
        ],
        "warnings": report.warnings,
    }
