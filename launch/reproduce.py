#!/usr/bin/env python3
"""The paper's tables by one command: every row's runs and evaluations as jobs that wait for each other.

    python launch/reproduce.py --arch ViT-B-32 --seeds 0 1 2 --shards DIR --nodes 2      all rows, 83 jobs
    python launch/reproduce.py --arch ViT-B-32 --shards DIR --rows wise-kd               one, and what it needs
    python launch/reproduce.py … --dry-run                                               what would be done, its cost
    python launch/reproduce.py … --follow                                                stay and watch

The same command again submits what is missing, failed or was cancelled, and nothing else, and draws the table of what
is there: OUT/table.md, table.tex, results.json, bars.png. All that it knows of a job stands in that job's run folder.
Without Slurm the same jobs are done one after the other.

A held-out set is needed (make_shards.py --holdout 10240), so that 1,270,927 images of ImageNet are trained on. Runs are
evaluated on it at the ends of their epochs, and rows are of the checkpoint that is best there, as the authors'; with
--checkpoint last, of the last one.

Flags of submit.py apply to all training runs, but for those that a row decides. Runs that wait for the same jobs are an
array; --array-parallelism says how many of its members may run at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from cfmask.data.benchmarks import SHIFTED, VAL  # noqa: E402
from cfmask.errors import UserError, exits_cleanly  # noqa: E402
from cfmask.evaluation import Evaluation, is_of_other_models  # noqa: E402
from cfmask.files import write_atomically  # noqa: E402
from cfmask.model_origin import BEST, LAST, ModelOrigin, checkpoint_note  # noqa: E402
from cfmask.models.head import ModelInfo, check_architecture, check_head, read_info  # noqa: E402
from cfmask.models.initial import check_initial_model, initial_model, model_info  # noqa: E402
from cfmask.recipe import Recipe  # noqa: E402
from cfmask.runs import RunFolder  # noqa: E402
from cfmask.runtime.jsonl import read_lines, read_object  # noqa: E402
from cfmask.secrets import has_secrets, mask_secrets  # noqa: E402
from launch.jobs import training  # noqa: E402
from launch.jobs.allocation import Allocation, resolve_allocation, warn_of_paths_outside  # noqa: E402
from launch.jobs.claims import check_path  # noqa: E402
from launch.jobs.cluster_file import load_cluster_file  # noqa: E402
from launch.jobs.planning import Planned, take_up  # noqa: E402
from launch.jobs.recipe_arguments import add_recipe_arguments  # noqa: E402
from launch.jobs.run_state import jobs_in_queue, look_at  # noqa: E402
from launch.jobs.run_status import ENDED, Status, status_of  # noqa: E402
from launch.jobs.sbatch import after_success  # noqa: E402
from launch.jobs.settings import add_allocation_arguments  # noqa: E402
from launch.jobs.status_table import duration  # noqa: E402
from launch.jobs.submission import enqueue_all, run_one_here  # noqa: E402
from launch.paper import cost  # noqa: E402
from launch.paper.holdout import add_holdout_arguments, check_holdout, settle_choice  # noqa: E402
from launch.paper.plan import (  # noqa: E402
    DONE,
    HEADLINE,
    LABELS,
    MISSING,
    QUEUED,
    WAITING,
    Node,
    Plan,
    Setup,
    arrays,
    awaited,
    choose_rows,
    paper_plan,
    still_needed,
    to_submit,
)
from launch.slurm.control import cancel  # noqa: E402
from launch.slurm.queue import SlurmJob  # noqa: E402

if TYPE_CHECKING:
    from cfmask.data.shards import Manifest

ARCHITECTURES = ("ViT-B-32", "ViT-B-16", "ViT-L-14")
SETS = (VAL.name, *(benchmark.name for benchmark in SHIFTED))
GPU_TFLOPS, CPU_TFLOPS = 100.0, 0.1
"""Assumed of a rank, where nothing is measured: a third of what an A100 is sold with, and two CPU cores."""
_LOOK_S = 10

_ROWS_DECIDE = ("model.head", "run.seed")
"""Settings that a row, or another flag of this command, decides; and all of the method."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument(
        "--arch",
        choices=ARCHITECTURES,
        help="OpenAI's CLIP of this size; where there is no network, with --pretrained and its weights",
    )
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2, the paper's")
    p.add_argument("--rows", nargs="+", choices=list(LABELS), metavar="ROW", help=f"default: all. {', '.join(LABELS)}")
    p.add_argument(
        "--sets",
        nargs="+",
        default=list(SETS),
        metavar="SET",
        help=f"folders under --shards to evaluate on; the first is the one in distribution (default: {' '.join(SETS)})",
    )
    p.add_argument(
        "--soup",
        type=Path,
        metavar="FILE",
        help="a model soup to start from: a cfmask model file, or a state dict of tower and head such as the authors' "
        "of model soups, whose classes are those of the shards in their order (default: the average of the FT models)",
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="the plan's folder (default: reproductions/<model>)")
    p.add_argument("--dry-run", action="store_true", help="check everything, show the plan and its cost, queue nothing")
    p.add_argument("--follow", action="store_true", help="on Slurm: stay and show the jobs until none is left")
    p.add_argument(
        "--tflops",
        type=float,
        metavar="X",
        help="TFLOP/s of a GPU (of a rank on CPUs) that the estimate of the cost assumes (default: as measured in the "
        f"plan's runs; before there are any, {GPU_TFLOPS:g}, {CPU_TFLOPS:g} on CPUs)",
    )
    p.add_argument("--allow-count-mismatch", action="store_true", help="take known sets that have other counts")
    add_holdout_arguments(p)
    add_allocation_arguments(p)
    add_recipe_arguments(p)
    return p


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    """The command; 0 if all is done or under way, 1 if something failed, 130 if it was interrupted."""
    arguments = parser().parse_args(argv)
    _refuse(arguments)
    file = load_cluster_file(arguments.cluster)
    allocation = resolve_allocation(arguments, file)
    if arguments.follow and not allocation.on_slurm:
        raise UserError("--follow would do nothing: on this machine jobs are done one after the other, and shown.")
    scene = Scene.of(arguments, file, allocation)
    seen = look(scene)
    scene.check(seen)
    warn_of_paths_outside(allocation, scene.setup.folder, scene.base.data.shards)
    print(overview(scene, seen))
    print(scene.selection)
    print(estimate(scene, seen, arguments.tflops))
    states = {name: each.state for name, each in seen.items()}
    chosen = to_submit(scene.plan, states)
    if arguments.dry_run:
        how = _in_arrays(arrays(chosen, states)) if allocation.on_slurm else ""
        print(f"Would submit {_jobs(len(chosen))}{how}. Everything checked; nothing was queued.")
        return 0
    code = 0
    if chosen:
        with scene.held():
            seen = look(scene)  # who held it before may have submitted something
            scene.make_soup()
            code = send(scene, seen) if allocation.on_slurm else do_here(scene, seen)
    if arguments.follow and not code:
        code = follow(scene)
    show_table(scene)
    return code


