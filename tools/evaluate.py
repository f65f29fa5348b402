#!/usr/bin/env python3
"""Top-1 accuracy of models on sets of shards. Each sample counts once; the result is the same on any number of ranks.

    python tools/evaluate.py RUN RUN/initial.safetensors --shards DIR --sets val sketch
    python tools/evaluate.py RUN … --shards DIR --sets imagenet v2 r sketch objectnet a      the paper's table
    python tools/evaluate.py RUN … --shards DIR --sets … --nodes 2                           as a job on Slurm
    python tools/evaluate.py B32 B16 RUN --shards DIR --sets … --fit-on B32 B16              effective robustness
    python tools/evaluate.py RUN --shards DIR --sets imagenet … --fit-on published           the same, published line

On ImageNet-R and -A a model answers among their 200 classes; on ObjectNet among 125, of which several may be right for
an image. An incomplete copy of a known set is refused. After an interruption, the same command resumes the evaluation.
RUN stands for the run's last checkpoint or, with --checkpoint best, for the best one on its held-out set, as in the
authors' evaluation. results.json and the tables state the step and what chose it. Models of one name in --names are
seeds of one row: mean ± standard deviation.
"""

from __future__ import annotations

import sys

try:
    from cfmask.errors import UserError
    from cfmask.evaluation_spec import Evaluation
    from cfmask.report.labels import model_names
    from cfmask.run_search import find_model
    from cfmask.runtime.command import CommandParser, exits_cleanly
    from cfmask.tool_arguments import MODEL_HELP, NAMES_HELP
    from launch.submission.evaluation import add_arguments, allocation_of, carry_out, evaluation_of
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


PUBLISHED = "published"


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--names",
        nargs="+",
        metavar="NAME",
        help=NAMES_HELP,
    )
    parser.add_argument(
        "--fit-on",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="also draw effective robustness, above the line through these of the models, zero-shot ones of two "
        f"backbones or more; {PUBLISHED}: through the published accuracies of CLIP's ViT-B/32, B/16 and L/14",
    )
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    own = [_number(path, arguments.models) for path in arguments.fit_on if path != PUBLISHED]

    allocation = allocation_of(arguments)
    evaluation = evaluation_of(arguments, allocation, Evaluation, arguments.models)
    names = model_names(evaluation.models, arguments.names)
    line = None
    if arguments.fit_on:  # scipy takes a second to import, and so does matplotlib below
        from cfmask.report.results import Split
        from cfmask.report.robustness import Line

        files = {names[i]: evaluation.models[i] for i in own}
        line = Line.of(files, Split.of(evaluation.sets), published=PUBLISHED in arguments.fit_on)
    code, run = carry_out("evaluate", evaluation, allocation, arguments)
    if code or not run.results.exists():
        return code
    from cfmask.report import evaluation_page, summary

    pictures = summary.show(run, "Evaluation", names)
    if line is not None:
        pictures.append(summary.show_robustness(run, names, line))
    evaluation_page.write_page(run, "Evaluation", names, pictures)
    return 0


def _number(path: str, models: list[str]) -> int:
    for i, model in enumerate(models):
        if path == model or find_model(path).resolve() == find_model(model).resolve():
            return i
    raise UserError(f"--fit-on {path} is not one of the evaluated models. Name it among them as well.")


if __name__ == "__main__":
    sys.exit(main())
