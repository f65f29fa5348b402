"""What evaluations found, as tables and pictures: results.json (cfmask/evaluation_spec.py has its layout) to Markdown,
LaTeX and PNG.

    results.py      what is in a results.json; a ResultRow is a line of a table (one model, or a recipe's models of
                    several seeds), a Split says which sets are in-distribution and which are the shifted ones
    tables.py       Markdown and LaTeX, alone and beside the paper's numbers
    robustness.py   effective robustness: above the line through zero-shot models
    charts.py       bars, reliability, WiSE-FT's sweep, effective robustness
    summary.py      what the tools print of an evaluation, and write beside its results
"""

from cfmask.report.charts import bar_chart, effective_robustness, reliability_chart, sweep_chart
from cfmask.report.results import (
    AVERAGE,
    Estimate,
    ModelResult,
    ResultRow,
    Results,
    SetInfo,
    SetResult,
    Split,
    combined_noise,
    read_results,
    rows_of,
)
from cfmask.report.robustness import (
    LogitFit,
    RobustnessPanel,
    clipped_logit,
    effective_values,
    fit_logits,
    robustness_panels,
    robustness_table,
)
from cfmask.report.summary import named_rows, show
from cfmask.report.tables import (
    PUBLISHED,
    Difference,
    comparison,
    differences,
    latex_table,
    latex_text,
    markdown_table,
    table,
)

__all__ = [
    "AVERAGE",
    "PUBLISHED",
    "Difference",
    "Estimate",
    "LogitFit",
    "ModelResult",
    "Results",
    "RobustnessPanel",
    "ResultRow",
    "SetInfo",
    "SetResult",
    "Split",
    "bar_chart",
    "clipped_logit",
    "combined_noise",
    "comparison",
    "differences",
    "effective_robustness",
    "effective_values",
    "fit_logits",
    "latex_table",
    "latex_text",
    "markdown_table",
    "named_rows",
    "read_results",
    "reliability_chart",
    "robustness_panels",
    "robustness_table",
    "rows_of",
    "show",
    "sweep_chart",
    "table",
]
