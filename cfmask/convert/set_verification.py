"""Which sets are verified, and what the verdicts on a set's shards say together."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cfmask import urls
from cfmask.convert.verification import Check, Problem, Verdict
from cfmask.data.shards import MANIFEST, Manifest, load_manifest
from cfmask.errors import UserError


@dataclass
class Findings:
    """What was found out about a set. problems: by shard's name, "" for those of the set itself."""

    manifest: Manifest
    problems: dict[str, list[Problem]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def find_sets(given: str) -> list[Manifest]:
    """The set that ``given`` is, or all those in it.

    Raises:
        UserError: there is none, one of them has no manifest or a damaged one, or it is a URL.
    """
    if urls.is_remote(given):
        raise UserError(f"{given} is a URL, and shards are verified where their files are: run this there.")
    folder = Path(given).expanduser().absolute()
    if folder.is_dir() and not (folder / MANIFEST).exists():
        children = [child for child in sorted(folder.iterdir()) if child.is_dir()]
        # A child with tars and no manifest is a conversion that was not finished: loading it says so.
        if sets := [child for child in children if (child / MANIFEST).exists() or any(child.glob("*.tar"))]:
            return [load_manifest(child, check_files=False) for child in sets]
    return [load_manifest(folder, check_files=False)]


def checks_of(manifest: Manifest, full: bool) -> list[Check]:
    root = Path(manifest.root)
    foreign = manifest.is_indexed
    return [
        Check(
            root=root,
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


def findings_of(manifest: Manifest, verdicts: list[Verdict], full: bool) -> Findings:
    """Put a set's verdicts together, with what only the whole set can tell."""
    found = Findings(manifest, {verdict.name: list(verdict.problems) for verdict in verdicts if verdict.problems})
    if all(verdict.class_counts or not manifest.num_classes for verdict in verdicts):
        counts = [sum(of_class) for of_class in zip(*(verdict.class_counts for verdict in verdicts), strict=True)]
        wrong = [
            i for i, (ours, theirs) in enumerate(zip(counts, manifest.class_counts, strict=True)) if ours != theirs
        ]
        if wrong:
            what = (
                f"the manifest's class histogram is not that of the indexes, for {len(wrong)} classes: of class "
                f"{wrong[0]} there are {counts[wrong[0]]} samples, not {manifest.class_counts[wrong[0]]}"
            )
            remedy = "Delete the manifest and run the conversion (or tools/index_shards.py) again: it writes it anew."
            found.problems[""] = [Problem("histogram", what, remedy)]
    names = {shard.name for shard in manifest.shards}
    for extra in sorted({path.name for path in Path(manifest.root).glob("*.tar")} - names):
        found.warnings.append(f"{extra} is not in the manifest: nobody reads it. Is it of another set?")
    if full and any(not shard.sha256 for shard in manifest.shards):
        found.warnings.append(
            "it was indexed without --checksums: bytes that changed, and still decode, are not found. "
            "`python tools/index_shards.py … --checksums` makes a record from now on."
        )
    return found


def as_json(found: Findings) -> dict[str, Any]:
    manifest = found.manifest
    return {
        "set": str(manifest.root),
        "shards": len(manifest.shards),
        "samples": manifest.num_samples,
        "bytes": manifest.num_bytes,
        "bad_shards": len(found.problems.keys() - {""}),
        "problems": [
            {"shard": name, **asdict(problem)} for name, problems in found.problems.items() for problem in problems
        ],
        "warnings": found.warnings,
    }
