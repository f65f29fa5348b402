"""`tools/bench.py gpu`: in a dry run every part runs on the CPU, and a part that fails affects no other."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cfmask.errors import UserError
from cfmask.kernels import fused_kernels, relevance_kernel
from made import REPO
from tools.benchmarks.gpu import bits, kernels, profile, runner, steps, whole_run
from tools.benchmarks.gpu.command import STAGES, chosen
from tools.benchmarks.gpu.runner import CannotRun, Part, Runner, Section
from tools.benchmarks.gpu.setting import TINY_CONFIG, Setting
from tools.benchmarks.training import Measured

PARTS = [part.name for stage in STAGES for part in stage]


@pytest.fixture
def setting(tmp_path) -> Setting:
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    return Setting(True, tmp_path / "out", tmp_path / "work", None, tmp_path / "tiny.json")


@pytest.fixture
def section(tmp_path) -> Section:
    return Section(tmp_path / "section.md")


def results_of(out: Path) -> dict[str, dict]:
    return json.loads((out / "results.json").read_text())


def sections_of(out: Path) -> dict[str, str]:
    _, *sections = (out / "report.md").read_text().split("\n## ")
    return {name: text for name, _, text in (section.partition("\n") for section in sections)}


# --- the dry run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """Folder and output of a whole dry run."""
    out = tmp_path_factory.mktemp("gpu")
    # Minutes for a busy machine: the limits of parts grow with them.
    command = [sys.executable, REPO / "tools/bench.py", "gpu", "--dry", "--minutes", "60", "--out", out]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return out, done


def test_every_part_runs_on_a_cpu(dry):
    out, done = dry
    results = results_of(out)
    assert list(results) and set(results) == set(PARTS)
    assert {name: of["status"] for name, of in results.items()} == dict.fromkeys(PARTS, "ran")
    assert all(of["result"] for of in results.values())
    assert all(f"{name} ran" in done.stdout for name in PARTS)
    assert set(sections_of(out)) == set(PARTS)
    assert all(f"==== {name}\n" in (out / "log.txt").read_text() for name in PARTS)


@pytest.mark.parametrize("name", ["environment", "kernels", "tests", "run", "profile", "graphs", "attention"])
def test_a_part_reports_what_needs_a_gpu(dry, name):
    text = sections_of(dry[0])[name]
    assert any(words in text for words in ("needs a GPU", "need a GPU", "Without a GPU")), text


def test_the_report_has_every_measurement(dry):
    results = {name: of["result"] for name, of in results_of(dry[0]).items()}
    run = results["run"]
    assert run["steps"] // 2 < run["killed at"] < run["steps"] and run["tensors"] > 100
    assert all(found["differing"] == [] and found["tensors"] > 100 for found in results["bits"].values())
    assert sum("with recomputation" in name for name in results["bits"]) == 2
    eager = {"cfmask", "cfmask, deterministic", "vanilla FT", "authors"}
    graphed = {f"{name}, CUDA graph" for name in ("cfmask", "cfmask, deterministic", "vanilla FT")}
    graphed |= {"vanilla FT, deterministic, CUDA graph"}
    for part, model, batch, names in [
        ("steps", "ViT-B-16-quickgelu", 128, eager | graphed | {"cfmask, activations recomputed"}),
        ("steps", "ViT-B-32-quickgelu", 32, eager | graphed),
        ("steps-512", "ViT-B-16-quickgelu", 512, eager | {"vanilla FT, deterministic"}),
        ("steps-L14", "ViT-L-14-quickgelu", 128, eager - {"authors"}),
    ]:
        head = f"{model} {batch} "
        found = {key.rpartition(", ")[0]: of for key, of in results[part].items() if head in key}
        assert set(found) == {head + name for name in names}
        for name, of in found.items():
            assert of == "needs a GPU" if name.endswith("CUDA graph") else of["seconds"] > 0 and of["flops"] > 0
    assert {"ViT-B-16-quickgelu 128 authors, tf32", "ViT-B-16-quickgelu 128 authors, bf16"} <= set(results["steps"])
    assert results["compile"]["compiled"]["graphs"] and not results["compile"]["eager"]["graphs"]
    assert set(results["loader-threads"]) == {"crop-raw", "crop-jpeg"}
    assert all(rate > 0 for of in results["loader-threads"].values() for rate in of.values())
    assert set(results["profile"]) == {"ViT-B-16-quickgelu 512", "ViT-B-32-quickgelu 32"}
    report = (dry[0] / "report.md").read_text()
    assert "NCCL refuses two ranks on one GPU" in report and "Dry run" in report


# --- parts that fail -------------------------------------------------------------------------------------------------


def works(setting: Setting, section: Section) -> dict:
    section.table(["a", "b"], [[1, None]])
    print("printed")
    return {"answer": 42}


def raises(setting: Setting, section: Section) -> dict:
    section.note("written before it")
    raise KeyError("a defect")


def finds_an_error(setting: Setting, section: Section) -> dict:
    raise AssertionError("3 tensors differ")


def crashes(setting: Setting, section: Section) -> dict:
    print("printed before the crash", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def cannot_run(setting: Setting, section: Section) -> dict:
    raise CannotRun("there is no such card")


def hangs(setting: Setting, section: Section) -> dict:
    """With a program in a session of its own."""
    started = subprocess.Popen(["sleep", "300"], start_new_session=True)
    section.note("began")
    (setting.work / "pid").write_text(str(started.pid))
    time.sleep(300)
    return {}


@pytest.mark.parametrize("side_by_side", [True, False])
def test_a_part_that_fails_is_reported_and_stops_no_other(setting, side_by_side):
    functions = {
        "hangs": hangs,
        "raises": raises,
        "fault": finds_an_error,
        "crashes": crashes,
        "missing": cannot_run,
        "works": works,
    }
    parts = [Part(name, function, 1, limit=5 if name == "hangs" else 120) for name, function in functions.items()]
    begun = time.monotonic()
    outcomes = Runner(setting, 100, "# Head").run([parts] if side_by_side else [[part] for part in parts])
    assert time.monotonic() - begun < 240
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "hangs": runner.TIMED_OUT,
        "raises": runner.FAILED,
        "fault": runner.FAILED,
        "crashes": runner.DIED,
        "missing": runner.CANNOT_RUN,
        "works": runner.RAN,
    }
    text = sections_of(setting.out)
    assert "began" in text["hangs"] and "exceeded its limit" in text["hangs"]
    assert "written before it" in text["raises"] and "KeyError: 'a defect'" in text["raises"]
    assert "3 tensors differ" in text["fault"] and "Traceback" not in text["fault"]
    assert "printed before the crash" in text["crashes"] and "exit code -9" in text["crashes"]
    assert "there is no such card" in text["missing"]
    assert "| 1 | None |" in text["works"]
    assert results_of(setting.out)["works"]["result"] == {"answer": 42}
    assert "==== works\nprinted" in (setting.out / "log.txt").read_text()
    assert not is_running(int((setting.work / "pid").read_text())), "processes of a part end with it"


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_report_grows_while_a_part_runs(setting, monkeypatch):
    seen = []
    real = Runner.write_report

    def spy(self, *more):
        real(self, *more)
        seen.append((setting.out / "report.md").read_text())

    monkeypatch.setattr(Runner, "write_report", spy)
    Runner(setting, 100, "# Head").run([[Part("hangs", hangs, 1, limit=4)]])
    assert any("under way" in text and "began" in text for text in seen)


def test_parts_beyond_the_budget_are_named(setting):
    outcomes = Runner(setting, 10, "# Head").run([[Part("long", works, 20)], [Part("short", works, 1)]])
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "long": runner.LEFT_OUT,
        "short": runner.RAN,
    }
    assert "of 10 s are spent, and it takes 20 s" in sections_of(setting.out)["long"]
    assert results_of(setting.out)["long"]["status"] == runner.LEFT_OUT


def test_parts_are_chosen_by_name():
    assert chosen(STAGES, ["run", "bits"], ["bits"]) == [[part for part in STAGES[1] if part.name == "run"]]
    assert [part for stage in chosen(STAGES, [], ["run"]) for part in stage] == [
        part for stage in STAGES for part in stage if part.name != "run"
    ]
    with pytest.raises(UserError, match="Unknown part runs. Choose from environment, kernels"):
        chosen(STAGES, ["runs"], [])


def test_the_docs_describe_every_part():
    text = (REPO / "docs/benchmarks.md").read_text().partition("\n## On a GPU\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `([\w-]+)`", text, re.MULTILINE) == PARTS


def test_without_a_gpu_the_error_names_the_dry_run(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, REPO / "tools/bench.py", "gpu", "--out", tmp_path / "out"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 2 and "--dry" in done.stderr and not (tmp_path / "out").exists()


# --- findings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["wrong", "other bits"])
def test_a_wrong_kernel_is_found(setting, section, monkeypatch, tmp_path, fault):
    right = torch.arange(4.0, dtype=torch.float64)
    results = iter([right.float(), right.float() + 1e-6] if fault == "other bits" else [right.float() + 0.1] * 2)
    check = kernels.Check("small", torch.float32, True, lambda: next(results), right, change=3.0, tolerance=1e-4)
    monkeypatch.setattr(kernels, "KERNELS", {"mine": lambda _: iter([check])})
    with pytest.raises(AssertionError, match="mine small float32"):
        kernels.kernels(setting, section)
    assert "mine small float32" in (tmp_path / "section.md").read_text()


def test_nondeterministic_steps_are_found(setting, section, monkeypatch, tmp_path):
    ends = iter([{"a": torch.zeros(2), "b": torch.zeros(2)}, {"a": torch.zeros(2), "b": torch.ones(2)}] * 4)
    monkeypatch.setattr(bits, "end_of_steps", lambda *_: next(ends))
    monkeypatch.setattr(Setting, "materials", lambda *_: None)
    with pytest.raises(AssertionError, match="not deterministic: ViT-B-16-quickgelu at 64, "):
        bits.bits(setting, section)
    assert "1 of 2 tensors differ" in (tmp_path / "section.md").read_text()


def test_differing_checkpoints_are_found(tmp_path):
    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        save_file({"same": torch.ones(2), "w": torch.full((2,), value)}, tmp_path / name / "model.safetensors")
        save_file({"m": torch.ones(2)}, tmp_path / name / "optimizer.safetensors")
    assert whole_run.different_tensors(tmp_path / "a", tmp_path / "b") == (["w of model.safetensors"], 3)
    assert whole_run.different_tensors(tmp_path / "a", tmp_path / "a") == ([], 3)


@pytest.mark.parametrize(
    ("kind", "names"),
    {
        "relevance kernel": ["_log_sum_exp", "_column_sums"],
        "fused add and norm": ["_add_norm", "_add_norm_backward"],
        "fused QuickGELU": ["_bias_quick_gelu", "_bias_quick_gelu_backward"],
        "join of q, k, v gradients": ["_join"],
        "layer norm": ["void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, false>("],
        "matrix product": ["nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN"],
        "attention": ["cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64_1x4x1_cga1x1x1"],
        "other": ["something_else"],
    }.items(),
    ids=str,
)
def test_kernels_are_classified_by_name(kind, names):
    assert {profile.kind_of(name) for name in names} == {kind}


def test_every_kernel_of_the_project_has_a_kind():
    names = {
        name
        for module in (fused_kernels, relevance_kernel)
        for name in re.findall(r"^@.*jit\ndef (\w+)\(", Path(module.__file__).read_text(), re.MULTILINE)
    }
    called = {"_tile"}  # called by other kernels, never launched
    assert len(names) >= 8 and {name for name in names - called if profile.kind_of(name) == "other"} == set()


def test_concurrent_kernels_count_once_as_busy_time():
    events = [{"ts": 0, "dur": 10}, {"ts": 5, "dur": 10}, {"ts": 6, "dur": 2}, {"ts": 20, "dur": 5}]
    assert profile.busy(events) == 20


def test_a_failing_step_fails_its_part(setting, section, monkeypatch, tmp_path):
    """A step that does not fit into memory is no failure."""
    found = iter([Measured(1.0, 1.0, 1, 1), "does not fit", "failed: no such kernel"])
    monkeypatch.setattr(steps, "measure", lambda *_: next(found))
    setting.tiny.write_text(json.dumps(TINY_CONFIG))
    with pytest.raises(AssertionError, match="failed: ViT-B-16-quickgelu 4 authors, bf16$"):
        steps.steps(setting, section, tables=[("ViT-B-16-quickgelu", 4, (steps.OURS, *steps.AUTHORS))])
    assert "failed: no such kernel" in (tmp_path / "section.md").read_text()


def test_a_row_of_the_step_table():
    vanilla, authors = Measured(0.1, 0.01, 4 * 10**9, 10**12), Measured(0.6, 0.01, 8 * 10**9, 10**12)
    ours = Measured(0.2, 0.02, 3 * 10**9, 20 * 10**12)
    found = {steps.OURS: ours, steps.VANILLA_FT: vanilla, steps.AUTHORS[0]: authors, steps.AUTHORS[1]: "does not fit"}
    peaks = {"bf16": 200e12, "tf32": 100e12}
    row = dict(zip(steps.HEADER, steps.row_of(steps.OURS, found, 128, 4 * 10**12, peaks), strict=True))
    assert row == {
        "step": "cfmask",
        "precision": "bf16",
        "images/s": "640",
        "ms": "200.0",
        "host ms": "20.0",
        "TFLOP/s": "100",
        "% of peak": "50.0",
        "F": "5.00",
        "memory GB": "3.00",
        "× vanilla's time": "2.00",
        "× authors, tf32": "3.00",
        "× authors, bf16": "",
        "% of authors' memory, tf32": "38",
        "% of authors' memory, bf16": "",
    }
    assert steps.row_of(steps.AUTHORS[1], found, 128, 4 * 10**12, peaks)[:3] == ["authors", "bf16", "does not fit"]
