"""tools/_report.py: results.json read and refused, tables counted again, and pictures that show something."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from cfmask.data.benchmarks import BENCHMARKS, SHIFTED
from cfmask.errors import UserError
from cfmask.evaluation import Evaluation
from tools import _report as report
from tools._report import PUBLISHED, Row, Split

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
    """A whole results.json of top-1 by model and set. more: chosen, chosen_on, ingredients; alphas: by model."""
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
    evaluation = Evaluation(make=make, models=tuple(models), shards="/data/shards", sets=tuple(sets))
    return {
        "evaluation": json.loads(evaluation.to_json()),
        "sets": {
            name: {"samples": sizes[name], "classes": 200 if name[-2:] in ("-r", "-a") else 1000} for name in sets
        },
        "models": entries,
        **more,
    }


def loaded(content: dict, folder: Path) -> report.Results:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content))
    return report.read_results(folder)


def published(arch: str, row: str) -> dict[str, float]:
    return {name: PUBLISHED[arch][row][label] for name, label in zip(PAPER, COLUMNS, strict=False)}


@pytest.fixture(scope="module")
def paper(tmp_path_factory) -> report.Results:
    """The published rows of B/16, as one evaluation would have found them."""
    models = {row: published("ViT-B-16", row) for row in PUBLISHED["ViT-B-16"]}
    return loaded(results_json(models), tmp_path_factory.mktemp("paper"))


def cells(markdown: str) -> dict[str, list[str]]:
    """A table's lines by their first cell."""
    lines = [[c.strip() for c in line.strip("|").split(" | ")] for line in markdown.splitlines() if line[:1] == "|"]
    return {line[0]: line[1:] for line in lines if not line[0].startswith("-")}


# --- reading ----------------------------------------------------------------------------------------------------------


def test_results_are_read_whole(tmp_path):
    content = results_json(
        {"α = 0": {"val": 60.0, "holdout": 61.0}, "α = 1": {"val": 70.0, "holdout": 69.0}},
        make="wise-ft",
        alphas=[0.0, 1.0],
        chosen=1,
        chosen_on="holdout",
        ingredients=["a", "b"],
    )
    found = loaded(content, tmp_path)
    assert report.read_results(tmp_path / "results.json") == found
    assert found.evaluation.make == "wise-ft"
    assert found.sets["val"] == report.SetInfo(50_000, 1000)
    assert [model.alpha for model in found.models] == [0.0, 1.0]
    assert (found.chosen, found.chosen_on, found.ingredients) == (1, "holdout", ("a", "b"))
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
        ("[]", "not an evaluation's results"),
        ('{"set": "s", "models": []}', "not an evaluation's results"),
        ("{", "not JSON"),
        (broken(lambda c: c["models"][0]["sets"]["val"].pop("interval")), "not laid out"),
        (broken(lambda c: c["models"][0]["sets"]["val"].update(total=0)), "no sample of val"),
        (broken(lambda c: c.update(models=3)), "not laid out"),
        (broken(lambda c: c.update(chosen=1)), "there are 1 models"),
        (broken(lambda c: c["evaluation"].update(unheard_of=1)), "not an evaluation as cfmask writes it"),
    ],
)
def test_what_is_no_evaluation_is_refused(tmp_path, text, words):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        report.read_results(tmp_path)
    assert "results.json" in str(error.value)


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match="has not finished"):
        report.read_results(tmp_path)


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


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_published_averages_are_those_of_their_sets():
    known = [values for rows in PUBLISHED.values() for values in rows.values() if values["IN"] is not None]
    assert len(known) == 8
    for values in known:
        assert tuple(values) == COLUMNS
        mean = statistics.fmean(values[label] for label in COLUMNS[1:-1])
        assert abs(values["Avg."] - mean) < 0.1 + 1e-9  # each of six numbers is rounded


def test_one_seed(paper):
    row = report.rows_of(paper)[1]
    found = row.estimates(paper.split)
    assert tuple(found) == COLUMNS
    for name, label in zip(PAPER, COLUMNS, strict=False):
        result = row.per_seed[0].sets[name]
        assert (found[label].value, (found[label].low, found[label].high)) == (result.top1, result.interval)
    # Of the average: the sets drawn anew many times.
    chance = np.random.default_rng(0)
    shifted = [row.per_seed[0].sets[name] for name in PAPER[1:]]
    drawn = np.mean([chance.binomial(r.total, r.correct / r.total, 200_000) / r.total for r in shifted], axis=0)
    low, high = 100 * np.quantile(drawn, [0.025, 0.975])
    average = found["Avg."]
    assert (average.low, average.high) == pytest.approx((low, high), abs=0.01)
    assert average.value == pytest.approx(statistics.fmean(r.top1 for r in shifted))
    assert average.noise == pytest.approx((high - low) / 2, abs=0.01)


def seeds(tops: list[dict[str, float]], folder: Path, **sizes) -> list[report.ModelResult]:
    models = {f"seed {i}": top1 for i, top1 in enumerate(tops)}
    return list(loaded(results_json(models, sizes=sizes), folder).models)


