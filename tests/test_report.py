"""cfmask/report/: reading of results.json, tables against independent calculations, and charts that are not blank."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import statistics
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from matplotlib.text import Text
from PIL import Image
from scipy import stats

import made
from cfmask.data.benchmarks import BENCHMARKS, SHIFTED
from cfmask.errors import UserError
from cfmask.evaluation_spec import KINDS
from cfmask.presets import PRESETS
from cfmask.report import charts
from cfmask.report.looks import looks
from cfmask.report.results import ModelResult, ResultRow, Results, SetResult, Split, read_results, rows_of
from cfmask.report.robustness import Line, clipped_logit, fit_logits, robustness_panels, robustness_table
from cfmask.report.tables import PUBLISHED, comparison, differences, latex_table, markdown_table
from cfmask.runs import RunFolder
from towers import TINY

PAPER = ("val", *(benchmark.name for benchmark in SHIFTED))
COLUMNS = ("IN", "V2", "R", "Sketch", "ObjectNet", "A", "Avg.")


def set_result(top1: float, total: int, seed: int = 0, *, confident: float = 0.0) -> dict:
    """A set's entry in results.json: top1 percent of total right, of a model that is overconfident by ``confident``."""
    chance = np.random.default_rng(seed)
    correct = round(top1 / 100 * total)
    share = correct / total
    # The more is right, the more confidences pile up towards 1; in each of 15 bins as many are right as it says.
    edges = np.linspace(0, 1, 16)
    samples = chance.multinomial(total, np.diff(stats.beta.cdf(edges, 1 + 3 * share, 1 + 2.5 * (1 - share))))
    middle = (edges[1:] + edges[:-1]) / 2
    right = chance.binomial(samples, np.clip(middle + share - (samples @ middle) / total, 0.01, 0.99))
    while (wrong := int(right.sum()) - correct) != 0:  # but for exactly so many in all
        room = right if wrong > 0 else samples - right
        right -= np.sign(wrong) * chance.multivariate_hypergeometric(room, min(abs(wrong), int(room.sum())))
    sums = samples * np.clip(middle + confident * middle * (1 - middle), 0, 1)
    calibration = [[int(n), int(c), float(x)] for n, c, x in zip(samples, right, sums, strict=True)]
    interval = stats.binomtest(correct, total).proportion_ci(method="wilson")
    return {
        "correct": correct,
        "total": total,
        "top1": 100 * share,
        "interval": [100 * interval.low, 100 * interval.high],
        "ece": sum(abs(c - s) for _, c, s in calibration) / total,
        "calibration": calibration,
        "per_class": {"n01443537": [correct, total]},
    }


def results_json(
    models: dict[str, dict[str, float]], *, sizes: dict[str, int] | None = None, make: str = "nothing", **more
) -> dict:
    """A whole results.json of top-1 by model and set. more: chosen, chosen_on; alphas: by model."""
    sets = list(dict.fromkeys(name for of_model in models.values() for name in of_model))
    sizes = {name: BENCHMARKS[name].images if name in BENCHMARKS else 2000 for name in sets} | (sizes or {})
    alphas = more.pop("alphas", None)
    entries = []
    for i, (model, of_model) in enumerate(models.items()):
        scored = {
            s: set_result(top1, sizes[s], 31 * i + n, confident=0.3 * (i % 4) / 3)
            for n, (s, top1) in enumerate(of_model.items())
        }
        entries.append({"name": model, **({"alpha": alphas[i]} if alphas else {}), "sets": scored})
    evaluation = KINDS[make](models=tuple(models), shards="/data/shards", sets=tuple(sets))
    return {
        "evaluation": json.loads(evaluation.to_json()),
        "sets": {
            name: {"samples": sizes[name], "classes": 200 if name[-2:] in ("-r", "-a") else 1000} for name in sets
        },
        "models": entries,
        **more,
    }


def loaded(content: dict, folder: Path) -> Results:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content))
    return read_results(folder)


def published(arch: str, row: str) -> dict[str, float]:
    return {name: PUBLISHED[arch][row][label] for name, label in zip(PAPER, COLUMNS, strict=False)}