def _refuse(arguments: argparse.Namespace) -> None:
    """Raises UserError for flags that would do nothing, or contradict each other."""
    if arguments.preset:
        raise UserError("--preset would do nothing: choose rows of the table with --rows.")
    decided = [name for name in vars(arguments) if name.startswith("method.") or name in _ROWS_DECIDE]
    if decided:
        flags = ", ".join("--" + name.partition(".")[2].replace("_", "-") for name in decided)
        raise UserError(
            f"{flags} cannot be said here: rows say what is done, seeds are --seeds, and all runs start from one "
            "model. A variant of a row is a run of its own: launch/submit.py."
        )
    if arguments.arch:
        if hasattr(arguments, "model.name"):
            raise UserError("--arch and --model both name a model: give one of them.")
        setattr(arguments, "model.name", f"{arguments.arch}-quickgelu")
    elif not hasattr(arguments, "model.name"):
        raise UserError(f"--arch is missing: {', '.join(ARCHITECTURES)}; or --model and --pretrained.")
    for what in ("seeds", "sets", "rows"):
        given = getattr(arguments, what) or []
        if len(set(given)) != len(given):
            raise UserError(f"--{what} names one of them twice: {' '.join(map(str, given))}.")
    if arguments.tflops is not None and not 0 < arguments.tflops < float("inf"):
        raise UserError(f"--tflops is {arguments.tflops}; it must be a number above 0.")


