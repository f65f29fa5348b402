"""What evaluate, wise_ft and soup share: flags, how an evaluation is carried out, and how its results are shown."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from cfmask.best_checkpoint import POINTER  # noqa: E402
from cfmask.data.benchmarks import ALIASES  # noqa: E402
from cfmask.data.remote import is_remote  # noqa: E402
from cfmask.data.shards import find_set, manifest_if_there  # noqa: E402
from cfmask.errors import UserError  # noqa: E402
from cfmask.evaluation import Evaluation, is_of_other_models  # noqa: E402
from cfmask.files import write_atomically  # noqa: E402
from cfmask.model_origin import BEST, CHOICES, LAST, describe, is_training_run, origin_of, settled  # noqa: E402
from cfmask.models.head import ModelInfo, check_same_kind, read_info  # noqa: E402
from cfmask.runs import RunFolder, find_model  # noqa: E402
from cfmask.runtime.jsonl import read_object  # noqa: E402
from cfmask.secrets import mask_secrets  # noqa: E402
from cfmask.selection import FLAG, FLAG_HELP, check_selection, known_test_set, refuse_idle_flag  # noqa: E402
from launch.jobs.allocation import Allocation, check_arithmetic, resolve_allocation, resolve_precision  # noqa: E402
from launch.jobs.claims import check_path, take_folder  # noqa: E402
from launch.jobs.cluster_file import load_cluster_file  # noqa: E402
from launch.jobs.planning import Planned, left_out, take_up  # noqa: E402
from launch.jobs.processes import ending_signals, silence_output  # noqa: E402
from launch.jobs.settings import add_allocation_arguments, given_flags  # noqa: E402
from launch.jobs.submission import dry_run, run_here, submit_to_slurm  # noqa: E402
from tools._shared import DATA_HELP  # noqa: E402

if TYPE_CHECKING:
    from cfmask.report import ModelResult, Results, Row


def add_arguments(parser: argparse.ArgumentParser, *, sets_required: bool = True) -> None:
    parser.add_argument("--shards", required=sets_required, metavar="DIR_OR_URL", help=DATA_HELP)
    parser.add_argument(
        "--sets",
        nargs="+",
        required=sets_required,
        default=[],
        metavar="SET",
        help=f"folders under --shards to evaluate on; {', '.join(ALIASES)} are the paper's six",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for results.json, table.md, table.tex and pictures; the same command goes on in it "
        "(default: evaluations/<tool>-<hash>)",
    )
    parser.add_argument(
        "--checkpoint",
        choices=CHOICES,
        default=LAST,
        help="which checkpoint the folder of a training run stands for: that of its last step, or of the epoch's end "
        "that was best on the run's held-out set, as in the authors' evaluation (default: last). The path of a model "
        "file or checkpoint folder is taken as it is",
    )
    parser.add_argument(FLAG, action="store_true", help=FLAG_HELP)
    parser.add_argument(
        "--allow-count-mismatch", action="store_true", help="take a known set that has other counts than it should"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=256,
        metavar="N",
        help="images at a time (default: 256)",
    )
    parser.add_argument(
        "--loader-workers", type=int, metavar="N", help="threads that read (default: one less than there are cores)"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "tf32", "bf16"),
        default="auto",
        help="arithmetic of the forward pass; auto: bf16 on GPUs, fp32 without (default: auto)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would be run, run nothing")
    parser.add_argument(
        "--follow",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="stay until the job ends, and show what came of it (default: yes)",
    )
    add_allocation_arguments(parser, here=True)


def allocation_of(arguments: argparse.Namespace) -> Allocation | None:
    """What the flags ask for; None: the work is done in this process."""
    if arguments.executor == "here" and not given_flags(arguments):
        return None
    if arguments.executor == "here":
        arguments.executor = "auto"
    return resolve_allocation(arguments, load_cluster_file(arguments.cluster))


def evaluation_of(arguments: argparse.Namespace, allocation: Allocation | None, **making: Any) -> Evaluation:
    """The evaluation that flags ask for, checked against what is there.

    Args:
        allocation: where it runs; None: in this process.
        making: fields of Evaluation that say what is made, and of what.

    Raises:
        UserError: what contradicts itself, or models and sets that do not belong together.
    """
    precision = resolve_precision(arguments.precision, allocation)
    check_arithmetic(precision, allocation)
    shards = arguments.shards or ""
    if shards and not is_remote(shards):
        shards = str(Path(shards).resolve())
    holdout = making.pop("holdout", None)
    models = _chosen_models(making.pop("models"), arguments.checkpoint)
    evaluation = Evaluation(
        models=tuple(str(settled(find_model(path))) for path in models),
        shards=shards,
        sets=tuple(_folder(shards, name) for name in arguments.sets),
        holdout=None if holdout is None else _folder(shards, holdout),
        batch_size=arguments.batch_size,
        precision=precision,
        loader_workers=arguments.loader_workers,
        allow_count_mismatch=arguments.allow_count_mismatch,
        **making,
    ).checked()
    _check_choices(evaluation, models, allowed=arguments.select_on_test_set)
    _check(evaluation)
    return evaluation


def _chosen_models(paths: Sequence[str], checkpoint: str) -> list[Path]:
    """Models as the flags name them, with --checkpoint applied to the folders of training runs. Raises UserError if it
    would do nothing."""
    runs = [Path(path) for path in paths if is_training_run(path)]
    if checkpoint == BEST:
        if not runs:
            raise UserError(
                f"--checkpoint {BEST} would do nothing: none of the models is the folder of a training run, and other "
                "paths are taken as they are. Leave it out, or name the run's folder."
            )
        return [RunFolder(path).checkpoints / POINTER if path in runs else path for path in map(Path, paths)]
    for path in runs:
        if not RunFolder(path).final.exists():
            print(f"note: {path} has not finished: its latest checkpoint stands for it.", file=sys.stderr)
    return [Path(path) for path in paths]


def _check_choices(evaluation: Evaluation, models: Sequence[Path], *, allowed: bool) -> None:
    """Refuse sets that choose and should not (``check_selection``), or say what they have chosen."""
    on_test_set = False
    if evaluation.make == "wise-ft" and evaluation.holdout is not None and len(evaluation.alphas) == 1:
        raise UserError(
            f"--holdout {evaluation.holdout} would do nothing: it chooses among several α, and there is one. Leave it "
            "out, or give more --alphas."
        )
    if evaluation.holdout is not None:
        where = find_set(evaluation.shards, evaluation.holdout)
        what = f"--holdout {evaluation.holdout}"
        on_test_set = check_selection(what, evaluation.holdout, manifest_if_there(where), allowed=allowed)
    steps: dict[tuple[str, int], str] = {}
    for path, file in zip(models, evaluation.models, strict=True):
        origin = origin_of(file)
        if evaluation.make.endswith("soup") and origin.run is not None and origin.step is not None:
            other = steps.setdefault((origin.run, origin.step), file)
            if other != file:
                raise UserError(
                    f"{other} and {file} are one model, that of step {origin.step} of {origin.run}, which would count "
                    "twice in the soup. Leave one of them out."
                )
        if path.name != POINTER or origin.run is None or origin.chosen_on is None:
            continue
        accuracy = f"{origin.top1:.2f} % on {origin.chosen_on}"
        so_far = "" if RunFolder(Path(origin.run)).final.exists() else "; the run has not finished"
        print(f"{origin.run}: the best checkpoint is that of step {origin.step} ({accuracy}{so_far}).", file=sys.stderr)
        manifest = manifest_if_there(find_set(RunFolder(Path(origin.run)).recipe().data.shards, origin.chosen_on))
        what = f"The best checkpoint of {origin.run}"
        on_test_set |= check_selection(what, origin.chosen_on, manifest, allowed=allowed)
        for name in evaluation.sets:
            tested = manifest_if_there(find_set(evaluation.shards, name))
            if name == origin.chosen_on or (manifest and tested and manifest.digest == tested.digest):
                what = f"{origin.chosen_on} has chosen the checkpoint of {origin.run}"
                print(f"warning: {what}, which is overrated on {name}.", file=sys.stderr)
    refuse_idle_flag(allowed, on_test_set)


def _folder(shards: str, name: str) -> str:
    """The set that a name means: a folder's own, or one of the six's short ones."""
    if name in ALIASES and (is_remote(shards) or not (Path(shards) / name).is_dir()):
        return ALIASES[name]
    return name


def _check(evaluation: Evaluation) -> None:
    """All that can be known of models and sets before a job is queued."""
    from cfmask.evaluate import check_classes
    from cfmask.evaluator import load_sets_of

    infos: list[ModelInfo] = []
    for path in evaluation.models:
        info = read_info(path)
        if info is None or not info.classes:
            raise UserError(
                f"{path} is not a cfmask model file with a head. cfmask writes one to RUN/model.safetensors; "
                "tools/build_head.py makes one of other programs' checkpoints."
            )
        if infos and evaluation.make != "nothing":
            check_same_kind(info, infos[0], path, than=evaluation.models[0])
        elif infos and info.classes != infos[0].classes:
            raise UserError(
                f"{path} and {evaluation.models[0]} differ in classes: they cannot be evaluated side by side."
            )
        infos.append(info)
    if is_remote(evaluation.shards):
        return  # read when they are needed, through the nodes' cache
    sets = load_sets_of(evaluation)
    for manifest in sets.values():
        if infos:
            check_classes(manifest, infos[0].classes)
    holdout = sets.get(evaluation.holdout or "")
    for name in evaluation.sets:
        if holdout is not None and sets[name].digest == holdout.digest:
            raise UserError(
                f"--holdout {evaluation.holdout} and the set {name} of --sets have the same images: a set that chooses "
                "a model cannot test it as well. Leave one of them out."
            )


def carry_out(
    tool: str, evaluation: Evaluation, allocation: Allocation | None, arguments: argparse.Namespace
) -> tuple[int, RunFolder]:
    """Evaluate on ``allocation``, or in this process if that is None; 0 when the results are there.

    Returns:
        Exit code, and the evaluation's folder.
    """
    folder = arguments.out or Path("evaluations") / f"{tool}-{evaluation.digest()}"
    run = RunFolder(folder.absolute())
    check_path(run.root)
    _drop_results_of_other_models(evaluation, run)
    planned = Planned(run, evaluation)
    if run.results.exists():
        run.claim(evaluation)
        run.tidy()
        print(f"{run.root} has the results already", file=sys.stderr)
        return 0, run
    if arguments.dry_run:
        print(mask_secrets(evaluation.to_json()))
        if allocation is None:
            print(f"Would run in this process, into {run.root}. Everything checked; nothing was run.")
            return 0, run
        return dry_run([planned], allocation), run
    if allocation is None:
        return _in_this_process(evaluation, run), run
    if left_out(run, sweep=False):
        return 0, run
    taken = take_up([planned])
    if allocation.on_slurm:
        return submit_to_slurm(taken, allocation, follow=arguments.follow), run
    return run_here(taken, allocation, follow=arguments.follow), run


def _drop_results_of_other_models(evaluation: Evaluation, run: RunFolder) -> None:
    """A model file that was written anew since is another model."""
    if run.has_work() and is_of_other_models(read_object(run.results) or {}):
        run.claim(evaluation)
        print(f"Models changed since {run.results} was written: they are evaluated anew.", file=sys.stderr)
        run.drop_results()


def _in_this_process(evaluation: Evaluation, run: RunFolder) -> int:
    import torch

    from cfmask.distributed import Place
    from cfmask.evaluator import run_evaluation
    from cfmask.session import FINISHED, QUIT

    with ending_signals() as received:
        take_folder(run, evaluation).keep()
        run.clear_cancelled()
        cores = len(os.sched_getaffinity(0))
        place = Place(attempt=f"here-{os.getpid()}", cpus=cores, gpu=torch.cuda.is_available())
        outcome = run_evaluation(evaluation, run, place, lambda: QUIT if received else None)
        if outcome == FINISHED:
            return 0
        if signal.SIGHUP in received:
            silence_output()
        print(
            f"Interrupted by {received[0].name}. The same command resumes after what has been counted.", file=sys.stderr
        )
    return 128 + received[0]


def show(run: RunFolder, title: str, names: Sequence[str] = ()) -> None:
    """Print the table of an evaluation, and write it beside its results with pictures.

    Args:
        names: of the models, in a table; by default as the results call them.
    """
    from cfmask import report

    results = report.read_results(run.root)
    if not results.sets:
        return
    rows = named_rows(results, names)
    note = _note(results, names)
    text = report.markdown_table(rows, results.split, note=note)
    print(text)
    write_atomically(run.root / "table.md", f"# {title}\n\n{text}\n")
    write_atomically(run.root / "table.tex", report.latex_table(rows, results.split, note=note) + "\n")
    report.bar_chart(rows, run.root / "bars.png", results.split)
    called = results.models
    if names:
        called = tuple(replace(model, name=name) for model, name in zip(called, names, strict=True))
    report.reliability_chart(called, run.root / "reliability.png", results.split)
    written = ["results.json", "table.md", "table.tex", "bars.png", "reliability.png"]
    print(f"\n{run.root}: {', '.join(written)}")


def _note(results: Results, names: Sequence[str]) -> str:
    """What has chosen the models of a table, in sentences."""
    files = [origin.file for origin in results.origins]
    called = names if len(names) == len(files) else short_names(files) if files else []
    parts = [describe(results.origins, dict(zip(files, called, strict=True)))]
    chose = {origin.chosen_on for origin in results.origins if origin.chosen_on is not None}
    for name in sorted(chose):
        if name in results.sets:
            parts.append(f"{name} has chosen a checkpoint, which is overrated on it.")
        elif known_test_set(name):
            parts.append(f"{name}, which has chosen a checkpoint, is a test set.")
    if results.chosen_on is not None:
        manifest = manifest_if_there(find_set(results.evaluation.shards, results.chosen_on))
        test_set = " (a test set)" if known_test_set(results.chosen_on, manifest) else ""
        parts.append(f"Chosen on {results.chosen_on}{test_set}.")
    return " ".join(filter(None, parts))


def named_rows(results: Results, names: Sequence[str]) -> list[Row]:
    """A row for each name; models of one name are seeds of it. No names: a row for each model."""
    from cfmask import report

    if not names:
        return report.rows_of(results)
    found: dict[str, list[ModelResult]] = {}
    for name, model in zip(names, results.models, strict=True):
        found.setdefault(name, []).append(model)
    return [report.Row(name, per_seed) for name, per_seed in found.items()]


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """What tells models apart: their paths without what all have in common at the ends."""
    parts = [list(Path(path).absolute().parts) for path in paths]
    if len(parts) < 2:
        return [str(path) for path in paths]
    while len({each[0] for each in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [each[1:] for each in parts]
    while len({each[-1] for each in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [each[:-1] for each in parts]
    return ["/".join(each) for each in parts]