@pytest.fixture(scope="module")
def paper(tmp_path_factory) -> Results:
    """The published rows of B/16, as the results of one evaluation."""
    models = {row: published("ViT-B-16", row) for row in PUBLISHED["ViT-B-16"]}
    return loaded(results_json(models), tmp_path_factory.mktemp("paper"))


def cells(markdown: str) -> dict[str, list[str]]:
    """A table's lines by their first cell."""
    lines = [[c.strip() for c in line.strip("|").split(" | ")] for line in markdown.splitlines() if line[:1] == "|"]
    return {line[0]: line[1:] for line in lines if not line[0].startswith("-")}


# --- reading ----------------------------------------------------------------------------------------------------------


def test_results_are_read_completely(tmp_path):
    content = results_json(
        {"α = 0": {"val": 60.0, "holdout": 61.0}, "α = 1": {"val": 70.0, "holdout": 69.0}},
        make="wise-ft",
        alphas=[0.0, 1.0],
        chosen=1,
        chosen_on="holdout",
    )
    found = loaded(content, tmp_path)
    assert read_results(tmp_path / "results.json") == found
    assert found.evaluation.make == "wise-ft"
    assert found.sets == ("val", "holdout")
    assert [model.alpha for model in found.models] == [0.0, 1.0]
    assert (found.chosen, found.chosen_on) == (1, "holdout")
    entry, there = content["models"][0]["sets"]["val"], found.models[0].sets["val"]
    assert (there.correct, there.total, there.top1, list(there.interval)) == (30_000, 50_000, 60.0, entry["interval"])
    assert [list(b) for b in there.calibration] == entry["calibration"]
    assert there.per_class == {"n01443537": (30_000, 50_000)}
    assert found.split == Split("val", (), ("holdout",))


def broken(change):
    content = results_json({"m": {"val": 60.0}})
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"step": 10, "skipped_steps": 0, "sets": {}}', "training run"),
        ("[]", "is not of an evaluation: “evaluation”"),
        ('{"set": "s", "models": []}', "is not of an evaluation: “evaluation”"),
        ("{", "not JSON"),
        (broken(lambda c: c["models"][0]["sets"]["val"].pop("interval")), "has not the layout"),
        (broken(lambda c: c["models"][0]["sets"]["val"].update(total=0)), "No sample of val"),
        (broken(lambda c: c.update(models=3)), "has not the layout"),
        (broken(lambda c: c.update(chosen=1)), "there are 1 models"),
        (broken(lambda c: c["evaluation"].update(unheard_of=1)), "not an evaluation as cfmask writes it"),
    ],
)
def test_files_of_other_kinds_are_refused(tmp_path, text, words):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        read_results(tmp_path)
    assert "results.json" in str(error.value)


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match="has not finished"):
        read_results(tmp_path)


# --- which sets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, chosen_on, split",
    [
        (reversed(PAPER), None, Split("val", PAPER[1:])),
        (["imagenet", "imagenet-a", "imagenet-r"], None, Split("imagenet", ("imagenet-r", "imagenet-a"))),
        (["imagenet-a", "holdout", "mine", "val"], "holdout", Split("val", ("imagenet-a",), ("holdout", "mine"))),
        (["imagenet-a", "imagenet-r"], None, Split(None, ("imagenet-r", "imagenet-a"))),
        (["plain", "drawn", "swapped"], None, Split("plain", ("drawn", "swapped"))),
        (["holdout", "plain", "drawn"], "holdout", Split("plain", ("drawn",), ("holdout",))),
        (["drawn", "val", "swapped"], None, Split("val", ("drawn", "swapped"))),
        (["val", "imagenet", "imagenet-a"], None, Split("val", ("imagenet-a",), ("imagenet",))),
        (["holdout"], "holdout", Split(None, (), ("holdout",))),
    ],
)
def test_split_that_names_suggest(names, chosen_on, split):
    assert Split.of(names, chosen_on) == split


