#!/usr/bin/env python3
"""WiSE-FT: mix a zero-shot and a fine-tuned model, evaluate each mixture, keep the best.

    python tools/wise_ft.py ZERO FINE --alphas 0 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9 1 --shards DIR --sets imagenet v2 r
    python tools/wise_ft.py ZERO FINE --alphas 0 0.25 0.5 0.75 1 --shards DIR --sets val sketch --holdout holdout
    python tools/wise_ft.py ZERO FINE --alphas 0.5 --out DIR               write DIR/model.safetensors, evaluate nothing

θ = (1-α)·θ_zeroshot + α·θ_finetuned over tower and head (Wortsman et al., CVPR 2022). Data is read once for all α, and
weights are mixed on the device. With several α, the best on --holdout is saved; a test set is refused there.
"""

from __future__ import annotations

import sys

try:
    from cfmask.evaluation_spec import WiseFT
    from cfmask.runtime.command import CommandParser, exits_cleanly
    from cfmask.tool_arguments import MODEL_HELP
    from launch.submission.evaluation import add_arguments, allocation_of, carry_out, evaluation_of
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(__doc__)
    parser.add_argument("zero", metavar="ZERO", help=f"the zero-shot model: {MODEL_HELP}")
    parser.add_argument("fine", metavar="FINE", help="the fine-tuned model, likewise")
    parser.add_argument(
        "--alphas", nargs="+", type=float, default=[0.5], metavar="α", help="shares of FINE, in 0…1 (default: 0.5)"
    )
    parser.add_argument("--holdout", metavar="SET", help="folder under --shards; the α that is best there is saved")
    add_arguments(parser, sets_required=False)
    arguments = parser.parse_args(argv)

    allocation = allocation_of(arguments)
    evaluation = evaluation_of(
        arguments,
        allocation,
        WiseFT,
        [arguments.zero, arguments.fine],
        alphas=tuple(arguments.alphas),
        holdout=arguments.holdout,
    )
    code, run = carry_out("wise-ft", evaluation, allocation, arguments)
    if code or not run.results.exists():
        return code
    # Imported here, because scipy and matplotlib take a second to import.
    from cfmask.report import charts, evaluation_page, summary
    from cfmask.report.results import read_results

    pictures = summary.show(run, "WiSE-FT")
    results = read_results(run.root)
    if results.sets and len(results.models) > 1:
        charts.sweep_chart(results, run.root / "sweep.png", results.split)
        print(run.root / "sweep.png")
        pictures.append(run.root / "sweep.png")
    evaluation_page.write_page(run, "WiSE-FT", pictures=pictures)
    if results.chosen is not None:
        on = f", the best on {results.chosen_on}" if results.chosen_on else ""
        print(f"{results.models[results.chosen].name}{on}: {run.final}")
    else:
        print("No model was saved: there are several α. Choose one with --holdout SET, or name one with --alphas.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