# --- what the plan is of ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """A plan and where it is done.

    base: what all training runs have in common.
    start: what the zero-shot model is, and with it all that come of it.
    arch: of ARCHITECTURES, if it is OpenAI's.
    foreign_soup: the file that Setup.soup is to be made of.
    selection: what is trained on, what is held out and which checkpoints count, in sentences.
    """

    plan: Plan
    setup: Setup
    base: Recipe
    start: ModelInfo
    allocation: Allocation
    arch: str | None = None
    foreign_soup: Path | None = None
    selection: str = ""

    @classmethod
    def of(cls, arguments: argparse.Namespace, file: Any, allocation: Allocation) -> Scene:
        """Raises UserError if flags, sets or model do not go together."""
        model_name = vars(arguments)["model.name"]
        folder = (arguments.out or Path("reproductions") / Path(model_name).stem).resolve()
        checkpoint = settle_choice(arguments, file, read_object(folder / "plan.json"))
        base = training.resolve_recipe(training.recipe_of(arguments, file, None), allocation)
        evaluation = Evaluation(
            shards=base.data.shards,
            sets=tuple(arguments.sets),
            precision=base.run.precision,
            allow_count_mismatch=arguments.allow_count_mismatch,
        )
        check_path(folder)
        given = arguments.soup.resolve() if arguments.soup else None
        foreign = given if given is not None and read_info(given) is None else None

        def recipe_of(preset: str, seed: int, start: Path, ensemble: Path | None) -> Recipe:
            recipe = training.recipe_of(arguments, file, preset, seed)
            method = replace(recipe.method, ensemble=str(ensemble) if ensemble else None)
            model = replace(recipe.model, pretrained=str(start))
            return training.resolve_recipe(replace(recipe, model=model, method=method), allocation)

        setup = Setup(
            folder=folder,
            recipe_of=recipe_of,
            evaluation=evaluation,
            architecture=base.model.name,
            pretrained=base.model.pretrained,
            mean=base.model.mean,
            std=base.model.std,
            seeds=tuple(arguments.seeds),
            soup=folder / "soup.safetensors" if foreign else given,
            checkpoint=checkpoint,
        )
        classes = training.load_set(base.data.shards, arguments.sets[0]).classes
        model = base.model
        own = read_info(model.pretrained) if Path(model.pretrained).is_file() else None
        start = replace(
            own or model_info(model.name, model.pretrained, mean=model.mean, std=model.std),
            name=model.name,
            classes=tuple(wnid for wnid, _ in classes),
            class_names=tuple(display for _, display in classes),
        )
        plan = paper_plan(choose_rows(arguments.rows, setup), setup)
        together = arrays(plan.nodes.values(), dict.fromkeys(plan.nodes, MISSING))
        if arguments.array_parallelism and all(len(array) == 1 for array in together):
            raise UserError("--array-parallelism would do nothing: no two jobs of this plan wait for the same jobs.")
        selection = check_holdout(
            base,
            arguments.sets,
            trains=plan.trains,
            without=arguments.without_holdout,
            allow_count_mismatch=arguments.allow_count_mismatch,
            select_on_test_set=arguments.select_on_test_set,
        )
        if plan.trains:
            which = f"best on {base.run.best_on}" if checkpoint == BEST else "last"
            selection += f" Rows are of each run's checkpoint that is {which}."
        return cls(plan, setup, base, start, allocation, arguments.arch, foreign, selection)

    def folder(self, name: str) -> RunFolder:
        return RunFolder(self.setup.folder / name)

    @property
    def sets(self) -> dict[str, Manifest]:
        """All that are read."""
        of_training = (self.base.data.train_split, *self.base.data.eval_sets) if self.plan.trains else ()
        names = (*self.setup.evaluation.sets, *of_training)
        return {name: training.load_set(self.base.data.shards, name) for name in names}

    @property
    def identity(self) -> dict[str, Any]:
        """What plan.json keeps: all that changes a number of the table. Rows and seeds may be added."""
        return {
            "recipe": dataclasses.asdict(self.base),
            "sets": list(self.setup.evaluation.sets),
            "allow_count_mismatch": self.setup.evaluation.allow_count_mismatch,
            "soup": str(self.foreign_soup or self.setup.soup) if self.setup.soup else None,
            "checkpoint": self.setup.checkpoint,
        }

    def check(self, seen: Mapping[str, Seen]) -> None:
        """All that can be known before the first job is queued; of what is not there yet, what it will be.

        Raises:
            UserError: another plan in the folder; sets, models, recipes or ranks that do not go together.
        """
        from cfmask.evaluate import check_set

        self._check_folder()
        sets = self.sets
        first = self.base.data.train_split if self.plan.trains else self.setup.evaluation.sets[0]
        coming = {
            str(self.setup.model(node.name)): self.start
            for node in self.plan.nodes.values()
            if isinstance(node.work, Evaluation) and node.work.make != "nothing"
        }
        if self.foreign_soup is not None:
            coming[str(self.setup.soup)] = self.start
        for node in still_needed(self.plan, {name: each.state for name, each in seen.items()}):
            run = self.folder(node.name)
            if run.root.exists():
                run.claim(node.work)
            if isinstance(node.work, Recipe):
                training.check(node.work, run, self.allocation, coming)
                continue
            node.work.checked()
            for name in node.work.sets:
                training.check_same_classes(sets[name], sets[first])
                check_set(sets[name], allow_count_mismatch=node.work.allow_count_mismatch)
            if node.work.make == "zero-shot":
                self._check_start()
        if self.foreign_soup is not None and self.setup.soup is not None and not self.setup.soup.exists():
            check_initial_model(*self._soup_start, mean=self.start.mean, std=self.start.std, keep_head=True)
        if self.setup.soup is not None and self.foreign_soup is None:
            info = read_info(self.setup.soup)
            assert info is not None
            check_head(self.setup.soup, self.start.classes)
            check_architecture(info, self.start, str(self.setup.soup))

    def _check_start(self) -> None:
        # Here, not in the job: compute nodes often have no network.
        model = self.base.model
        check_initial_model(model.name, model.pretrained, None, self._classes, mean=model.mean, std=model.std)

    def _check_folder(self) -> None:
        kept = read_object(self.setup.folder / "plan.json")
        if kept is None:
            return
        kept = {"checkpoint": LAST} | kept  # plans of earlier versions had no choice
        ours = json.loads(json.dumps(self.identity))  # lists for tuples, as in the file
        differences = [
            f"{name}: {kept.get(name)} → {value}"
            for name, value in ours.items()
            if name != "recipe" and kept.get(name) != value
        ]
        differences += Recipe.from_json(json.dumps(kept.get("recipe", {}))).differences(self.base)
        if differences:
            raise UserError(
                f"{self.setup.folder} holds another plan: {'; '.join(differences)} (there → here). Give this one a "
                "folder of its own with --out, or repeat that one's settings."
            )

    @contextlib.contextmanager
    def held(self) -> Any:
        """Have the folder to oneself while jobs are submitted (or done here), so that none is submitted twice.

        Raises:
            UserError: another has it, or it cannot be written.
        """
        folder = self.setup.folder
        with contextlib.ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(RunFolder(folder).locked("reproduce.py"))
            except OSError as error:
                raise UserError(f"{folder} cannot be written: {error.strerror}. Check --out.") from error
            except UserError as error:
                owner = RunFolder(folder).owner()
                if owner is None:
                    raise
                raise UserError(
                    f"Another reproduce.py is at work in {folder} ({owner}). Wait until it has ended; the same command "
                    "does then what is left."
                ) from error
            self._check_folder()
            if not (folder / "plan.json").exists():
                kept = json.dumps(self.identity, indent=2)
                write_atomically(folder / "plan.json", kept, private=has_secrets(kept))
            yield

    @property
    def _classes(self) -> list[tuple[str, str]]:
        return list(zip(self.start.classes, self.start.class_names, strict=True))

    @property
    def _soup_start(self) -> tuple[str, str, None, list[tuple[str, str]]]:
        """Arguments of initial_model for --soup's state dict, which is a start of the same model as --pretrained."""
        return self.base.model.name, str(self.foreign_soup), None, self._classes

    def make_soup(self) -> None:
        """A cfmask model file of the state dict that --soup names."""
        if self.foreign_soup is None or self.setup.soup is None or self.setup.soup.exists():
            return
        from cfmask.models.head import save_model

        model, info = initial_model(*self._soup_start, mean=self.start.mean, std=self.start.std, keep_head=True)
        save_model(self.setup.soup, model, info)
        print(f"{self.foreign_soup}, with its head, is {self.setup.soup} now")


