"""A reproduction of the paper: the plan that the flags describe, its folder, and the checks before jobs are queued."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cfmask.data.benchmarks import SHIFTED, VAL
from cfmask.errors import UserError
from cfmask.evaluation.checks import check_set
from cfmask.evaluation.model_origin import BEST, LAST
from cfmask.evaluation.selection import HOLDOUT
from cfmask.evaluation_spec import Evaluation, UniformSoup, WiseFT, ZeroShot
from cfmask.models.head import ModelInfo, check_architecture, check_head, read_info
from cfmask.models.initial import check_initial_model, initial_model, model_info
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.files import write_atomically
from cfmask.runtime.jsonl import read_object
from cfmask.secrets import has_secrets
from launch.allocation.cluster_file import ClusterFile
from launch.allocation.resolve import Allocation
from launch.paper.holdout import check_holdout, settle_choice
from launch.paper.materials import Materials, look_for, weights_to_do
from launch.paper.plan import MISSING, ReproductionPlan, Setup, arrays, choose_rows, paper_plan, still_needed
from launch.submission import training
from launch.submission.claims import check_path

ARCHITECTURES = ("ViT-B-32", "ViT-B-16", "ViT-L-14")
SETS = (VAL.name, *(benchmark.name for benchmark in SHIFTED))

_ROWS_DECIDE = ("model.head", "run.seed")
"""Recipe settings, in addition to the method's, that a row or another flag of launch/reproduce.py decides."""


