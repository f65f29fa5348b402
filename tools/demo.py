#!/usr/bin/env python3
"""Run the whole method on a small synthetic data set, from nothing: the first command of the README.

    python3 tools/demo.py                      one seed, about ten minutes on two cores
    python3 tools/demo.py --seeds 0 1 2        means and standard deviations over three seeds
    python3 tools/demo.py --control            with random masks as well, to see how much is due to the CAM

    draw images → convert to shards → pre-train a small CLIP-like tower → fine-tune through launch/submit.py on two
    local DDP workers: vanilla, object mask, context mask → evaluate → table and pictures

In the fine-tuning set, 95 % of the images have their class's own background; in the pre-training set, backgrounds are
independent of the class. Finished stages are kept, so an interrupted demo resumes where it was stopped.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    import environment

    environment.ensure()

from cfmask.errors import UserError
from cfmask.runtime.command import CommandParser, exits_cleanly
from cfmask.synthetic.demo import CONTROL, EVAL_SETS, RECIPE, ROWS, SEED, claim, run_folder

REPO = Path(__file__).resolve().parents[1]


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=REPO / "demo",
        metavar="DIR",
        help="folder for everything that is made (default: demo/ in the repository)",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="N", help="fine-tune once for each seed (default: 0)"
    )
    parser.add_argument("--control", action="store_true", help="fine-tune with random masks as well")
    arguments = parser.parse_args(argv)
    rows = ROWS | CONTROL if arguments.control else ROWS
    seeds = arguments.seeds
    started = time.monotonic()
    out = claim(arguments.out.resolve())
    make_data_and_tower(out)
    for seed in seeds:
        for row, flags in rows.items():
            announce(f"Fine-tuning: {row}, seed {seed}")
            run(
                *("launch/submit.py", *flags, *RECIPE, "--seed", seed, "--shards", out / "shards"),
                *("--model", out / "tower.json", "--pretrained", out / "tower.safetensors"),
                *("--executor", "local", "--tasks-per-node", 2, "--run", run_folder(out, row, seed)),
            )
    table = evaluate(out, list(rows), seeds)
    pictures = draw(out, list(rows), seeds[0])
    announce(f"Done in {(time.monotonic() - started) / 60:.1f} minutes")
    print(table)
    print("\npictures:", *pictures, sep="\n  ")


def make_data_and_tower(out: Path) -> None:
    from cfmask.synthetic.shapes import draw_tree
    from cfmask.synthetic.tower import pretrain

    images, shards, tower, drawn = out / "images", out / "shards", out / "tower.safetensors", out / "images.done"
    if not drawn.exists():
        announce("Drawing images")
        draw_tree(images, seed=SEED)
        drawn.touch()
    announce("Converting them to shards")
    run("tools/make_shards.py", "folder", "--source", images, "--out", shards, "--classes", images / "classes.txt")
    if not tower.exists():
        announce("Pre-training a small CLIP-like tower")
        pretrain(shards / "pretrain", tower, seed=SEED)


def evaluate(out: Path, names: list[str], seeds: list[int]) -> str:
    """Evaluate every model on every set, and write results.json and table.md. Returns the table."""
    from cfmask.report.results import read_results

    announce("Evaluating")
    zero = out / "tower.safetensors"
    models: dict[Path, tuple[str, int | None]] = {zero: ("zero-shot", None)}
    for seed in seeds:
        fine, mixed = run_folder(out, "FT", seed), out / f"runs/wise-ft-s{seed}"
        run("tools/wise_ft.py", zero, fine, "--alphas", "0.5", "--out", mixed)
        models |= {fine: ("FT", seed), mixed: ("WiSE-FT, α = 0.5", seed)}
        models |= {run_folder(out, row, seed): (row, seed) for row in names[1:]}
    folder = out / f"evaluation-{len(names)}-rows-s{'-'.join(map(str, seeds))}"
    where = ("--shards", out / "shards", "--sets", *EVAL_SETS, "--out", folder)
    run("tools/evaluate.py", *models, "--names", *(name for name, _ in models.values()), *where)
    rows = [
        {"row": row, "seed": seed, **{name: model.sets[name].top1 for name in EVAL_SETS}}
        for (row, seed), model in zip(models.values(), read_results(folder).models, strict=True)
    ]
    (out / "results.json").write_text(json.dumps(rows, indent=2))
    for name in ("table.md", "bars.png"):
        shutil.copyfile(folder / name, out / name)
    return (out / "table.md").read_text()


def draw(out: Path, names: list[str], seed: int) -> list[Path]:
    announce("Drawing pictures")
    runs, shards = [run_folder(out, row, seed) for row in names], ("--shards", out / "shards")
    sheet, curves = out / "masks.png", out / "curves.png"
    validation = out / f"mask-validation-{len(names)}-runs-s{seed}"
    run("tools/show_masks.py", run_folder(out, "object-mask", seed), *shards, "--out", sheet)
    run("tools/plot_runs.py", *runs, "--out", curves)
    where = (*shards, "--set", "val", "--segmentation", out / "images-masks/val")
    run("tools/validate_masks.py", out / "tower.safetensors", *runs, *where, "--mask", "object", "--out", validation)
    return [out / "bars.png", sheet, curves, validation / "curves.png", validation / "sheet.png"]


def announce(stage: str) -> None:
    print(f"\n== {stage}", flush=True)


def run(*command: object) -> None:
    """Run a command of this repository, as a user would type it."""
    line = [sys.executable, *map(str, command)]
    print("$ python", shlex.join(part.replace(str(REPO) + os.sep, "") for part in line[1:]), flush=True)
    code = subprocess.run(line, cwd=REPO).returncode
    if code:
        raise UserError(f"{command[0]} ended with exit code {code}. Its output is above.")


if __name__ == "__main__":
    sys.exit(main())