# --- what there is ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """state: plan.DONE and so on. status: what launch/status.py says. jobs: those in Slurm's queue, several if it is a
    chain; the last one ends well when the results are there."""

    state: str
    status: Status
    jobs: tuple[SlurmJob, ...] = ()

    @property
    def job(self) -> SlurmJob | None:
        """The one that runs, or will first."""
        return next(iter(self.jobs), None)


def look(scene: Scene) -> dict[str, Seen]:
    """All nodes, by one squeue."""
    found, slurm = look_at([scene.folder(name) for name in scene.plan.nodes])
    seen = {}
    for name, run_state in zip(scene.plan.nodes, found, strict=True):
        status, jobs = status_of(run_state, slurm), tuple(jobs_in_queue(run_state, slurm))
        blind = scene.allocation.on_slurm and slurm.queue is None
        known = run_state.jobs.slurm or run_state.jobs.unconfirmed
        if blind and known and status.state in ENDED and not run_state.finished:
            status = replace(status, state="unknown")  # Slurm may have requeued a job that says it has ended
        seen[name] = Seen(judge(status, next(iter(jobs), None)), status, jobs)
        if seen[name].state == DONE and is_of_other_models(read_object(run_state.run.results) or {}):
            seen[name] = Seen(MISSING, status)
    return seen


def _take_up(scene: Scene, nodes: Sequence[Node], seen: Mapping[str, Seen]) -> list[Planned[Recipe | Evaluation]]:
    """Make the folders, or see that each is its node's and nobody is at it; of other models' results they are rid."""
    planned = take_up([Planned(scene.folder(node.name), node.work) for node in nodes])
    for node in nodes:
        if seen[node.name].status.state == "finished":
            scene.folder(node.name).drop_results()
    return planned


def judge(status: Status, job: SlurmJob | None) -> str:
    """What a run's status means for the plan. A job that waits for one that has failed will never start: that it is
    there counts for nothing, though Slurm may take a while to remove it."""
    if status.state == "finished":
        return DONE
    if status.state in ENDED:
        return MISSING
    if job is not None and status.state == "queued" and job.reason.startswith("Dependency"):
        return MISSING if job.reason == "DependencyNeverSatisfied" else WAITING
    return QUEUED


def overview(scene: Scene, seen: Mapping[str, Seen]) -> str:
    """The plan as a tree, a line a kind of job, with what becomes of them. A job hangs under the last that it waits
    for; what else it takes is above that."""
    kinds: dict[str, list[Node]] = {}
    for node in scene.plan.nodes.values():
        kinds.setdefault(node.kind, []).append(node)
    kind_of = {name: node.kind for name, node in scene.plan.nodes.items()}
    needs = {
        kind: list(dict.fromkeys(kind_of[n] for node in nodes for n in node.after)) for kind, nodes in kinds.items()
    }
    depth: dict[str, int] = {}
    for kind in kinds:  # in order: what it needs has its depth
        depth[kind] = 1 + max((depth[each] for each in needs[kind]), default=-1)
    parent = {kind: max(needs[kind], key=lambda each: depth[each], default=None) for kind in kinds}
    lines: list[tuple[str, str, str]] = []

    def add(kind: str, first: str, rest: str) -> None:
        nodes = kinds[kind]
        title = kind + (f" × {len(nodes)}" if len(nodes) > 1 else "")
        lines.append((first + title, _what(nodes[0]), _becomes([seen[node.name] for node in nodes])))
        children = [each for each in kinds if parent[each] == kind]
        for each in children:
            last = each == children[-1]
            add(each, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))

    for kind in kinds:
        if parent[kind] is None:
            add(kind, "", "")
    widths = [max(len(line[i]) for line in lines) for i in (0, 1)]
    done = sum(each.state == DONE for each in seen.values())
    table = "\n".join(f"{a.ljust(widths[0])}  {b.ljust(widths[1])}  {c}".rstrip() for a, b, c in lines)
    return f"{table}\n{done} of {_jobs(len(seen))} done, in {scene.setup.folder}"


def _what(node: Node) -> str:
    if isinstance(node.work, Recipe):
        epochs = node.work.optim.total_epochs
        return f"train, {epochs} epoch" + ("s" if epochs > 1 else "")
    makes = {"nothing": "evaluate", "zero-shot": "make the head", "wise-ft": "mix", "uniform-soup": "average"}
    what = makes[node.work.make]
    return what if what == "evaluate" else f"{what}, evaluate"


def _becomes(seen: Sequence[Seen]) -> str:
    """What becomes of a kind's jobs, in words."""
    words = []
    for each in seen:
        status = each.status
        word = "done" if each.state == DONE else "waits" if each.state == WAITING else status.state
        if each.state == MISSING:
            others = {"never started": "–", "finished": "of other models"}
            word = "cannot start" if each.job is not None else others.get(status.state, status.state)
        if status.state == "running" and status.step and len(seen) == 1:
            left = f", ETA {duration(status.eta_s)}" if status.eta_s is not None else ""
            word += f" {status.step}/{status.total_steps}{left}"
        words.append(word)
    if len(set(words)) == 1:
        only = words[0]
        running = [e.status for e in seen if e.status.state == "running" and e.status.eta_s is not None]
        eta = f", ETA {duration(max(s.eta_s or 0 for s in running))}" if running and len(seen) > 1 else ""
        return only + eta
    return ", ".join(f"{number} {word}" for word, number in Counter(words).items())