def test_several_seeds(tmp_path):
    tops = [{"a": 50.0, "b": 60.0, "c": 20.0}, {"a": 52.0, "b": 61.0, "c": 23.0}, {"a": 51.0, "b": 65.0, "c": 20.0}]
    row = Row("FT", seeds(tops, tmp_path))
    found = row.estimates(Split.of_rows([row]))
    assert (found["a"].value, found["a"].sd, found["a"].seeds) == (pytest.approx(51), pytest.approx(1), 3)
    averages = [40.0, 42.0, 42.5]  # of b and c, seed by seed
    assert found["Avg."].value == pytest.approx(statistics.fmean(averages))
    assert found["Avg."].sd == pytest.approx(statistics.stdev(averages))
    half = statistics.fmean((m.sets["a"].interval[1] - m.sets["a"].interval[0]) / 2 for m in row.per_seed)
    of_seeds = stats.t(2).ppf(0.975) / math.sqrt(3)
    assert found["a"].noise == pytest.approx(math.sqrt(half**2 + of_seeds**2))


def test_seeds_of_other_sets_make_no_row(tmp_path):
    first, *_ = seeds([{"a": 50.0}], tmp_path / "1")
    for n, other in enumerate((seeds([{"b": 50.0}], tmp_path / "2"), seeds([{"a": 50.0}], tmp_path / "3", a=100))):
        with pytest.raises(UserError, match="same sets"):
            Row(f"row {n}", [first, *other])
    with pytest.raises(UserError, match="at least one seed"):
        Row("nothing", [])


# --- tables -----------------------------------------------------------------------------------------------------------


def test_markdown_table(paper):
    text = report.markdown_table(report.rows_of(paper))
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
    plain = cells(report.markdown_table(report.rows_of(paper), uncertainty=False, digits=2))
    assert plain["FT"] == ["81.30", "70.60", "65.60", "45.10", "50.50", "36.60", "53.68"]
    assert max(map(len, report.markdown_table(report.rows_of(paper)[:1]).splitlines()[:3])) < 140


def test_markdown_table_of_seeds_ties_and_gaps(tmp_path):
    several = Row(
        "a | b*", seeds([{"x": 50.0, "y": 61.0, "z": 30.0}, {"x": 52.0, "y": 61.0, "z": 31.0}], tmp_path / "1")
    )
    one = Row("one", seeds([{"x": 51.0, "y": 60.0}], tmp_path / "2"))
    text = report.markdown_table([several, one])
    found = cells(text)
    assert found[r"a \| b\*"] == ["**51.0 ± 1.4**", "**61.0 ± 0.0**", "**30.5 ± 0.7**", "**45.8 ± 0.4**"]
    assert found["one"][0].startswith("**51.0** (") and found["one"][1].startswith("60.0 (")
    assert found["one"][2:] == ["–", "–"]
    assert "over 2 seeds" in text and "Of one seed" in text
    with pytest.raises(UserError, match="no result"):
        report.markdown_table([])
    with pytest.raises(UserError, match="one was evaluated on elsewhere"):
        report.markdown_table([one], Split("elsewhere", ()))


def test_latex_table(paper, tmp_path):
    rows = report.rows_of(paper)
    rows.append(Row(r"100 % α_1 ± {β} ~^\ & #$ <|> – …", rows[0].per_seed))
    rows.append(Row("seeds", [rows[0].per_seed[0], rows[1].per_seed[0]]))
    text = report.latex_table(rows)
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
    ours |= {"val": ours["val"] - 0.35, "imagenet-r": ours["imagenet-r"] + 2, "imagenet-v2": ours["imagenet-v2"] - 3}
    rows = report.rows_of(loaded(results_json({"FT": ours, "mine": ours}), tmp_path))
    text = report.comparison(rows, PUBLISHED["ViT-B-16"])
    lines = [[c.strip() for c in line.strip("|").split(" | ")] for line in text.splitlines()[2:8]]
    assert [line[0] for line in lines] == ["FT", "published", "difference", "mine", "published", "difference"]
    assert lines[1][1:] == [f"{PUBLISHED['ViT-B-16']['FT'][label]:.1f}" for label in COLUMNS]
    # ImageNet's interval is ± 0.34: 0.35 is within it once 0.05 is added.
    assert lines[2][1:4] == ["≈ −0.3", "▼ −3.0", "▲ +2.0"] or lines[2][1:4] == ["≈ −0.4", "▼ −3.0", "▲ +2.0"]
    assert lines[2][4:] == ["≈ 0.0", "≈ 0.0", "≈ 0.0", "≈ −0.2"]
    assert set(lines[4][1:] + lines[5][1:]) == {"–"}
    assert "half of our 95 % interval + 0.05" in text

    found = report.differences(rows[0], PUBLISHED["ViT-B-16"]["FT"])["IN"]
    half = (rows[0].per_seed[0].sets["val"].interval[1] - rows[0].per_seed[0].sets["val"].interval[0]) / 2
    assert found.noise == pytest.approx(half + 0.05) and found.within_noise
    # Not within it without the rounding; and an average of fewer sets is beside none.
    assert abs(found.difference) > half
    fewer = Split("val", PAPER[1:3])
    assert set(report.differences(rows[0], PUBLISHED["ViT-B-16"]["FT"], fewer)) == {"IN", "V2", "R"}
    assert report.differences(rows[0], PUBLISHED["ViT-B-32"]["WiSE-FT"]) == {}