def test_columns():
    assert tuple(Split.of(PAPER).columns) == COLUMNS
    assert list(Split("plain", ("drawn",), ("holdout",)).columns) == ["plain", "drawn", "holdout"]  # no average of one
    assert list(Split.of(["val", "imagenet", "imagenet-a"]).columns) == ["IN", "A", "imagenet"]
    assert list(Split.of(["val", "drawn", "swapped"]).columns) == ["val", "drawn", "swapped", "Avg."]  # not ImageNet's


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_published_averages_are_those_of_their_sets():
    known = [values for rows in PUBLISHED.values() for values in rows.values() if values["IN"] is not None]
    assert len(known) == 8
    for values in known:
        assert tuple(values) == COLUMNS
        mean = statistics.fmean(values[label] for label in COLUMNS[1:-1])
        assert abs(values["Avg."] - mean) < 0.1 + 1e-9  # each of six numbers is rounded


def test_one_seed(paper):
    row = rows_of(paper.models)[1]
    found = row.estimates(paper.split)
    assert tuple(found) == COLUMNS
    for name, label in zip(PAPER, COLUMNS, strict=False):
        result = row.per_seed[0].sets[name]
        assert (found[label].value, (found[label].low, found[label].high)) == (result.top1, result.interval)
    # Of the average: by drawing the sets many times.
    chance = np.random.default_rng(0)
    shifted = [row.per_seed[0].sets[name] for name in PAPER[1:]]
    drawn = np.mean([chance.binomial(r.total, r.correct / r.total, 200_000) / r.total for r in shifted], axis=0)
    low, high = 100 * np.quantile(drawn, [0.025, 0.975])
    average = found["Avg."]
    assert (average.low, average.high) == pytest.approx((low, high), abs=0.01)
    assert average.value == pytest.approx(statistics.fmean(r.top1 for r in shifted))
    assert average.noise == pytest.approx((high - low) / 2, abs=0.01)


def seeds(tops: list[dict[str, float]], folder: Path, **sizes) -> list[ModelResult]:
    models = {f"seed {i}": top1 for i, top1 in enumerate(tops)}
    return list(loaded(results_json(models, sizes=sizes), folder).models)


def test_several_seeds(tmp_path):
    tops = [{"a": 50.0, "b": 60.0, "c": 20.0}, {"a": 52.0, "b": 61.0, "c": 23.0}, {"a": 51.0, "b": 65.0, "c": 20.0}]
    row = ResultRow("FT", seeds(tops, tmp_path))
    found = row.estimates(Split.of_rows([row]))
    assert (found["a"].value, found["a"].sd, found["a"].seeds) == (pytest.approx(51), pytest.approx(1), 3)
    averages = [40.0, 42.0, 42.5]  # of b and c, seed by seed
    assert found["Avg."].value == pytest.approx(statistics.fmean(averages))
    assert found["Avg."].sd == pytest.approx(statistics.stdev(averages))
    half = statistics.fmean((m.sets["a"].interval[1] - m.sets["a"].interval[0]) / 2 for m in row.per_seed)
    of_seeds = stats.t(2).ppf(0.975) / math.sqrt(3)
    assert found["a"].noise == pytest.approx(math.sqrt(half**2 + of_seeds**2))


def test_seeds_evaluated_on_different_sets_are_refused(tmp_path):
    first, *_ = seeds([{"a": 50.0}], tmp_path / "1")
    for n, other in enumerate((seeds([{"b": 50.0}], tmp_path / "2"), seeds([{"a": 50.0}], tmp_path / "3", a=100))):
        with pytest.raises(UserError, match="same sets"):
            ResultRow(f"row {n}", [first, *other])
    with pytest.raises(UserError, match="at least one seed"):
        ResultRow("nothing", [])


# --- tables -----------------------------------------------------------------------------------------------------------


def test_markdown_table(paper):
    text = markdown_table(rows_of(paper.models))
    found = cells(text)
    assert found["top-1 %"] == list(COLUMNS)
    for row in ("zero-shot", "FT", "WiSE-FT", "this method"):
        for label, name, cell in zip(COLUMNS, PAPER, found[row], strict=False):
            share, n = PUBLISHED["ViT-B-16"][row][label] / 100, BENCHMARKS[name].images
            low, high = stats.binomtest(round(share * n), n).proportion_ci(method="wilson")
            best = share == max(values[label] for values in PUBLISHED["ViT-B-16"].values()) / 100
            value = f"**{100 * share:.1f}**" if best else f"{100 * share:.1f}"
            assert cell == f"{value} ({100 * low:.1f}–{100 * high:.1f})"
    assert found["this method"][-1].startswith("**63.3**")
    assert "Avg.: mean of V2, R, Sketch, ObjectNet, A." in text and "Wilson" in text and "seeds" not in text
    assert [cell.split()[0] for cell in found["FT"]] == ["81.3", "70.6", "65.6", "45.1", "50.5", "36.6", "53.7"]


