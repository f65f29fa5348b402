"""Evaluation of models on sets of images.

    spec.py             what an evaluation does: one class for each kind (models as they are, zero-shot, WiSE-FT, soups)
    checks.py           what can be checked of models and sets before a job is queued
    selection.py        which sets may choose a model: never a test set
    model_origin.py     the run and step that a model file comes from, and what chose that step

    worker.py           one process of an evaluation job, on any number of ranks
    side_by_side.py     models as they are
    zero_shot.py        the zero-shot head
    wise_ft.py          WiSE-FT
    soup.py             uniform and greedy soups

    label_space.py      which classes may be predicted on a set, and which predictions are right
    counting.py         counts of right predictions and of confidences
    counter.py          counts over all ranks, kept so that an interrupted job resumes

spec, checks, selection and model_origin do not import torch. Tables and pictures of the results are cfmask/report/.
"""