def _jobs(number: int) -> str:
    return f"{number} job" + ("s" if number != 1 else "")


def _in_arrays(groups: Sequence[Sequence[Node]]) -> str:
    sizes = [len(group) for group in groups if len(group) > 1]
    return f", {sum(sizes)} of them in {len(sizes)} array" + ("s" if len(sizes) > 1 else "") if sizes else ""


# --- what it costs ----------------------------------------------------------------------------------------------------


def estimate(scene: Scene, seen: Mapping[str, Seen], assumed: float | None) -> str:
    """GPU-hours of all jobs and of those that are left, and what that rests on, in sentences."""
    flops = cost.forward_flops(scene.start.config)
    images = {name: manifest.num_samples for name, manifest in scene.sets.items()}
    gpu = scene.allocation.gpus_per_node > 0
    unit, each = ("GPU-hours", "GPU") if gpu else ("hours of a rank", "rank")
    found = {} if assumed is not None else measured(scene, flops)
    if assumed is not None:
        rate, rests = assumed, f"{assumed:g} TFLOP/s of each {each} (--tflops)"
    elif found:
        rate = statistics.median(found.values())
        names = ", ".join(list(found)[:3]) + (" …" if len(found) > 3 else "")
        rests = f"{rate:.3g} TFLOP/s of each {each}, measured in {names}"
    else:
        rate = GPU_TFLOPS if gpu else CPU_TFLOPS
        rests = f"an assumed {rate:g} TFLOP/s of each {each} (no run of this plan has trained yet; --tflops sets it)"
    spent = {
        name: cost.hours(cost.image_forwards(node, images) * flops, rate) for name, node in scene.plan.nodes.items()
    }
    left = {}
    for node in still_needed(scene.plan, {name: each.state for name, each in seen.items()}):
        status = seen[node.name].status
        share = (status.step or 0) / status.total_steps if status.total_steps else 0.0
        left[node.name] = (1 - min(1.0, share)) * spent[node.name]
    ranks = {
        name: scene.allocation.world_size if isinstance(node.work, Recipe) else scene.allocation.tasks_per_node
        for name, node in scene.plan.nodes.items()
    }
    chain = cost.longest_chain(scene.plan.nodes, {name: value / ranks[name] for name, value in left.items()})
    training = sum(value for name, value in left.items() if isinstance(scene.plan.nodes[name].work, Recipe))
    return (
        f"About {_hours(sum(spent.values()))} {unit}, of which {_hours(sum(left.values()))} are left "
        f"({_hours(training)} of them training); at least {_hours(chain)} hours from now, if no job has to wait for "
        f"{'GPUs' if gpu else 'cores'}. This rests on {flops / 1e9:.4g} GFLOP for a forward of one image, the forwards "
        f"of each method's step as tools/bench.py counts them, and {rests}. Starts, stalls of the data and work done "
        "twice after an interruption are not in it."
    )


