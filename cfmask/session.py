"""One start of a job on a run folder: who holds the folder, how its ranks come together, and word of how it failed."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist

from cfmask.checkpoint.state import Checkpoint, Input
from cfmask.errors import UserError
from cfmask.runs import RunFolder
from cfmask.runtime.distributed import DistributedContext, process_group
from cfmask.runtime.jsonl import JsonLines
from cfmask.runtime.patience import patiently
from cfmask.runtime.rendezvous import RENDEZVOUS_TIMEOUT, call_off, remove_stale_rendezvous
from cfmask.secrets import mask_secrets

logger = logging.getLogger(__name__)

FINISHED = "finished"
REQUEUE, QUIT = "requeue", "quit"
"""What a launcher may ask of ranks: to stop at the next step boundary, and whether the job is to come back."""

StopRequest = Callable[[], str | None]
FailureCallback = Callable[[Exception], None]
SecondsLeft = Callable[[], float]
"""How long ranks may stay after a stop was asked for."""


@contextlib.contextmanager
def session(
    run: RunFolder, context: DistributedContext, failing: FailureCallback
) -> Iterator[tuple[dist.Store, contextlib.ExitStack]]:
    """The folder held by rank 0, and the process group. Yields its store, and a stack for what else has to be closed,
    before the two. An error inside is told to ``failing`` before anything is closed, and kept in the run folder.

    Raises:
        UserError: another job holds the folder: on all ranks.
    """
    torch.set_num_threads(context.cpus)
    with contextlib.ExitStack() as stack:
        if context.rank == 0:
            try:
                stack.enter_context(run.locked(context.attempt))
            except UserError as error:
                call_off(run.rendezvous, context.attempt, str(error))
                raise
            remove_stale_rendezvous(run.rendezvous)
        store = stack.enter_context(process_group(context, run.rendezvous))
        try:
            yield store, stack
        except Exception as error:
            failing(error)
            if context.rank == 0:
                why = mask_secrets(f"failed: {type(error).__name__}: {str(error)[:500]}")
                try:
                    run.end_failed(why, job=context.attempt, nodes=context.nodes, world_size=context.world_size)
                except OSError as unreadable:  # the error that ends the start is the one to raise
                    logger.warning(f"{run.attempts} cannot be read ({unreadable.strerror}): {why}")
            raise


def check_progress(run: RunFolder, resumed: Checkpoint | None, epoch_steps: int, checkpoint_steps: int) -> None:
    """Refuse to begin again at step 0 where the run has come further; warn where newer checkpoints were lost.

    The log runs ahead of the checkpoints: the steps since the last one are lost when a run is killed. So that a log
    exists says nothing. What does: a checkpoint that was noted when it was committed, a start that resumed from one,
    and steps beyond the second checkpoint that was due, which is begun only when the first one has ended.

    Args:
        resumed: the checkpoint that was chosen.

    Raises:
        UserError: there is no checkpoint, the run has come further, and beginning again was not allowed.
        StorageUnavailable: the run's history could not be read.
    """
    history = patiently(run.history, f"The history of {run.root}")
    if resumed is not None:
        if resumed.step < history.saved:
            logger.warning(
                f"{run.root} has had a checkpoint of step {history.saved}, which is gone or damaged. It "
                f"resumes from step {resumed.step}."
            )
        return
    dues = (step for step in itertools.count(1) if step % epoch_steps == 0 or step % checkpoint_steps == 0)
    _, second_due = next(dues), next(dues)
    if run.step_0_allowed() or not (history.saved or history.logged > second_due):
        return
    shows = f"a checkpoint of step {history.saved}" if history.saved else f"steps up to {history.logged}"
    raise UserError(
        f"{run.root} has no whole checkpoint in {run.checkpoints}, and its history shows {shows}. If a file system is "
        "not mounted, mount it and start again; if the folder was moved or deleted, bring it back. To begin again at "
        f"step 0, which discards what its logs show: python launch/submit.py --resume {run.root} --from-step-0"
    )


def check_inputs(run: RunFolder, checkpoint: Checkpoint, inputs: Mapping[str, Input]) -> None:
    """Refuse to continue a checkpoint with other settings or teachers than it was trained with.

    Args:
        inputs: those of this start (``train_setup.inputs_of``). What only one of the two knows is not compared: it was
            written by another version.

    Raises:
        UserError: naming what differs.
    """
    differences = [
        f"{name}: {was} → {inputs[name]}"
        for name, was in checkpoint.inputs.items()
        if name in inputs and inputs[name] != was
    ]
    if differences:
        raise UserError(
            f"{run.root} was trained with other settings or model files up to {checkpoint.path.name} than it has now: "
            f"{'; '.join(differences)} (checkpoint → now). recipe.json or the file was changed or damaged since: put "
            "back what the checkpoint says, or begin a new run."
        )


def begin_attempt(run: RunFolder, context: DistributedContext, *, from_step: int) -> JsonLines:
    """Record this start (``RunFolder.begin_attempt``), on rank 0.

    Raises:
        StorageUnavailable: the records of earlier starts cannot be read.
    """
    return patiently(  # it fails before anything is written, or not at all
        lambda: run.begin_attempt(
            job=context.attempt,
            nodes=context.nodes,
            world_size=context.world_size,
            device=str(context.device),
            from_step=from_step,
        ),
        str(run.attempts),
    )


def choose_arithmetic(precision: str, *, deterministic: bool) -> None:
    """Kernels that give the same bits twice, where there is a choice; TF32 where it is asked for.

    Deterministic mode is strict: an operator without a deterministic kernel raises. With warn_only, attention would
    take the backward kernels that add in any order.
    """
    tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # It would fill every fresh tensor with NaN, which costs time and finds bugs that are not ours.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The scope in which passes run: bf16 where that is the precision, otherwise without effect."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def rank_0_first(store: dist.Store, context: DistributedContext, what: str, make: Callable[[], object]) -> None:
    """Let rank 0 make something that all ranks need, while the others wait for it.

    Args:
        what: is made, in words; also the key in the store.

    Raises:
        UserError: on the others, with rank 0's words, if it failed.
    """
    if context.rank == 0:
        answer = "ready"
        try:
            make()
        except BaseException as error:
            answer = f"rank 0 could not make {what}: {error}"
            raise
        finally:
            store.set(what, answer)
    else:
        store.wait([what], RENDEZVOUS_TIMEOUT)
        answer = store.get(what).decode()
        if answer != "ready":
            raise UserError(answer)
