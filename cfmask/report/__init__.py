"""Results as tables, charts and pages: from results.json (cfmask/evaluation_spec.py) to Markdown, LaTeX, PNG and HTML.

    results.py      the content of a results.json; a ResultRow is a row of a table (one model, or a recipe's models of
                    several seeds), a Split says which set is in-distribution and which are shifted
    tables.py       Markdown, LaTeX and HTML, alone and beside the paper's numbers
    robustness.py   effective robustness: accuracy above the line through zero-shot models
    charts.py       bars, reliability, WiSE-FT's sweep, effective robustness
    curves.py       loss and accuracy of runs over steps
    masks.py        tables, curves and a contact sheet of a validation of masks
    mask_page.py    the page of a validation of masks
    summary.py      what a command prints of an evaluation, and writes beside its results
    page.py         building blocks of a page: one HTML file that needs no other
    run_blocks.py   blocks about models and runs: origins, recipes, versions, starts, curves, contact sheet
    evaluation_page.py
                    the page of an evaluation
    contact_sheet.py
                    image, CAM, mask, donor and counterfactual image of samples
    sheet.py        the layout of contact sheets
    figures.py      sizes, style, legends and files of charts
    fonts.py        text of any script in pictures
    looks.py        colour, marker, line style and hatch of each method
    labels.py       names of runs and models, and which runs are seeds of one line

scipy and matplotlib take a second to import: commands import charts, curves and summary when they need them.
"""