def measured(scene: Scene, flops: float) -> dict[str, float]:
    """TFLOP/s of each rank in training runs of this plan on this kind of device, by name."""
    found = {}
    kind = "cuda" if scene.allocation.gpus_per_node else "cpu"
    for name, node in scene.plan.nodes.items():
        run = scene.folder(name)
        starts = [line for line in read_lines(run.attempts) if str(line.get("device", "")).startswith(kind)]
        rates = [line["samples_per_s"] for line in read_lines(run.log, tail=1 << 16) if "samples_per_s" in line]
        if isinstance(node.work, Recipe) and starts and rates and starts[-1].get("world_size"):
            rate = statistics.median(rates)
            found[name] = cost.rate_of(node.work, rate, starts[-1]["world_size"], flops)
    return found


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


# --- submitting -------------------------------------------------------------------------------------------------------


def send(scene: Scene, seen: Mapping[str, Seen]) -> int:
    """A job for each node that lacks one, after the jobs of those that it takes models of. Those that wait for the same
    jobs are members of an array.

    Raises:
        UserError: Slurm cannot be asked, or does not take a job. What was submitted stays.
    """
    states = {name: each.state for name, each in seen.items()}
    blind = [name for name, each in seen.items() if each.status.state == "unknown"]
    if blind:
        raise UserError(
            f"Slurm cannot be asked what has become of {blind[0]}"
            + (f" and {len(blind) - 1} more" if len(blind) > 1 else "")
            + ": nothing was submitted. The same command goes on when squeue answers."
        )
    jobs = {name: each.jobs[-1].id for name, each in seen.items() if each.jobs and each.state in (QUEUED, WAITING)}
    chosen = to_submit(scene.plan, states)
    submitted = 0
    for group in arrays(chosen, states):
        waits = awaited(group[0], states)
        if elsewhere := [name for name in waits if name not in jobs]:
            raise UserError(
                f"{elsewhere[0]} is under way without a job of Slurm ({seen[elsewhere[0]].status.state}), and "
                f"{group[0].name} cannot be told to wait for it. The same command goes on when it has ended."
            )
        for node in group:
            before = seen[node.name]
            if before.job is not None:
                print(f"{node.name}: job {before.job.id} waits for one that has gone: removed")
                cancel(*(job.id for job in before.jobs))
            elif why := _why_again(before):
                print(f"{node.name} {why}: submitted again")
        planned = _take_up(scene, group, seen)
        allocation = scene.allocation
        if isinstance(group[0].work, Evaluation):
            allocation = on_one_node(allocation)
        if waits:  # what the flags say to wait for, those have waited for already
            allocation = after_success(replace(allocation, dependency=None), [jobs[name] for name in waits])
        try:
            for part in enqueue_all(planned, allocation, tell=lambda line: None):
                for each, job in part:
                    name = each.run.root.name
                    jobs[name] = job.job_id
                    print(f"{name}: job {job.job_id}" + (f" after {', '.join(waits)}" if waits else ""))
                submitted += len(part)
        except UserError as error:
            raise UserError(
                f"{error} {submitted} of {_jobs(len(chosen))} have been submitted; the same command submits the rest."
            ) from None
    print(
        f"{_jobs(len(chosen))} submitted on {scene.allocation}. The same command shows the table as it grows, and "
        f"submits what has failed; python launch/status.py {scene.setup.folder} shows the jobs."
    )
    return 0