@dataclass(frozen=True)
class Reproduction:
    """A plan, its folder, and the resources of its jobs."""

    plan: ReproductionPlan
    setup: Setup
    base: Recipe
    """The settings that all training runs share."""
    start: ModelInfo
    """The zero-shot model, whose architecture and classes all other models share."""
    allocation: Allocation
    """The resources of each job."""
    materials: Materials
    """The sets that jobs read; some may be missing for a dry run alone."""
    arch: str | None = None
    """The entry of ARCHITECTURES, if the model is one of OpenAI's."""
    foreign_soup: Path | None = None
    """A state dict of another program, to be converted to the model file ``setup.soup``."""
    selection: str = ""
    """Sentences: which images are trained on and held out, and which checkpoints are evaluated."""

    @classmethod
    def of(cls, arguments: argparse.Namespace, file: ClusterFile, allocation: Allocation) -> Reproduction:
        """The plan that the flags of launch/reproduce.py describe. With --dry-run, sets of the paper and weights may be
        missing.

        Raises:
            UserError: flags, sets or model contradict each other.
        """
        model_name = vars(arguments)["model.name"]
        if arguments.dry_run and not training.recipe_of(arguments, file, None).data.shards:
            setattr(arguments, "data.shards", "shards")
        folder = (arguments.out or Path("reproductions") / Path(model_name).stem).resolve()
        checkpoint = settle_choice(arguments, file, _kept_plan(folder))
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
            start=base.model,
            seeds=tuple(arguments.seeds),
            soup=folder / "soup.safetensors" if foreign else given,
            checkpoint=checkpoint,
        )
        words = choose_rows(arguments.rows, setup)
        plan = paper_plan(words, setup)
        of_training = (base.data.train_split, *base.data.eval_sets) if plan.trains else ()
        materials = look_for(
            base.data.shards,
            (*arguments.sets, *of_training),
            (base.run.best_on or HOLDOUT) if plan.trains and not arguments.without_holdout else None,
            may_be_missing=arguments.dry_run,
        )
        classes, model = materials.classes, base.model
        own = read_info(model.pretrained) if Path(model.pretrained).is_file() else None
        start = replace(
            own or model_info(model.name, model.pretrained, mean=model.mean, std=model.std),
            name=model.name,
            classes=tuple(wnid for wnid, _ in classes),
            class_names=tuple(display for _, display in classes),
        )
        together = arrays(plan.nodes.values(), dict.fromkeys(plan.nodes, MISSING))
        if arguments.array_parallelism and all(len(array) == 1 for array in together):
            raise UserError("--array-parallelism would do nothing: no two jobs of this plan wait for the same jobs.")
        if plan.trains and materials.missing.keys() & {base.data.train_split, materials.held_out}:
            selection = materials.selection(base.data.train_split)
        else:
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
        return cls(plan, setup, base, start, allocation, materials, arguments.arch, foreign, selection)

    def folder(self, name: str) -> RunFolder:
        return RunFolder(self.setup.folder / name)

    def to_do(self) -> list[str]:
        """The commands that make the missing sets and get the missing weights."""
        made = self.folder("zero-shot").final.exists()
        weights = [] if made else weights_to_do(self.base.model, self.arch)
        return weights + self.materials.to_do()

    @property
    def identity(self) -> dict[str, Any]:
        """The content of plan.json: all that changes a number in the table. Rows and seeds may be added later."""
        return {
            "recipe": dataclasses.asdict(self.base),
            "sets": list(self.setup.evaluation.sets),
            "allow_count_mismatch": self.setup.evaluation.allow_count_mismatch,
            "soup": str(self.foreign_soup or self.setup.soup) if self.setup.soup else None,
            "checkpoint": self.setup.checkpoint,
        }

    def check(self, states: Mapping[str, str], to_do: Sequence[str] = ()) -> None:
        """Check everything that can be checked before the first job is queued, also models that jobs have yet to write.

        Args:
            states: of the nodes by name.
            to_do: what is missing, of a dry run. What depends on it is not checked.

        Raises:
            UserError: the folder holds another plan, or sets, models, recipes or ranks contradict each other.
        """
        self._check_folder()
        if to_do:
            self._check_without_materials(states)
            return
        sets = self.materials.there
        first = self.base.data.train_split if self.plan.trains else self.setup.evaluation.sets[0]
        coming = {
            str(self.setup.model(node.name)): self.start
            for node in self.plan.nodes.values()
            if isinstance(node.work, (ZeroShot, WiseFT, UniformSoup))
        }
        if self.foreign_soup is not None:
            coming[str(self.setup.soup)] = self.start
        for node in still_needed(self.plan, states):
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
            if isinstance(node.work, ZeroShot):
                self._check_start()
        if self.foreign_soup is not None and self.setup.soup is not None and not self.setup.soup.exists():
            check_initial_model(*self._soup_start, mean=self.start.mean, std=self.start.std, keep_head=True)
        if self.setup.soup is not None and self.foreign_soup is None:
            info = read_info(self.setup.soup)
            assert info is not None
            check_head(self.setup.soup, self.start.classes)
            check_architecture(info, self.start, str(self.setup.soup))

    def _check_without_materials(self, states: Mapping[str, str]) -> None:
        """What can be checked while sets or weights are missing."""
        for manifest in self.materials.there.values():
            check_set(manifest, allow_count_mismatch=self.setup.evaluation.allow_count_mismatch)
        for node in still_needed(self.plan, states):
            if isinstance(node.work, Recipe):
                training.check_ranks(node.work, self.allocation)
            node.work.checked()

    def _check_start(self) -> None:
        # Here and not only in the job: compute nodes often have no network.
        model = self.base.model
        check_initial_model(model.name, model.pretrained, None, self._classes, mean=model.mean, std=model.std)

    def _check_folder(self) -> None:
        kept = _kept_plan(self.setup.folder)
        if kept is None:
            return
        kept = {"checkpoint": LAST} | kept  # plans of earlier versions have no entry
        ours = json.loads(json.dumps(self.identity))  # lists for tuples, as in the file
        differences = [
            f"{name}: {kept.get(name)} → {value}"
            for name, value in ours.items()
            if name != "recipe" and kept.get(name) != value
        ]
        differences += Recipe.from_json(json.dumps(kept.get("recipe", {}))).differences(self.base)
        if differences:
            raise UserError(
                f"{self.setup.folder} holds another plan: {'; '.join(differences)} (there → here). Give another folder "
                "with --out, or repeat the settings of that plan."
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder while jobs are submitted or run, so that no job is submitted twice.

        Raises:
            UserError: another process holds the lock, or the folder cannot be written.
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
                    f"Another reproduce.py is running in {folder} ({owner}). Repeat the command when it has ended: it "
                    "then submits only what is missing."
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
        """Arguments of initial_model for the state dict of --soup."""
        return self.base.model.name, str(self.foreign_soup), None, self._classes

    def make_soup(self) -> None:
        """Convert the state dict of --soup to a cfmask model file, unless that exists."""
        if self.foreign_soup is None or self.setup.soup is None or self.setup.soup.exists():
            return
        from cfmask.models.head import save_model

        model, info = initial_model(*self._soup_start, mean=self.start.mean, std=self.start.std, keep_head=True)
        save_model(self.setup.soup, model, info)
        print(f"{self.foreign_soup} was converted, with its head, to {self.setup.soup}")


def settle_flags(arguments: argparse.Namespace) -> None:
    """Set ``model.name`` from --arch.

    Raises:
        UserError: flags would do nothing, or contradict each other.
    """
    if arguments.preset:
        raise UserError("--preset would do nothing: choose rows of the table with --rows.")
    decided = [name for name in vars(arguments) if name.startswith("method.") or name in _ROWS_DECIDE]
    if decided:
        flags = ", ".join("--" + name.partition(".")[2].replace("_", "-") for name in decided)
        raise UserError(
            f"{flags} cannot be given here: --rows and --seeds decide, and all runs start from one model. Submit a "
            "variant of a row with launch/submit.py."
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
            raise UserError(f"--{what} has a value twice: {' '.join(map(str, given))}.")
    if arguments.tflops is not None and not 0 < arguments.tflops < float("inf"):
        raise UserError(f"--tflops is {arguments.tflops}; it must be a number above 0.")


def _kept_plan(folder: Path) -> dict[str, Any] | None:
    """The content of plan.json; None if there is none. Raises UserError if it is damaged."""
    path = folder / "plan.json"
    kept = read_object(path)
    if kept is None and path.exists():
        raise UserError(
            f"{path} is damaged: it is no JSON object. It states what the rows in this folder have in common. If you "
            "know that the flags of this command are those of the plan, delete the file: the command writes it again."
        )
    return kept