def test_markdown_table_of_seeds_ties_and_gaps(tmp_path):
    several = ResultRow(
        "a | b*", seeds([{"x": 50.0, "y": 61.0, "z": 30.0}, {"x": 52.0, "y": 61.0, "z": 31.0}], tmp_path / "1")
    )
    one = ResultRow("one", seeds([{"x": 51.0, "y": 60.0}], tmp_path / "2"))
    text = markdown_table([several, one])
    found = cells(text)
    assert found[r"a \| b\*"] == ["**51.0 ± 1.4**", "**61.0 ± 0.0**", "**30.5 ± 0.7**", "**45.8 ± 0.4**"]
    assert found["one"][0].startswith("**51.0** (") and found["one"][1].startswith("60.0 (")
    assert found["one"][2:] == ["–", "–"]
    assert "over 2 seeds" in text and "Of one seed" in text
    with pytest.raises(UserError, match="no result"):
        markdown_table([])
    with pytest.raises(UserError, match="one was evaluated on elsewhere"):
        markdown_table([one], Split("elsewhere", ()))


def test_latex_table(paper, tmp_path):
    rows = rows_of(paper.models)
    rows.append(ResultRow(r"100 % α_1 ± {β} ~^\ & #$ <|> – …", rows[0].per_seed))
    rows.append(ResultRow("seeds", [rows[0].per_seed[0], rows[1].per_seed[0]]))
    text = latex_table(rows)
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    assert lines[0] == r"\begin{tabular}{lccccccc}" and lines[-1] == r"\end{tabular}"
    assert [line for line in lines if line.endswith("rule")] == [r"\toprule", r"\midrule", r"\bottomrule"]
    assert lines[2] == " & IN & V2 & R & Sketch & ObjectNet & A & Avg. " + r"\\"
    assert lines[7].startswith(r"this method & 82.4 {\scriptsize [82.1, 82.7]} & \textbf{73.4} {\scriptsize [")
    assert lines[8].startswith(r"100 \% $\alpha$\_1 $\pm$ \{$\beta$\} \textasciitilde{}\textasciicircum{}")
    assert lines[9].startswith(r"seeds & 74.8 $\pm$ 9.2 & ")
    assert all(line.count(" & ") == 7 for line in (lines[2], *lines[4:8], lines[9]))
    if shutil.which("pdflatex"):
        (tmp_path / "t.tex").write_text(
            "\\documentclass{article}\\usepackage[utf8]{inputenc}\\usepackage{booktabs}\n"
            "\\begin{document}\n" + text + "\n\\end{document}\n"
        )
        subprocess.run(
            ["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL, timeout=60
        )


def test_comparison(tmp_path):
    ours = published("ViT-B-16", "FT")
    ours |= {"val": ours["val"] - 0.38, "imagenet-r": ours["imagenet-r"] + 2, "imagenet-v2": ours["imagenet-v2"] - 3}
    rows = rows_of(loaded(results_json({"FT": ours, "mine": ours}), tmp_path).models)
    text = comparison(rows, PUBLISHED["ViT-B-16"])
    lines = [[c.strip() for c in line.strip("|").split(" | ")] for line in text.splitlines()[2:8]]
    assert [line[0] for line in lines] == ["FT", "published", "difference", "mine", "published", "difference"]
    assert lines[1][1:] == [f"{PUBLISHED['ViT-B-16']['FT'][label]:.1f}" for label in COLUMNS]
    # ImageNet's interval is ± 0.34: 0.38 is within it once 0.05 is added.
    assert lines[2][1:4] == ["≈ −0.4", "▼ −3.0", "▲ +2.0"]
    assert lines[2][4:] == ["≈ 0.0", "≈ 0.0", "≈ 0.0", "≈ −0.2"]
    assert set(lines[4][1:] + lines[5][1:]) == {"–"}
    assert "half of our 95 % interval + 0.05" in text

    found = differences(rows[0], PUBLISHED["ViT-B-16"]["FT"])["IN"]
    half = (rows[0].per_seed[0].sets["val"].interval[1] - rows[0].per_seed[0].sets["val"].interval[0]) / 2
    assert found.noise == pytest.approx(half + 0.05) and found.within_noise
    # Not within it without the rounding; and an average of fewer sets is beside none.
    assert abs(found.difference) > half
    fewer = Split("val", PAPER[1:3])
    assert set(differences(rows[0], PUBLISHED["ViT-B-16"]["FT"], fewer)) == {"IN", "V2", "R"}
    assert differences(rows[0], PUBLISHED["ViT-B-32"]["WiSE-FT"]) == {}


# --- effective robustness ---------------------------------------------------------------------------------------------


def rows_at(points: dict[str, tuple[float, float]], folder: Path, **sizes) -> list[ResultRow]:
    """Rows of models by their top-1 on val and imagenet-r."""
    models = {name: dict(zip(("val", "imagenet-r"), top1, strict=True)) for name, top1 in points.items()}
    return rows_of(loaded(results_json(models, sizes=sizes), folder).models)


@given(
    st.lists(st.tuples(st.floats(-4, 4), st.floats(-4, 4)), min_size=2, max_size=9, unique_by=lambda p: round(p[0], 1))
)
def test_the_fit_is_numpys(points):
    x, y = zip(*points, strict=True)
    fit = fit_logits(x, y)
    assert (fit.slope, fit.intercept) == pytest.approx(tuple(np.polyfit(x, y, 1)), rel=1e-6, abs=1e-6)


def exact(name: str, **top1: float) -> ResultRow:
    """A row of exactly these accuracies, of 10^9 samples each: rounding to samples moves no point."""
    n = 10**9
    sets = {s: SetResult(round(t / 100 * n), n, t, (t, t), 0.0, (), {}) for s, t in top1.items()}
    return ResultRow(name, (ModelResult(name, sets),))


BACKBONES = {"0": "ViT-B-32", "1": "ViT-B-16"}


@given(st.floats(0.2, 3), st.floats(-2, 2), st.lists(st.floats(1, 99), min_size=2, max_size=8, unique_by=round))
def test_points_on_the_line_have_no_effective_robustness(slope, intercept, tops):
    def line(top1):
        odds = slope * math.log(top1 / (100 - top1)) + intercept
        return 100 / (1 + math.exp(-odds))

    rows = [exact(f"{i}", a=top1, b=line(top1)) for i, top1 in enumerate(tops)]
    panels = robustness_panels(rows, BACKBONES)
    assert panels["b"].fit.slope == pytest.approx(slope, rel=1e-4)
    assert list(panels["b"].effective.values()) == pytest.approx([0] * len(tops), abs=1e-4)
    above = exact("above", a=tops[0], b=min(line(tops[0]) + 0.5, 99.999))
    found = robustness_panels([*rows, above], BACKBONES)["b"].effective["above"]
    assert found == pytest.approx(min(0.5, 99.999 - line(tops[0])), abs=1e-4)


def test_accuracies_of_0_and_100_percent_are_moved_by_half_a_sample(tmp_path):
    assert clipped_logit(0, 10) == pytest.approx(math.log(0.05 / 0.95))
    assert clipped_logit(100, 10) == pytest.approx(math.log(0.95 / 0.05))
    assert clipped_logit(30, 10) == pytest.approx(math.log(0.3 / 0.7))
    rows = rows_at({"a": (0, 100), "b": (100, 0), "c": (50, 50)}, tmp_path)
    values = charts.effective_robustness(rows, {"a": "B/32", "b": "B/16"}, tmp_path / "er.png")
    assert values["c"] == {"R": pytest.approx(0, abs=0.1)}  # the line goes through the middle, if not to infinity
    shows(tmp_path / "er.png")


def test_points_without_a_line_are_refused(tmp_path):
    rows = rows_at({"a": (60, 70), "b": (70, 75), "c": (60, 50)}, tmp_path)
    for fit_on, words in (
        ({}, "there are of such models: none"),
        ({"a": "B/32"}, "two backbones or more.* there are of such models: a"),
        ({"a": "B/32", "b": "B/32"}, "would give fine-tuning 0 by construction. On val .* of such models: a, b"),
        ({"a": "B/32", "c": "B/16"}, "give two or more models of different accuracy"),
        ({"a": "B/32", "nobody": "B/16"}, "nobody, to fit on, is not among the models: a, b, c"),
    ):
        with pytest.raises(UserError, match=words):
            charts.effective_robustness(rows, fit_on, tmp_path / "er.png")
    two = {"a": "B/32", "b": "B/16"}
    with pytest.raises(UserError, match="no shifted set"):
        robustness_panels(rows, two, Split("val", ()))
    with pytest.raises(UserError, match="no in-distribution set"):
        robustness_panels(rows, two, Split(None, ("imagenet-r",)))
    with pytest.raises(UserError, match="Two models are called a"):
        robustness_panels([*rows, rows[0]], two)
    assert not (tmp_path / "er.png").exists()


def test_effective_robustness_of_the_published_rows(tmp_path):
    models = {f"{a} {r}": published(a, r) for a, rows in PUBLISHED.items() for r, v in rows.items() if v["IN"]}
    del models["ViT-B-32 FT"]["imagenet-a"]
    rows = rows_of(loaded(results_json(models), tmp_path).models)
    zero = {name: name for name in models if name.endswith("zero-shot")}
    values = charts.effective_robustness(rows, zero, tmp_path / "deep" / "er.png")
    shows(tmp_path / "deep" / "er.png")

    def odds(top1):
        return np.log(np.array(top1) / (100 - np.array(top1)))

    for name, label in zip(PAPER[1:], COLUMNS[1:], strict=False):
        line = np.polyfit(odds([models[z]["val"] for z in zero]), odds([models[z][name] for z in zero]), 1)
        for model in models:
            if name in models[model] and model not in zero:
                expected = models[model][name] - 100 / (1 + np.exp(-np.polyval(line, odds(models[model]["val"]))))
                assert values[model][label] == pytest.approx(expected, abs=0.05)  # accuracies are of whole samples
    assert not values.keys() & zero.keys()  # a distance from a line through themselves
    method = values["ViT-B-16 this method"]
    assert method["Avg."] == pytest.approx(statistics.fmean(method[label] for label in COLUMNS[1:-1]))
    assert set(values["ViT-B-32 FT"]) == {"V2", "R", "Sketch", "ObjectNet"}
    text = robustness_table(values, zero)
    found = cells(text)
    assert found["effective robustness"] == list(COLUMNS[1:])
    assert found["ViT-B-32 FT"][-2:] == ["–", "–"]
    assert found["ViT-B-16 this method"][-1] == f"{method['Avg.']:+.1f}".replace("-", "−")
    assert "to ViT-B-32 zero-shot, ViT-B-16 zero-shot, ViT-L-14 zero-shot" in text
    # The line through the stored rows is the same, without the models themselves.
    line = Line.of({}, Split("val", PAPER[1:]), published=True)
    tuned = [row for row in rows if row.name not in zero]
    again = charts.effective_robustness([*tuned, *line.published], line.backbones, tmp_path / "stored.png")
    assert again["ViT-B-16 FT"] == pytest.approx(values["ViT-B-16 FT"], abs=0.05)
    assert again["ViT-B-16 FT"]["Avg."] < again["ViT-B-16 this method"]["Avg."] < 0


def test_the_line_needs_zero_shot_models_of_two_backbones(tmp_path):
    def model(name, geometry=TINY):
        return str(made.save_tiny_model(tmp_path / f"{name}.safetensors", geometry))

    split = Split("val", ("drawn",))
    small, same, wide = model("small"), model("same"), model("wide", dataclasses.replace(TINY, width=2 * TINY.width))
    assert Line.of({"s": small, "w": wide}, split, published=False).backbones == {"s": "s", "w": "w"}
    assert Line.of({"s": small, "t": same, "w": wide}, split, published=False).backbones["t"] == "s"
    for files, words in (({"s": small, "t": same}, "names 2 of 1 backbone"), ({}, "names 0 of 0")):
        with pytest.raises(UserError, match=words):
            Line.of(files, split, published=False)
    run = RunFolder(tmp_path / "run")
    run.claim(PRESETS["ft"].resolved())
    shutil.copyfile(small, run.final)
    shutil.copyfile(small, run.initial)
    with pytest.raises(UserError, match="--fit-on tuned is not a zero-shot model: .* is of the method ft"):
        Line.of({"tuned": str(run.final), "w": wide}, split, published=False)
    assert Line.of({"start": str(run.initial), "w": wide}, split, published=False)
    with pytest.raises(UserError, match="needs ImageNet's validation set"):
        Line.of({}, split, published=True)
    some = Line.of({"s": small}, Split("imagenet", ("imagenet-r", "objectnet"), ("mine",)), published=True)
    assert [row.sets for row in some.published] == [("imagenet", "imagenet-r", "objectnet")] * 3
    assert len(some.backbones) == 4


# --- charts -----------------------------------------------------------------------------------------------------------


def shows(path: Path) -> tuple[int, int]:
    """Width and height of a chart, which is neither blank nor cut off at its upper edge."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.int64)
    assert pixels.std() > 10 and len(np.unique(pixels @ [1, 256, 65536])) > 50
    assert (pixels[:2] == 255).mean() > 0.9
    return pixels.shape[1], pixels.shape[0]


LONG = "runs/object-mask-single-fill-ViT-B-16-quickgelu-beta30-seed{}/checkpoints/step-00012345/model.safetensors"


def test_bars(paper, tmp_path):
    rows = [ResultRow(LONG.format(i), row.per_seed) for i in range(3) for row in rows_of(paper.models)]
    charts.bar_chart(rows, tmp_path / "many.png", Split("val", PAPER[1:2]))
    both = [rows[0], ResultRow("seeds", [rows[0].per_seed[0], rows[1].per_seed[0]])]
    charts.bar_chart(both, tmp_path / "few.png", Split("val", PAPER[1:3]))
    assert shows(tmp_path / "few.png")[0] == shows(tmp_path / "many.png")[0]  # names make a picture longer, not wider
    assert shows(tmp_path / "few.png")[1] < shows(tmp_path / "many.png")[1]
    with pytest.raises(UserError, match="Name it .png"):
        charts.bar_chart(both[:1], tmp_path / "bars.text", Split("val", ()))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        charts.bar_chart(both[:1], tmp_path / "file" / "bars.png", Split("val", ()))


def test_reliability(paper, tmp_path):
    charts.reliability_chart(rows_of(paper.models[:2]), tmp_path / "two.png", Split("val", PAPER[1:4]))
    shows(tmp_path / "two.png")
    only = loaded(results_json({"m": {"val": 100.0}}), tmp_path / "m")
    charts.reliability_chart(rows_of(only.models), tmp_path / "one.png")
    shows(tmp_path / "one.png")


def mixtures(alphas: list[float], sets: list[str], folder: Path, **more) -> Results:
    models = {f"α = {a:g}": {s: 60 + n + 20 * a * (1.2 - a) for n, s in enumerate(sets)} for a in alphas}
    return loaded(results_json(models, make="wise-ft", alphas=alphas, **more), folder)


@pytest.mark.parametrize(
    "alphas, sets, more",
    [
        ([0.0, 0.25, 0.5, 0.75, 1.0], [*PAPER, "holdout"], {"chosen": 2, "chosen_on": "holdout"}),
        ([1.0, 0.0], ["val", "drawn"], {}),
        ([0.5], ["val"], {}),
    ],
)
def test_sweep(tmp_path, alphas, sets, more):
    charts.sweep_chart(mixtures(alphas, sets, tmp_path, **more), tmp_path / "sweep.png")
    shows(tmp_path / "sweep.png")


def test_a_sweep_needs_mixtures(paper, tmp_path):
    with pytest.raises(UserError, match="tools/wise_ft.py"):
        charts.sweep_chart(paper, tmp_path / "sweep.png")


# --- what charts have on their axes -----------------------------------------------------------------------------------


def fills(figure, label: str) -> set[tuple]:
    """Face colours of the bars with this label."""
    [bars] = [group for group in figure.axes[0].containers if group.get_label() == label and hasattr(group, "patches")]
    return {patch.get_facecolor() for patch in bars.patches}


def legend_of(figure) -> list[str]:
    [legend] = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_a_method_has_one_colour_in_all_charts(paper):
    rows, split = rows_of(paper.models), Split("val", PAPER[1:])
    expected = {row.name: to_rgba(look.colour) for row, look in zip(rows, looks([r.name for r in rows]), strict=True)}
    for shown in (rows, rows[::-1], rows[1:3]):
        bars, reliability = charts.bars_figure(shown, split), charts.reliability_figure(shown, split)
        assert legend_of(bars) == legend_of(reliability) == [row.name for row in shown]
        for row in shown:
            assert fills(bars, row.name) == {expected[row.name]}
            lines = [line for line in reliability.axes[0].get_lines() if line.get_label() == row.name]
            assert [to_rgba(line.get_color()) for line in lines] == [expected[row.name]]
    line = Line.of({}, split, published=True)
    figure, _ = charts.robustness_figure([*rows, *line.published], line.backbones, split)
    for row in rows:
        [point] = [line for line in figure.axes[0].get_lines() if line.get_label() == row.name]
        assert to_rgba(point.get_color()) == expected[row.name]
    for each in (bars, reliability, figure):
        assert all(axis.get_xlabel() or axis.get_ylabel() for axis in each.axes)


def test_names_of_the_user_do_not_change_a_methods_look(tmp_path):
    content = results_json({"/runs/a/model.safetensors": {"val": 60.0, "drawn": 50.0}, "/x.st": {"val": 60.0}})
    origins = [{"file": "/runs/a/model.safetensors", "run": "/runs/a", "method": "ft"}, {"file": "/x.st"}]
    found = loaded({**content, "checkpoints": origins}, tmp_path)
    assert [model.method for model in found.models] == ["ft", None]
    figure = charts.bars_figure(rows_of(found.models[:1], ["mine"]))
    assert fills(figure, "mine") == {to_rgba(looks(["ft"])[0].colour)}


def test_bins_of_few_samples_are_grey_and_not_connected(tmp_path):
    content = results_json({"ft": {"val": 60.0}})
    bins = [[0, 0, 0.0]] * 12 + [[24, 12, 20.0], [25, 20, 21.25], [400, 390, 388.0]]
    content["models"][0]["sets"]["val"]["calibration"] = bins
    one = loaded(content, tmp_path)
    axis = charts.reliability_figure(rows_of(one.models)).axes[0]
    diagonal, line, few = axis.get_lines()
    assert list(line.get_xdata()) == pytest.approx([85.0, 97.0]) and list(line.get_ydata()) == pytest.approx([80, 97.5])
    assert list(few.get_xdata()) == pytest.approx([100 * 20 / 24]) and few.get_linestyle() == "None"
    assert few.get_color() != line.get_color()
    # Two seeds of a row are one line: their samples are added, and the bin has enough.
    seeds = [ResultRow("ft", [one.models[0], one.models[0]])]
    _, line, few = charts.reliability_figure(seeds).axes[0].get_lines()
    assert len(line.get_xdata()) == 3 and len(few.get_xdata()) == 0


def test_charts_are_legible_at_half_of_a_columns_width(paper):
    """330 pixels are half of a README's column: letters of less than seven pixels are a blur there."""
    rows, split = rows_of(paper.models), Split("val", PAPER[1:])
    line = Line.of({}, split, published=True)
    for figure in (
        charts.bars_figure(rows, split),
        charts.reliability_figure(rows, split),
        charts.robustness_figure([*rows, *line.published], line.backbones, split)[0],
    ):
        for text in figure.findobj(Text):
            if text.get_text().strip():
                assert text.get_fontsize() / 72 / figure.get_figwidth() * 330 > 6.8, text
