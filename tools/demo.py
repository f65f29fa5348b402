#!/usr/bin/env python3
"""The whole main job on a made data set, from nothing: the first command of the README.

    python3 tools/demo.py                      one seed, about ten minutes on two cores
    python3 tools/demo.py --seeds 0 1 2        the table with means and spreads
    python3 tools/demo.py --control            with random masks too: what is the masks' share of the gain?

    draw images → convert to shards → pre-train a small CLIP-like tower → fine-tune through launch/submit.py on two
    local DDP workers: vanilla, object-mask, context-mask → evaluate → table and pictures

In the fine-tuning set the background tells the class 95 % of the time; in the pre-training set it tells nothing.
Whatever is there already is used again: started a second time, the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    import environment

    environment.ensure()

from cfmask.errors import UserError
from cfmask.runtime.command import exits_cleanly

REPO = Path(__file__).resolve().parents[1]
EVAL_SETS = ("val", "shift-random", "shift-swapped", "shift-style")

# One recipe for all rows: the paper's (β, thresholds, AdamW, clipping, cosine) with sizes that suit ten classes.
RECIPE = (
    *("--batch-size", "64", "--lanes", "4", "--epochs", "4", "--warmup-steps", "20", "--lr", "3e-4"),
    *("--loader-workers", "1", "--log-steps", "5", "--eval-sets", "val", "shift-random"),
)
ROWS = {
    "FT": ("--preset", "ft"),
    "object-mask": ("--preset", "object-mask-single-fill"),
    "context-mask": ("--preset", "context-mask-single-fill"),
}
CONTROL = {"random-mask": ("--preset", "random-mask-single-fill")}
SEED = 0  # of the images and the pre-training; fine-tuning has --seeds


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=REPO / "demo",
        metavar="DIR",
        help="folder for all that is made (default: demo/ in the repository)",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="N", help="fine-tune once for each (default: 0)"
    )
    parser.add_argument("--control", action="store_true", help="fine-tune with random masks as well")
    arguments = parser.parse_args(argv)
    rows = ROWS | CONTROL if arguments.control else ROWS
    started = time.monotonic()
    out = claim(arguments.out.resolve())

    make_images_and_shards(out)
    make_tower(out)
    for seed in arguments.seeds:
        for row, flags in rows.items():
            fine_tune(out, row, flags, seed)
    text = evaluate(out, list(rows), arguments.seeds)
    pictures = draw(out, list(rows), arguments.seeds[0])
    say(f"Done in {(time.monotonic() - started) / 60:.1f} minutes")
    print(text)
    print("\npictures:", *pictures, sep="\n  ")


def claim(out: Path) -> Path:
    """Results of other settings must not be taken for this demo's."""
    record = out / "demo.json"
    makers = b"".join((REPO / f"tools/{name}.py").read_bytes() for name in ("_demo_images", "_demo_tower"))
    digest = hashlib.sha256(makers).hexdigest()
    settings = json.dumps({"seed": SEED, "recipe": RECIPE, "rows": ROWS, "makers": digest}, indent=2)
    if record.exists() and record.read_text() != settings:
        raise UserError(
            f"{out} was made with other settings than this version's. Delete it, or give another folder: --out DIR."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        record.write_text(settings)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}. Give another folder: --out DIR.") from error
    return out


def say(what: str) -> None:
    print(f"\n== {what}", flush=True)


def make_images_and_shards(out: Path) -> None:
    from tools._demo_images import draw_tree

    images, shards = out / "images", out / "shards"
    drawn = out / "images.done"
    if not drawn.exists():
        say("Drawing images")
        draw_tree(images, seed=SEED)
        drawn.touch()
    say("Converting them to shards")
    run("tools/make_shards.py", "folder", "--source", images, "--out", shards, "--classes", images / "classes.txt")


def make_tower(out: Path) -> None:
    from tools._demo_tower import pretrain

    if not (out / "tower.safetensors").exists():
        say("Pre-training a small CLIP-like tower")
        pretrain(out / "shards/pretrain", out / "tower.safetensors", seed=SEED)


def fine_tune(out: Path, row: str, flags: tuple[str, ...], seed: int) -> None:
    say(f"Fine-tuning: {row}, seed {seed}")
    run(
        *("launch/submit.py", *flags, *RECIPE, "--seed", seed, "--shards", out / "shards"),
        *("--model", out / "tower.json", "--pretrained", out / "tower.safetensors"),
        *("--executor", "local", "--tasks-per-node", 2, "--run", run_folder(out, row, seed)),
    )


def run_folder(out: Path, row: str, seed: int) -> Path:
    return out / f"runs/{row}-s{seed}"


def run(*command: object) -> None:
    """A command of this repository, as a user would type it; its failure is ours."""
    line = [sys.executable, *map(str, command)]
    print("$ python", *(part.replace(str(REPO) + os.sep, "") for part in line[1:]), flush=True)
    quiet = subprocess.run(line, cwd=REPO)
    if quiet.returncode:
        raise UserError(f"{command[0]} ended with exit code {quiet.returncode}; what it said stands above.")


def evaluate(out: Path, names: list[str], seeds: list[int]) -> str:
    """Evaluate every model on every set, write results.json and table.md; the table."""
    from cfmask.report.results import read_results

    say("Evaluating")
    zero = out / "tower.safetensors"
    models: dict[Path, tuple[str, int | None]] = {zero: ("zero-shot", None)}
    for seed in seeds:
        fine, mixed = run_folder(out, "FT", seed), out / f"runs/wise-ft-s{seed}"
        run("tools/wise_ft.py", zero, fine, "--alphas", "0.5", "--out", mixed)
        models |= {fine: ("FT", seed), mixed: ("WiSE-FT, α = 0.5", seed)}
        models |= {run_folder(out, row, seed): (row, seed) for row in names[1:]}
    folder = out / f"evaluation-{len(names)}-rows-s{'-'.join(map(str, seeds))}"
    called = [name for name, _ in models.values()]
    where = ("--shards", out / "shards", "--sets", *EVAL_SETS, "--out", folder)
    run("tools/evaluate.py", *models, "--names", *called, *where)

    found = zip(models.values(), read_results(folder).models, strict=True)
    plain = [
        {"row": row, "seed": seed, **{name: model.sets[name].top1 for name in EVAL_SETS}}
        for (row, seed), model in found
    ]
    (out / "results.json").write_text(json.dumps(plain, indent=2))
    for name in ("table.md", "bars.png"):
        shutil.copyfile(folder / name, out / name)
    return (out / "table.md").read_text()


def draw(out: Path, names: list[str], seed: int) -> list[Path]:
    from tools import plot_runs, show_masks, validate_masks

    say("Drawing pictures")
    sheet, curves = out / "masks.png", out / "curves.png"
    show_masks.main([str(run_folder(out, "object-mask", seed)), "--shards", str(out / "shards"), "--out", str(sheet)])
    plot_runs.main([*(str(run_folder(out, row, seed)) for row in names), "--out", str(curves)])
    models = [out / "tower.safetensors", *(run_folder(out, row, seed) for row in names)]
    where = ("--shards", out / "shards", "--set", "val", "--segmentation", out / "images-masks/val")
    validation = out / f"mask-validation-{len(names)}-runs-s{seed}"
    validate_masks.main([str(part) for part in (*models, *where, "--mask", "object", "--out", validation)])
    return [out / "bars.png", sheet, curves, validation / "curves.png", validation / "sheet.png"]


if __name__ == "__main__":
    sys.exit(main())
