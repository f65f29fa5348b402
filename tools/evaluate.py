#!/usr/bin/env python3
"""Evaluate top-1 accuracy of models on sets of shards. The result does not depend on the number of ranks.

    python tools/evaluate.py RUN RUN/initial.safetensors --shards DIR --sets val sketch
    python tools/evaluate.py RUN … --shards DIR --sets imagenet v2 r sketch objectnet a      the paper's table
    python tools/evaluate.py RUN … --shards DIR --sets … --nodes 2                           as a job on Slurm
    python tools/evaluate.py B32 B16 RUN --shards DIR --sets … --fit-on B32 B16              effective robustness

Predictions on ImageNet-R and -A are restricted to their 200 classes, those on ObjectNet to its 125 class ids, several
of which may be correct for an image. An incomplete copy of a known set is refused. If it is interrupted, the same
command resumes after what was counted. RUN stands for the run's last checkpoint; --checkpoint best takes the one that
was best on the held-out set, as the authors do. results.json and the tables name the step and how it was chosen.
"""

from __future__ import annotations

import argparse
import sys

try:
    from cfmask.errors import UserError
    from cfmask.evaluation.model_origin import short_names
    from cfmask.evaluation_spec import Evaluation
    from cfmask.runs import find_model
    from cfmask.runtime.command import exits_cleanly
    from cfmask.tool_arguments import MODEL_HELP
    from launch.submission.evaluation import add_arguments, allocation_of, carry_out, evaluation_of
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--names",
        nargs="+",
        metavar="NAME",
        help="names in tables (default: paths); models with the same name are seeds of one row, mean ± sd",
    )
    parser.add_argument(
        "--fit-on",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="draw effective robustness too, relative to a line through these (zero-shot) models",
    )
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    names = arguments.names or short_names(arguments.models)
    if len(names) != len(arguments.models):
        raise UserError(f"--names gives {len(names)} names for {len(arguments.models)} models.")
    fit_on = [_number(path, arguments.models) for path in arguments.fit_on]

    allocation = allocation_of(arguments)
    evaluation = evaluation_of(arguments, allocation, Evaluation, arguments.models)
    code, run = carry_out("evaluate", evaluation, allocation, arguments)
    if code or not run.results.exists():
        return code
    from cfmask import report  # scipy and matplotlib take a second to import

    report.show(run, "Evaluation", names)
    if fit_on:
        results = report.read_results(run.root)
        rows = report.named_rows(results, names)
        picture = run.root / "effective-robustness.png"
        values = report.effective_robustness(rows, [names[i] for i in fit_on], picture, results.split)
        print(f"\n{report.robustness_table(values)}\n\n{picture}")
    return 0


def _number(path: str, models: list[str]) -> int:
    for i, model in enumerate(models):
        if path == model or find_model(path).resolve() == find_model(model).resolve():
            return i
    raise UserError(f"--fit-on {path} is not among the models that are evaluated. Add it to them.")


if __name__ == "__main__":
    sys.exit(main())
