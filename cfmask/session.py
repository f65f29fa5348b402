"""One start of a job on a run folder: the lock, the process group, the checks before training resumes, and the record
of its failure."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shlex
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
"""Stop requests of a launcher: ranks stop at the next step boundary, and the job is requeued or ends."""

StopRequest = Callable[[], str | None]
FailureCallback = Callable[[Exception], None]
SecondsLeft = Callable[[], float]
"""Seconds until the deadline after a stop request."""


@contextlib.contextmanager
def session(
    run: RunFolder, context: DistributedContext, failing: FailureCallback
) -> Iterator[tuple[dist.Store, contextlib.ExitStack]]:
    """Lock the folder on rank 0 and join the process group. Yields the group's store, and a stack of contexts that are
    closed before the two.

    Args:
        failing: called with an error that the block raises, before anything is closed. The error is also recorded in
            the run folder.

    Raises:
        UserError: on all ranks, if another job holds the folder.
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
    """Refuse to restart at step 0 a run that has made progress; warn if newer checkpoints were lost.

    Steps in the log alone prove nothing, because steps since the last checkpoint are lost when a run is killed. Proof
    of a checkpoint is its record in committed.jsonl, a start that resumed from one, or steps beyond the second
    checkpoint that was due, which is begun only after the first one is complete.

    Args:
        resumed: the checkpoint that was chosen.
        epoch_steps, checkpoint_steps: checkpoints are due at multiples of either.

    Raises:
        UserError: there is no checkpoint, the run has made progress, and ``RunFolder.allow_step_0`` was not called.
        StorageUnavailable: the run's history could not be read.
    """
    history = patiently(run.history, f"The history of {run.root}")
    if resumed is not None:
        if resumed.step < history.saved:
            logger.warning(
                f"the checkpoint of step {history.saved} of {run.root} is gone or damaged. The run resumes from step "
                f"{resumed.step}."
            )
        return
    dues = (step for step in itertools.count(1) if step % epoch_steps == 0 or step % checkpoint_steps == 0)
    _, second_due = next(dues), next(dues)
    if run.step_0_allowed() or not (history.saved or history.logged > second_due):
        return
    shows = f"a checkpoint of step {history.saved}" if history.saved else f"steps up to {history.logged}"
    raise UserError(
        f"{run.root} has no intact checkpoint in {run.checkpoints}, but its history shows {shows}. If a file system is "
        "not mounted, mount it and start again; if the folder was moved or deleted, restore it. To restart at step 0 "
        f"and discard what the logs show: python launch/submit.py --resume {shlex.quote(str(run.root))} --from-step-0"
    )


def check_inputs(run: RunFolder, checkpoint: Checkpoint, inputs: Mapping[str, Input]) -> None:
    """Refuse to resume with other settings or teachers than the checkpoint was trained with.

    Args:
        inputs: of this start (``train_setup.inputs_of``). Names that only one of the two has are not compared, because
            another version wrote the checkpoint.

    Raises:
        UserError: settings or model files differ; they are named.
    """
    differences = [
        f"{name}: {was} → {inputs[name]}"
        for name, was in checkpoint.inputs.items()
        if name in inputs and inputs[name] != was
    ]
    if differences:
        raise UserError(
            f"{run.root} was trained with other settings or model files up to {checkpoint.path.name} than it has now: "
            f"{'; '.join(differences)} (checkpoint → now). recipe.json or the file was changed or damaged since: "
            "restore what the checkpoint says, or begin a new run."
        )


def begin_attempt(run: RunFolder, context: DistributedContext, *, from_step: int) -> JsonLines:
    """Record this start (``RunFolder.begin_attempt``), on rank 0.

    Raises:
        StorageUnavailable: the records of earlier starts cannot be read.
    """
    return patiently(  # safe to repeat: an error comes before anything is written
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
    """Select deterministic kernels, and TF32 if the precision is "tf32".

    Deterministic mode is strict: an operator without a deterministic kernel raises. With warn_only, attention would
    use backward kernels that add in any order.
    """
    tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Filling new tensors with NaN would only cost time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of the passes: bf16 if that is the precision, disabled otherwise."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def rank_0_first(store: dist.Store, context: DistributedContext, what: str, make: Callable[[], object]) -> None:
    """Call ``make`` on rank 0 while the other ranks wait.

    Args:
        what: name of what is made, for errors; also the key in the store.

    Raises:
        UserError: on the other ranks, with rank 0's message, if it failed there.
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
