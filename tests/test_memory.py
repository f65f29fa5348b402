"""--micro-batches auto: the smallest number that fits on all ranks, recorded before the first step."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import cfmask.training.train
import made
from cfmask.data.plan import divisors
from cfmask.errors import UserError
from cfmask.models.head import load_model
from cfmask.models.tower import Normalise
from cfmask.presets import PRESETS
from cfmask.recipe import AUTO, Data, Model, Optim, Recipe, Run
from cfmask.runs import RunFolder
from cfmask.runtime.distributed import DistributedContext, process_group
from cfmask.runtime.jsonl import read_lines
from cfmask.session import FINISHED
from cfmask.step import Teachers
from cfmask.training import memory
from cfmask.training.memory import MARGIN, Footprint, Trial, explained_out_of_memory, fewest_micro_batches
from launch.submission.recipe_arguments import recipe_from
from launch.submit import parser
from test_step import METHODS, name_of, resolved, student_and_teachers
from towers import TINY, Geometry

# --- the number -------------------------------------------------------------------------------------------------------

SIZES = st.floats(0, 1e12)


@given(SIZES, SIZES, SIZES, st.integers(1, 128), st.integers(1, 512))
def test_the_smallest_number_of_micro_batches_that_fits_is_chosen(free, fixed, per_image, lanes, lane_size):
    need = Footprint(free, fixed, per_image)
    count = fewest_micro_batches(need, lanes, lane_size)
    assert lanes % count == 0

    def fits(count: int) -> bool:
        return fixed + per_image * (lanes // count * lane_size) <= (1 - MARGIN) * free

    assert fits(count) or count == lanes
    assert not any(fits(fewer) for fewer in divisors(lanes) if fewer < count)
    more_room = dataclasses.replace(need, free=2 * free)
    assert fewest_micro_batches(more_room, lanes, lane_size) <= count


def test_the_choice_agrees_with_numbers_computed_by_hand():
    need = Footprint(free=100e9, fixed=2e9, per_image=0.5e9)  # 92 GB: 180 images
    assert [fewest_micro_batches(need, lanes, 32) for lanes in (1, 2, 4, 5, 6, 8, 16)] == [1, 1, 1, 1, 2, 2, 4]
    assert fewest_micro_batches(dataclasses.replace(need, per_image=math.inf), 16, 32) == 16
    assert fewest_micro_batches(dataclasses.replace(need, free=0.0), 12, 32) == 12


# --- the flag and the recipe ------------------------------------------------------------------------------------------


def test_the_flag_takes_a_number_or_auto():
    def given_as(*words: str) -> object:
        return recipe_from(parser().parse_args(["--micro-batches", *words])).optim.micro_batches

    assert (given_as("4"), given_as("auto"), Recipe().optim.micro_batches) == (4, AUTO, 1)
    for wrong in ("few", "1.5", ""):
        with pytest.raises(SystemExit):
            given_as(wrong)
    with pytest.raises(SystemExit):
        parser().parse_args(["--micro-batches-for", "2"])
    with pytest.raises(UserError, match="--micro-batches is 0"):
        Recipe(optim=Optim(micro_batches=0)).resolved()
    with pytest.raises(UserError, match="--micro-batches is 'few'; it must be a number or auto"):
        Recipe(optim=Optim(micro_batches="few")).resolved()


def test_a_recipe_with_auto_survives_json_and_knows_when_it_is_open():
    recipe = Recipe(optim=Optim(micro_batches=AUTO)).resolved()
    assert Recipe.from_json(recipe.to_json()) == recipe
    chosen = dataclasses.replace(recipe.optim, micro_batches=4, micro_batches_for=2)
    assert recipe.optim.is_open_for(2) and chosen.is_open_for(1) and not chosen.is_open_for(2)
    assert not Optim(micro_batches=4).is_open_for(1)


def test_a_folder_keeps_the_choice_and_accepts_the_same_command_again(tmp_path):
    run, recipe = RunFolder(tmp_path / "run"), Recipe(optim=Optim(micro_batches=AUTO)).resolved()
    run.claim(recipe)
    chosen = dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, micro_batches=4, micro_batches_for=2))
    run.record_recipe(chosen)
    run.claim(recipe)
    assert run.recipe() == chosen
    with pytest.raises(UserError, match="optim.epochs"):
        run.claim(dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, epochs=3)))
    with pytest.raises(UserError, match="optim.micro_batches"):
        run.claim(dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, micro_batches=2)))
    given = RunFolder(tmp_path / "given")
    given.claim(dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, micro_batches=4)))
    with pytest.raises(UserError, match="optim.micro_batches: 4 → auto"):
        given.claim(recipe)


# --- ranks ------------------------------------------------------------------------------------------------------------


class Pretended(Trial):
    """A trial of a GPU that is not there.

    image_gb: bytes of an image, and of a pass besides. really_fits: images that do fit, whatever was reckoned.
    """

    def __init__(self, lane_size: int, free_gb: float, image_gb: float, really_fits: float = math.inf) -> None:
        self.lane_size, self.tried = lane_size, []
        self._need = Footprint(free_gb * 1e9, image_gb * 1e9, image_gb * 1e9)
        self._really_fits = really_fits

    def footprint(self) -> Footprint:
        return self._need

    def fits(self, lanes: int, *, with_step: bool = False) -> bool:
        self.tried.append((lanes, with_step))
        return lanes * self.lane_size <= self._really_fits

    def forget(self) -> None:
        pass


def recipe_of_lanes(lanes: int = 16, **optim) -> Recipe:
    return Recipe(optim=Optim(batch_size=2 * lanes, lanes=lanes, micro_batches=AUTO, **optim)).resolved()


def chosen_by(rank: int, folder: Path, world_size: int, trials: dict[int, tuple], recipe: Recipe) -> None:
    context = DistributedContext(rank=rank, world_size=world_size)
    trial = Pretended(2, *trials[rank])
    memory.trial_on = lambda *_, **__: trial
    found: object
    with process_group(context, folder / "rendezvous"):
        try:
            found = memory.choose_micro_batches(recipe, RunFolder(folder), context, None, None, None, tower=True).optim
        except UserError as error:
            found = str(error)
    torch.save((found, trial.tried), folder / f"{rank}.pt")


def on_ranks(folder: Path, trials: dict[int, tuple], recipe: Recipe | None = None) -> list[tuple]:
    """What each of so many ranks settles, and the lanes that it has tried."""
    recipe = recipe or recipe_of_lanes()
    RunFolder(folder).claim(recipe)
    made.run_ranks(chosen_by, len(trials), folder, len(trials), trials, recipe)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(len(trials))]


def test_ranks_agree_on_what_fits_the_gpu_with_the_least_room(tmp_path):
    # 8 lanes of 2 images on each: the one has room for 8 images and more, the other for half.
    found = on_ranks(tmp_path, {0: (100, 1), 1: (10, 1)})
    assert [(each.micro_batches, each.micro_batches_for) for each, _ in found] == [(2, 2)] * 2
    assert [tried for _, tried in found] == [[(4, True)]] * 2
    assert RunFolder(tmp_path).recipe().optim == found[0][0]


def test_an_estimate_that_fails_on_one_gpu_is_corrected_on_all(tmp_path):
    found = on_ranks(tmp_path, {0: (100, 1), 1: (100, 1, 4)})
    assert [each.micro_batches for each, _ in found] == [4, 4]
    assert [tried for _, tried in found] == [[(8, True), (4, True), (2, True)]] * 2


def test_a_lane_that_does_not_fit_is_an_error_on_all_ranks_that_names_the_flags(tmp_path):
    found = on_ranks(tmp_path, {0: (100, 1), 1: (1, 1, 0)})
    for said, _ in found:
        assert "a single lane of 2 images does not fit" in said
        assert "--activation-checkpointing" in said and "--lanes" in said
    assert RunFolder(tmp_path).recipe().optim.micro_batches == AUTO


def test_a_start_on_another_number_of_ranks_chooses_again(tmp_path):
    recipe = recipe_of_lanes()
    before = dataclasses.replace(recipe.optim, micro_batches=4, micro_batches_for=2)
    [(found, _)] = on_ranks(tmp_path / "one", {0: (10, 1)}, dataclasses.replace(recipe, optim=before))
    assert (found.micro_batches, found.micro_batches_for) == (4, 1)
    found = on_ranks(tmp_path / "two", {0: (1, 1), 1: (1, 1)}, dataclasses.replace(recipe, optim=before))
    assert [(each, tried) for each, tried in found] == [(before, [])] * 2  # independently of free memory


def test_a_given_number_is_kept_and_a_single_lane_needs_no_trial(tmp_path):
    given = dataclasses.replace(recipe_of_lanes(), optim=Optim(batch_size=32, lanes=16, micro_batches=8))
    [(found, tried)] = on_ranks(tmp_path / "given", {0: (1, 1)}, given)
    assert (found.micro_batches, found.micro_batches_for, tried) == (8, None, [])
    [(found, tried)] = on_ranks(tmp_path / "one lane", {0: (1, 1)}, recipe_of_lanes(1))
    assert (found.micro_batches, tried) == (1, [])


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    return made.make_materials(tmp_path_factory.mktemp("materials"), per_class=16)


def recipe_of(materials: Path, preset: str = "object-mask-single-fill", **optim) -> Recipe:
    base = PRESETS[preset]
    settings = {"epochs": 2, "batch_size": 16, "lanes": 4, "lr": 1e-3, "warmup_steps": 2, **optim}
    return dataclasses.replace(
        base,
        model=Model(name=str(materials / "tiny.json"), pretrained=str(materials / "tiny.safetensors")),
        data=Data(shards=str(materials / "shards"), loader_workers=0),
        optim=dataclasses.replace(base.optim, **settings),
        run=Run(precision="fp32", checkpoint_steps=2, keep_checkpoints=99, log_steps=1),
    ).resolved()


def end_of(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.final)


def assert_equal(one: RunFolder, other: RunFolder) -> None:
    a, b = end_of(one), end_of(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class OnThisMachine(Trial):
    """The real passes, on the CPU, with memory that is made up: room for so many images."""

    images = 8

    def _peak(self, lanes: int) -> float:
        self.run(lanes)
        return float(lanes * self.lane_size)

    def _free(self) -> float:
        return self.images / (1 - MARGIN) + self._unseen_bytes()

    def _unseen_bytes(self) -> int:
        return 0

    def _give_back(self) -> None:
        pass

    def forget(self) -> None:
        pass


def test_auto_is_one_on_cpus_and_is_recorded_in_the_recipe(materials, tmp_path):
    run = made.train(recipe_of(materials, micro_batches=AUTO), tmp_path / "run")
    recorded = json.loads((run.root / "recipe.json").read_text())["optim"]
    assert (recorded["micro_batches"], recorded["micro_batches_for"]) == (1, 1)
    assert_equal(run, made.train(recipe_of(materials), tmp_path / "given"))


@pytest.mark.parametrize("preset", ["object-mask-single-fill", "linear-probe"])
def test_the_trial_leaves_no_trace_in_the_weights(materials, tmp_path, monkeypatch, preset):
    given = made.train(recipe_of(materials, preset, micro_batches=2), tmp_path / "given")
    monkeypatch.setattr(memory, "trial_on", lambda device, *a, **k: OnThisMachine(*a, **k))
    recipe = recipe_of(materials, preset, micro_batches=AUTO)
    run = made.train(recipe, tmp_path / "auto", stop_at=3)
    assert run.recipe().optim.micro_batches == 2
    # The next start has less memory, and uses the number in the recipe.
    monkeypatch.setattr(OnThisMachine, "images", 4)
    made_again = cfmask.training.train.train(run.recipe(), run, DistributedContext())
    assert made_again == FINISHED
    assert_equal(run, given)


def test_a_run_whose_choice_was_not_recorded_chooses_at_the_next_start(materials, tmp_path, monkeypatch):
    run, recipe = RunFolder(tmp_path / "run"), recipe_of(materials, micro_batches=AUTO)
    run.claim(recipe)

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "record_recipe", full)
        with pytest.raises(UserError, match="cannot be written: No space left on device"):
            cfmask.training.train.train(recipe, run, DistributedContext())
    assert run.recipe().optim.micro_batches == AUTO and not read_lines(run.log)
    made.train(recipe, run.root)
    assert run.recipe().optim.micro_batches == 1


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_a_pass_leaves_the_model_as_it_was(method):
    method = resolved(method)
    model, teachers, normalise = student_and_teachers(TINY, method)
    model.compiled = True
    model.visual.proj.requires_grad_(False)
    recipe = dataclasses.replace(Recipe(optim=Optim(batch_size=12, lanes=4), run=Run(precision="fp32")), method=method)
    before = copy.deepcopy(model.state_dict())
    required = [parameter.requires_grad for parameter in model.parameters()]
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    trial = Trial(recipe, model, teachers, normalise, tower=True)
    for lanes in (1, 2):
        trial.run(lanes)
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert model.compiled and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- calls of CUDA ----------------------------------------------------------------------------------------------------


class Gpu:
    """torch.cuda's memory functions for a GPU of 80 GB, of which another process uses 1 GB.

    A pass takes 100 bytes, and 7 an image; what is held besides by torch.empty is counted too.
    """

    TOTAL = 80_000

    def __init__(self, monkeypatch, *, limit: float = 1.0, resident: int = 1_000, cached: int = 500) -> None:
        self.limit, self.resident, self.cached, self.held, self.peak = limit, resident, cached, 0, 0
        self.passes: list[int] = []
        answers = {
            "mem_get_info": lambda device: (self.TOTAL - 1_000 - self.reserved, self.TOTAL),
            "memory_reserved": lambda device: self.reserved,
            "memory_allocated": lambda device: self.resident + self.held,
            "max_memory_allocated": lambda device: self.peak,
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", self.resident),
            "empty_cache": lambda: setattr(self, "cached", 0),
            "get_per_process_memory_fraction": lambda device: self.limit,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer, raising=False)
        gpu, empty = self, torch.empty

        def counted(*size, **options):
            if options.get("dtype") is torch.uint8:
                gpu.held = size[0]
            return empty(*size, **options)

        monkeypatch.setattr(memory.torch, "empty", counted)

    @property
    def reserved(self) -> int:
        return self.resident + self.held + self.cached

    def run(self, images: int) -> None:
        self.passes.append(images)
        at_worst = self.resident + self.held + 100 + 7 * images
        self.held, self.peak = 0, max(self.peak, at_worst)
        if at_worst > min(self.TOTAL - 1_000, self.limit * self.TOTAL):
            raise torch.OutOfMemoryError("CUDA out of memory")


def trial_on_gpu(gpu: Gpu, monkeypatch, *, tower: bool = True) -> Trial:
    model, teachers, normalise = student_and_teachers(TINY, resolved(METHODS[0]))
    recipe = Recipe(optim=Optim(batch_size=40, lanes=4))
    trial = Trial(recipe, model.float(), teachers, normalise, tower=tower)
    monkeypatch.setattr(trial, "run", lambda lanes: gpu.run(10 * lanes))
    return trial


@pytest.mark.parametrize("tower", [True, False])
def test_the_footprint_extrapolates_two_passes_and_includes_optimizer_and_ddp(monkeypatch, tower):
    gpu = Gpu(monkeypatch)
    trial = trial_on_gpu(gpu, monkeypatch, tower=tower)
    need = trial.footprint()
    trained = trial._model.parameters() if tower else trial._model.head.parameters()
    unseen = 3 * 4 * sum(parameter.numel() for parameter in trained)
    assert need == Footprint(free=78_000, fixed=100 + unseen, per_image=7)
    assert gpu.passes == [10, 10, 20] and gpu.cached == 0  # the first one is for workspaces


def test_free_memory_respects_the_fraction_of_the_process(monkeypatch):
    assert trial_on_gpu(Gpu(monkeypatch, limit=0.5), monkeypatch)._free() == 39_000
    assert trial_on_gpu(Gpu(monkeypatch, limit=0.0), monkeypatch)._free() == 0


def test_lanes_that_run_out_of_memory_count_as_infinitely_large(monkeypatch):
    trial = trial_on_gpu(Gpu(monkeypatch, limit=0.0153), monkeypatch)  # 1,224 bytes: 17 images
    monkeypatch.setattr(trial, "_unseen_bytes", lambda: 30)
    assert trial.footprint() == Footprint(free=224, fixed=170 + 30, per_image=math.inf)
    assert trial.fits(1) and not trial.fits(2)


def test_the_rest_of_a_step_and_the_margin_are_allocated_while_a_number_is_confirmed(monkeypatch):
    trial = trial_on_gpu(Gpu(monkeypatch, limit=0.0153), monkeypatch)
    monkeypatch.setattr(trial, "_unseen_bytes", lambda: 30)
    assert trial.fits(1, with_step=True)  # 1,000 + 170 + 30 + 17 of 1,224
    monkeypatch.setattr(trial, "_unseen_bytes", lambda: 40)
    assert not trial.fits(1, with_step=True)


# --- when it does not suffice -----------------------------------------------------------------------------------------


def test_an_out_of_memory_error_in_training_names_the_flags(materials, tmp_path, monkeypatch):
    real, calls = cfmask.training.train.inputs_of, []

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 79 GiB.")
        return real(*arguments, **options)

    monkeypatch.setattr(cfmask.training.train, "inputs_of", full)
    run = RunFolder(tmp_path / "run")
    with pytest.raises(UserError) as raised:
        made.train(recipe_of(materials), run.root)
    said = str(raised.value)
    assert "--micro-batches" in said and "--activation-checkpointing" in said and "Tried to allocate 2.00 GiB" in said
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)
    assert "--micro-batches" in (run.ended() or {})["why"]


def test_other_errors_are_not_changed():
    with pytest.raises(ZeroDivisionError), explained_out_of_memory(DistributedContext()):
        _ = 1 / 0


def test_auto_goes_through_submit_and_chooses_again_when_resumed_on_another_number_of_ranks(materials, tmp_path):
    run = tmp_path / "run"
    flags = [*made.recipe_flags(materials, run), "--executor", "local", "--epochs", 1, "--micro-batches", "auto"]
    shown = made.submit(*flags, "--tasks-per-node", 2, "--dry-run").stdout
    assert '"micro_batches": "auto"' in shown
    made.submit(*flags, "--tasks-per-node", 2)
    assert RunFolder(run).recipe().optim.micro_batches_for == 2
    assert "is finished" in made.submit(*flags, "--tasks-per-node", 2).stdout
    # Chosen for one rank, which had two parts of two lanes; each of four has one lane.
    optim = dataclasses.replace(RunFolder(run).recipe().optim, micro_batches=2, micro_batches_for=1)
    RunFolder(run).record_recipe(dataclasses.replace(RunFolder(run).recipe(), optim=optim))
    for path in (run / "results.json", run / "model.safetensors"):
        path.unlink()
    made.submit("--resume", run, "--executor", "local", "--tasks-per-node", 4)
    assert (RunFolder(run).recipe().optim.micro_batches, RunFolder(run).recipe().optim.micro_batches_for) == (1, 4)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LARGE = Geometry(image=224, patch=16, width=384, layers=8, heads=6, embed=64)


@pytest.fixture
def large(tmp_path, materials) -> Recipe:
    """A recipe whose step takes a gigabyte: 32 images in 8 lanes."""
    made.save_tiny_model(tmp_path / "large.safetensors", LARGE)
    recipe = recipe_of(materials, batch_size=32, lanes=8, epochs=3, micro_batches=AUTO)
    model = Model(name=str(tmp_path / "large.json"), pretrained=str(tmp_path / "large.safetensors"))
    return dataclasses.replace(recipe, model=model, run=dataclasses.replace(recipe.run, precision="bf16"))


@pytest.fixture
def emptied():
    """A GPU without memory of other tests; the memory fraction is reset afterwards."""
    gc.collect()
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()


def trained(recipe: Recipe, folder: Path) -> RunFolder:
    run = RunFolder(folder)
    run.claim(recipe)
    assert cfmask.training.train.train(recipe, run, DistributedContext(gpu=True)) == FINISHED
    return run


@pytest.mark.gpu
@needs_gpu
def test_auto_is_one_with_much_memory(large, tmp_path, emptied):
    run = trained(large, tmp_path / "run")
    assert (run.recipe().optim.micro_batches, run.recipe().optim.micro_batches_for) == (1, 1)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(not hasattr(torch.cuda, "get_per_process_memory_fraction"), reason="needs torch 2.8")
def test_auto_is_more_with_little_memory_and_equals_a_run_with_that_number(large, tmp_path, emptied):
    peak = peak_of(large, tmp_path / "plenty")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.6 * peak / total)
    run = trained(large, tmp_path / "little")
    chosen = run.recipe()
    assert chosen.optim.micro_batches > 1
    # The number is what counts, not how it was found: given by hand, and with all of the memory.
    torch.cuda.set_per_process_memory_fraction(1.0)
    by_hand = dataclasses.replace(chosen.optim, micro_batches_for=None)
    assert_equal(run, trained(dataclasses.replace(chosen, optim=by_hand), tmp_path / "by hand"))
    assert_equal(run, trained(chosen, tmp_path / "recorded"))


def peak_of(recipe: Recipe, folder: Path) -> int:
    torch.cuda.reset_peak_memory_stats()
    trained(recipe, folder)
    peak = torch.cuda.max_memory_reserved()
    gc.collect()
    torch.cuda.empty_cache()
    return peak


@pytest.mark.gpu
@needs_gpu
def test_the_estimate_equals_the_memory_of_passes(large, emptied):
    """The line through one lane and two foretells four and eight within the margin."""
    model, info = load_model(large.model.pretrained)
    model = model.cuda()
    teachers = Teachers(pretrained=copy.deepcopy(model).requires_grad_(False))
    trial = Trial(large, model, teachers, Normalise(info.mean, info.std).cuda(), tower=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    need = trial.footprint()
    for lanes in (4, 8):
        foretold = need.fixed - trial._unseen_bytes() + need.per_image * lanes * trial.lane_size
        assert abs(trial._peak(lanes) - foretold) < MARGIN * foretold
    assert torch.cuda.memory_allocated() - before < 64e6, "workspaces may stay, nothing of a pass"


@pytest.mark.gpu
@needs_gpu
def test_a_trial_that_runs_out_of_memory_frees_it(large, emptied):
    model, info = load_model(large.model.pretrained)
    model = model.cuda()
    teachers = Teachers(pretrained=copy.deepcopy(model).requires_grad_(False))
    trial = Trial(large, model, teachers, Normalise(info.mean, info.std).cuda(), tower=True)
    assert trial.fits(1, with_step=True)
    free = trial._free()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64e6) / total)
    assert not trial.fits(8)
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert abs(trial._free() - free) < 64e6 and all(parameter.grad is None for parameter in model.parameters())
