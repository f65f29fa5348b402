"""One process of an evaluation job: makes an Evaluation's models, and counts their right predictions on its sets."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from functools import partial
from typing import Any

from cfmask.evaluation import side_by_side, soup, wise_ft, zero_shot
from cfmask.evaluation.checks import load_sets_of
from cfmask.evaluation.counter import SetCounter, Stopped
from cfmask.evaluation.model_origin import origin_of
from cfmask.evaluation_spec import Evaluation, UniformSoup, WiseFT, ZeroShot, files_of
from cfmask.run_search import find_model
from cfmask.runs import RunFolder
from cfmask.runtime.agreement import check_agreement
from cfmask.runtime.distributed import DistributedContext
from cfmask.runtime.files import write_atomically
from cfmask.runtime.patience import patiently
from cfmask.secrets import mask_secrets
from cfmask.session import (
    FINISHED,
    FailureCallback,
    StopRequest,
    begin_attempt,
    choose_arithmetic,
    rank_0_first,
    session,
)

logger = logging.getLogger(__name__)


def run_evaluation(
    evaluation: Evaluation,
    run: RunFolder,
    context: DistributedContext,
    stop_request: StopRequest = lambda: None,
    failing: FailureCallback = lambda error: None,
) -> str:
    """Evaluate until everything is counted or a stop is requested. Arguments and result are those of ``train.train``.

    Raises:
        UserError: models that do not fit together or to the sets, an incomplete set, a sample that cannot be read,
            logits that are not finite, or another job in the folder.
    """
    choose_arithmetic(evaluation.precision, deterministic=True)
    with session(run, context, failing) as (store, leaving):
        is_main_process = context.rank == 0
        evaluation.checked()
        requested = evaluation
        # A run's best checkpoint is known when the run has ended, which may be long after the evaluation was queued.
        models = (patiently(partial(find_model, path), path) for path in evaluation.models)
        evaluation = replace(evaluation, models=tuple(map(str, models)))
        sets = load_sets_of(evaluation, check_files=is_main_process)
        digest = hashlib.sha256(evaluation.to_json().encode()).hexdigest()[:12]
        check_agreement({"the evaluation": digest, **{f"the set {name}": each.digest for name, each in sets.items()}})
        if isinstance(evaluation, ZeroShot):
            build = partial(zero_shot.build, evaluation, run, sets[evaluation.sets[0]].classes, str(context.device))
            rank_0_first(store, context, "the zero-shot head", build)
        counter = SetCounter(evaluation, run, context, sets, stop_request)
        if is_main_process:
            attempts = begin_attempt(run, context, from_step=counter.images)
            patiently(lambda: run.cut_history(counter.images), str(run.root))
        leaving.callback(counter.close)
        try:
            results = _evaluate(evaluation, counter, run)
        except Stopped as stopped:
            [request] = stopped.args
            if is_main_process:
                logger.info(f"stop requested ({request}) after {counter.images} images")
                run.end_attempt(f"stopped after {counter.images} images ({request})")
            return request
        if is_main_process:
            facts = {
                "evaluation": json.loads(mask_secrets(requested.to_json())),
                "of": files_of(requested) | files_of(evaluation),
                "checkpoints": [origin_of(path).to_json() for path in evaluation.models],
            }
            write_atomically(run.results, json.dumps({**facts, **results}, indent=2))
            run.remove_progress()
            attempts.write()
            run.end_attempt(FINISHED)
            logger.info(f"finished: {run.results}")
    return FINISHED


def _evaluate(evaluation: Evaluation, counter: SetCounter, run: RunFolder) -> dict[str, Any]:
    """Make the models, choose among them, and count them. Returns entries of results.json."""
    match evaluation:
        case ZeroShot():
            return zero_shot.evaluate(evaluation, counter, run)
        case WiseFT():
            return wise_ft.evaluate(evaluation, counter, run)
        case UniformSoup():  # a greedy soup too
            return soup.evaluate(evaluation, counter, run)
        case _:
            return side_by_side.evaluate(evaluation, counter)
