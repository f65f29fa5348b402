#!/usr/bin/env python3
"""Model soups: average the weights of models that were fine-tuned from one start.

    python tools/soup.py RUN RUN RUN --shards DIR --sets imagenet v2 r                        uniform: all of them
    python tools/soup.py RUN RUN RUN --greedy --holdout holdout --shards DIR --sets imagenet  best first, if they help
    python tools/soup.py RUN RUN --out DIR                              write DIR/model.safetensors, evaluate nothing

Wortsman et al., "Model soups", ICML 2022. A soup is a model file like any other: evaluate it, or start from it with
submit.py --pretrained. tools/build_head.py --keep-head converts the state dict of a released soup.
"""

from __future__ import annotations

import sys

try:
    from cfmask.errors import UserError
    from cfmask.evaluation_spec import GreedySoup, UniformSoup
    from cfmask.report.labels import model_names
    from cfmask.runtime.command import CommandParser, exits_cleanly
    from cfmask.runtime.jsonl import read_object
    from cfmask.tool_arguments import MODEL_HELP
    from launch.submission.evaluation import add_arguments, allocation_of, carry_out, evaluation_of
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--greedy",
        action="store_true",
        help="add each model, best first, that does not lower the accuracy on --holdout",
    )
    parser.add_argument("--holdout", metavar="SET", help="folder under --shards that chooses; a test set is refused")
    add_arguments(parser, sets_required=False)
    arguments = parser.parse_args(argv)
    if arguments.holdout and not arguments.greedy:
        raise UserError("--holdout would do nothing: a uniform soup has all models. Add --greedy, or leave it out.")
    if len(arguments.models) < 2:
        raise UserError("A soup needs two models or more.")

    allocation = allocation_of(arguments)
    evaluation: UniformSoup
    if arguments.greedy:
        evaluation = evaluation_of(arguments, allocation, GreedySoup, arguments.models, holdout=arguments.holdout)
    else:
        evaluation = evaluation_of(arguments, allocation, UniformSoup, arguments.models)
    code, run = carry_out("soup", evaluation, allocation, arguments)
    if code or not run.results.exists():
        return code
    # Imported here, because scipy and matplotlib take a second to import.
    from cfmask.report import evaluation_page, summary, tables

    results = read_object(run.results) or {}
    names = dict(zip(evaluation.models, model_names(evaluation.models), strict=True))
    if arguments.greedy:
        chosen = results["ingredients"]
        rows = [
            [names[path], f"{top1:.2f}", f"no. {chosen.index(path) + 1}" if path in chosen else "left out"]
            for path, top1 in zip(evaluation.models, results["holdout"], strict=True)
        ]
        print(tables.table(["model", f"{evaluation.chooses_on}, alone", "in the soup"], rows) + "\n")
    evaluation_page.write_page(run, "Soup", pictures=summary.show(run, "Soup"))
    print(f"{len(results['ingredients'])} of {len(names)} models: {run.final}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