def _why_again(before: Seen) -> str | None:
    """Why a node that is missing is no new one, in words."""
    if before.status.state == "never started":
        return None
    if before.status.state == "finished":
        return "was of models that have been written anew"
    return f"is {before.status.state}" + (f" ({before.status.last_end})" if before.status.last_end else "")


def on_one_node(allocation: Allocation) -> Allocation:
    """For an evaluation: minutes on one node, and no result depends on how many there are."""
    return replace(allocation, nodes=1, again={**allocation.again, "nodes": 1})


def do_here(scene: Scene, seen: Mapping[str, Seen]) -> int:
    """One after the other, on this machine. What needs one that fails is left out; the others are done.

    Returns:
        0, 1 if one failed, 128 + the signal that ended it (Ctrl-C, TERM, HUP).
    """
    states = {name: each.state for name, each in seen.items()}
    chosen = to_submit(scene.plan, states)
    failed = []
    for number, node in enumerate(chosen, 1):
        if lacking := [name for name in node.after if states[name] != DONE]:
            print(f"{node.name} is left out: it needs {', '.join(lacking)}")
            failed.append(node.name)
            continue
        before = seen[node.name]
        why = _why_again(before)
        print(f"\n{number} of {len(chosen)}: {node.name}" + (f" ({why}: it goes on)" if why else ""), flush=True)
        [planned] = _take_up(scene, [node], seen)
        code = run_one_here(planned, scene.allocation, follow=True)
        if code > 128:  # a signal is for all of them
            return code
        if code:
            failed.append(node.name)
        else:
            states[node.name] = DONE
    if failed:
        print(f"{len(failed)} of {_jobs(len(chosen))} are not done: {', '.join(failed)}")
    return 1 if failed else 0


