#!/usr/bin/env python3
"""Top-1 accuracy of models on sets of shards. Each sample counts once; the result is the same on any number of ranks.

    python tools/evaluate.py RUN RUN/initial.safetensors --shards DIR --sets val sketch
    python tools/evaluate.py RUN … --shards DIR --sets imagenet v2 r sketch objectnet a      the paper's table
    python tools/evaluate.py RUN … --shards DIR --sets … --nodes 2                           as a job on Slurm
    python tools/evaluate.py B32 B16 RUN --shards DIR --sets … --fit-on B32 B16              effective robustness

On ImageNet-R and -A a model answers among their 200 classes; on ObjectNet among 125, of which several may be right for
an image. An incomplete copy of a known set is refused. After an interruption, the same command resumes the evaluation.
RUN stands for the run's last checkpoint or, with --checkpoint best, for the best one on its held-out set, as in the
authors' evaluation. results.json and the tables state the step and what chose it.
"""

from __future__ import annotations

import sys

try:
    from cfmask.errors import UserError
    from cfmask.evaluation.model_origin import short_names
    from cfmask.evaluation_spec import Evaluation
    from cfmask.runs import find_model
    from cfmask.runtime.command import CommandParser, exits_cleanly
    from cfmask.tool_arguments import MODEL_HELP
    from launch.submission.evaluation import add_arguments, allocation_of, carry_out, evaluation_of
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--names",
        nargs="+",
        metavar="NAME",
        help="names of the models in tables (default: their paths); models of one name are seeds of one row: mean ± sd",
    )
    parser.add_argument(
        "--fit-on",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="also draw effective robustness, above the line through these of the models (zero-shot ones)",
    )
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    names = arguments.names or short_names(arguments.models)
    if len(names) != len(arguments.models):
        raise UserError(f"--names gives {len(names)} names to {len(arguments.models)} models.")
    fit_on = [_number(path, arguments.models) for path in arguments.fit_on]

    allocation = allocation_of(arguments)
    evaluation = evaluation_of(arguments, allocation, Evaluation, arguments.models)
    code, run = carry_out("evaluate", evaluation, allocation, arguments)
    if code or not run.results.exists():
        return code
    # Imported here, because scipy and matplotlib take a second to import.
    from cfmask.report import charts, evaluation_page, results, robustness, summary

    pictures = summary.show(run, "Evaluation", names)
    if fit_on:
        found, chart = results.read_results(run.root), run.root / "effective-robustness.png"
        rows = results.rows_of(found.models, names)
        values = charts.effective_robustness(rows, [names[i] for i in fit_on], chart, found.split)
        print(f"\n{robustness.robustness_table(values)}\n\n{chart}")
        pictures.append(chart)
    evaluation_page.write_page(run, "Evaluation", names, pictures)
    return 0


def _number(path: str, models: list[str]) -> int:
    for i, model in enumerate(models):
        if path == model or find_model(path).resolve() == find_model(model).resolve():
            return i
    raise UserError(f"--fit-on {path} is not one of the evaluated models. Name it among them as well.")


if __name__ == "__main__":
    sys.exit(main())
