"""Evaluation of models on sets of images.

    checks.py           checks of models and sets before a job is queued
    selection.py        which sets may choose a model; test sets may not
    model_origin.py     the run and step of a model file, and what chose that step

    worker.py           one process of an evaluation job, on any number of ranks
    side_by_side.py     models as they are
    zero_shot.py        the zero-shot head
    wise_ft.py          WiSE-FT
    soup.py             uniform and greedy soups

    counter.py          counts over all ranks, saved so that an interrupted job resumes

checks, selection and model_origin do not import torch. Modules that training uses as well lie outside:
evaluation_spec.py (what an evaluation does, one class for each kind), counting.py (counts of right predictions and
confidences) and data/label_space.py (which classes may be predicted on a set). cfmask/report/ makes tables and charts.
"""