def follow(scene: Scene) -> int:
    """Show the jobs until none is left.

    Returns:
        0 if all is done, 1 if something failed, 130 if it was interrupted. Ctrl-C leaves the jobs alone.
    """
    shown = ""
    quiet = 0
    try:
        while True:
            seen = look(scene)
            text = overview(scene, seen)
            if sys.stdout.isatty():
                up = f"\x1b[{shown.count(chr(10)) + 1}A\x1b[J" if shown else ""
                print(up + text, flush=True)
            elif text != shown:
                print(time.strftime("\n%H:%M:%S\n") + text, flush=True)
            shown = text
            states = {name: each.state for name, each in seen.items()}
            left = still_needed(scene.plan, states)
            # Two looks have to agree: on a requeue there are moments without a job.
            quiet = quiet + 1 if all(states[node.name] == MISSING for node in left) else 0
            if not left or quiet == 2:
                break
            time.sleep(_LOOK_S)
    except KeyboardInterrupt:
        print("The jobs go on. The same command shows them again.")
        return 130
    for node in left:
        if seen[node.name].status.last_end:
            print(f"{node.name}: {seen[node.name].status.last_end}")
    return 1 if left else 0


# --- the table --------------------------------------------------------------------------------------------------------


def show_table(scene: Scene) -> None:
    """What rows there are, beside the published numbers: table.md, table.tex, results.json and pictures."""
    # Here, because a command that only submits needs neither scipy nor matplotlib.
    from cfmask import report as reports

    folder = scene.setup.folder
    rows, found, missing = [], {}, []
    origins: dict[str, list[ModelOrigin]] = {}
    for row in scene.plan.rows:
        done = [name for name in row.found_in if scene.folder(name).results.exists()]
        models = []
        for name in done:
            results = reports.read_results(folder / name)
            origins.setdefault(row.word, []).extend(origin for origin in results.origins if origin.run is not None)
            models.append(results.models[results.chosen or 0])
        if len(done) < len(row.found_in):
            missing.append(row.label + (f" ({len(done)} of {len(row.found_in)} seeds there)" if done else ""))
        # One without models is a line of dashes.
        rows.append(reports.Row(row.label, tuple(models) or (reports.ModelResult(row.label, {}),)))
        found[row.word] = len(done)
    if not any(found.values()):
        print("No row of the table is there yet.")
        return
    home, *shifted = scene.setup.evaluation.sets
    split = reports.Split(home, tuple(shifted))
    published = _published(reports.PUBLISHED.get(scene.arch or "", {}))
    note = checkpoint_note({LABELS[word]: of_row for word, of_row in origins.items()})
    if published:
        table = reports.comparison(rows, published, split, note=note)
    else:
        table = reports.markdown_table(rows, split, note=note)
    if missing:
        table += f"\n\nNot there yet: {'; '.join(missing)}."
    write_atomically(folder / "table.md", table + "\n")
    write_atomically(folder / "table.tex", reports.latex_table(rows, split, note=note) + "\n")
    numbers = []
    for row, shown in zip(scene.plan.rows, rows, strict=True):
        different = reports.differences(shown, published.get(row.label, {}), split)
        numbers.append(
            {
                "row": row.word,
                "label": row.label,
                "seeds": found[row.word],
                "of": len(row.found_in),
                "checkpoints": [origin.to_json() for origin in origins.get(row.word, [])],
                "top1": {
                    label: {"value": e.value, "low": e.low, "high": e.high, "sd": e.sd, "noise": e.noise}
                    | (
                        {"published": d.published, "difference": d.difference, "within_noise": d.within_noise}
                        if (d := different.get(label))
                        else {}
                    )
                    for label, e in shown.estimates(split).items()
                },
            }
        )
    write_atomically(
        folder / "results.json", mask_secrets(json.dumps({"plan": scene.identity, "rows": numbers}, indent=2))
    )
    there = [row for row in rows if row.sets]
    reports.bar_chart(there, folder / "bars.png", split)
    written = ["table.md", "table.tex", "results.json", "bars.png"]
    line = [LABELS[word] for word in ("zero-shot", "ft") if found.get(word)]
    if len(line) == 2 and shifted:
        with contextlib.suppress(UserError):  # the two may be equal in distribution: no line goes through them
            reports.effective_robustness(there, line, folder / "effective_robustness.png", split)
            written.append("effective_robustness.png")
    print(f"\n{table}\n\n{folder}: {', '.join(written)}")


def _published(known: Mapping[str, Any]) -> dict[str, Any]:
    """By row's label, what is known of an architecture by the names of report.PUBLISHED."""
    names = {"zero-shot": "zero-shot", "ft": "FT", "wise-ft": "WiSE-FT", HEADLINE: "this method"}
    return {LABELS[word]: known[name] for word, name in names.items() if name in known}


if __name__ == "__main__":
    sys.exit(main())
