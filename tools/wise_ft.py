#!/usr/bin/env python3
"""WiSE-FT: average a zero-shot and a fine-tuned model, and see what each share gives.

    python tools/wise_ft.py RUN/initial.safetensors RUN --alphas 0 0.25 0.5 0.75 1 --shards DIR --sets val sketch
    python tools/wise_ft.py RUN/initial.safetensors RUN --alphas 0.5 --out wise.safetensors

θ = (1-α)·θ_zeroshot + α·θ_finetuned over tower and head (Wortsman et al., CVPR 2022).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cfmask.ensemble import interpolate  # noqa: E402
from cfmask.errors import UserError, exits_cleanly  # noqa: E402
from cfmask.models.head import save_model  # noqa: E402
from cfmask.models.tower import Classifier  # noqa: E402
from tools._shared import MODEL_HELP, add_data_arguments, data_arguments, evaluate_sets, load_models, table  # noqa: E402


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zero", metavar="ZERO", help=f"the zero-shot model: {MODEL_HELP}")
    parser.add_argument("fine", metavar="FINE", help="the fine-tuned model, likewise")
    parser.add_argument("--alphas", nargs="+", type=float, default=[0.5], metavar="α", help="shares of FINE, in 0…1")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the model here (with a single α)")
    add_data_arguments(parser)
    for action in parser._actions:  # evaluating is optional here
        if action.dest in ("shards", "sets"):
            action.required = False
    arguments = parser.parse_args(argv)
    if bool(arguments.shards) != bool(arguments.sets):
        raise UserError("--shards and --sets go together: where the sets are, and which to evaluate on.")
    if not arguments.shards and not arguments.out:
        raise UserError("Nothing to do: give --shards and --sets to evaluate, or --out to write the model.")
    if arguments.out and len(arguments.alphas) != 1:
        raise UserError(f"--out writes one model, and --alphas names {len(arguments.alphas)}. Choose one.")
    if not all(0 <= alpha <= 1 for alpha in arguments.alphas):
        raise UserError("--alphas must lie in 0…1.")

    (zero, fine), info = load_models([arguments.zero, arguments.fine])
    models = [between(zero, fine, alpha) for alpha in arguments.alphas]
    if arguments.out:
        provenance = f"WiSE-FT, α = {arguments.alphas[0]}, of {arguments.zero} and {arguments.fine}"
        save_model(arguments.out, models[0], dataclasses.replace(info, provenance=provenance))
        print(f"written: {arguments.out}")
    if arguments.shards:
        scores = evaluate_sets(models, info, **data_arguments(arguments))
        rows = [[f"{a:g}", *(f"{s[i].top1:.2f}" for s in scores.values())] for i, a in enumerate(arguments.alphas)]
        print(table(["α", *scores], rows))


def between(zero: Classifier, fine: Classifier, alpha: float) -> Classifier:
    model = copy.deepcopy(zero)
    model.load_state_dict(interpolate(zero.state_dict(), fine.state_dict(), alpha))
    return model


if __name__ == "__main__":
    sys.exit(main())
