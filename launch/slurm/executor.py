"""submitit's Slurm executor, with our sbatch: its own would take options from the environment, and would not look
whether a job was accepted whose answer was lost."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, JobPaths

from launch.slurm.client import SlurmError
from launch.slurm.control import cancel
from launch.slurm.submission import SubmissionUnknown, submit

_CLEAN = "unset ${!SRUN_*} SLURM_EXPORT_ENV SLURM_KILL_BAD_EXIT SLURM_WAIT"
"""srun takes options from these, which a login shell on the node may have set."""


class SlurmExecutor(submitit.SlurmExecutor):
    """As submitit's; ``submit_array`` makes one job of one function, and an array of several."""

    def __init__(self, folder: str | Path, **options: Any) -> None:
        super().__init__(folder, **options)
        # submitit's default is "submitit", which sites that check wckeys refuse.
        self.parameters["wckey"] = None
        self._accepted: str | None = None

    def batch_script(self, members: int = 1) -> str:
        """What would be sent for so many functions."""
        count = {"map_count": members} if members > 1 else {}
        before, self.parameters = self.parameters, {**self.parameters, **count}
        try:
            return self._make_submission_file_text(self._submitit_command_str, "")
        finally:
            self.parameters = before

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        # submitit always asks for a time limit; "partition" stands for none, so that a job gets its partition's.
        text = super()._make_submission_file_text(command, uid)
        lines = [line for line in text.splitlines() if line != "#SBATCH --time=partition"]
        options = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
        return "\n".join([*lines[: options + 1], "", _CLEAN, *lines[options + 1 :]])

    def _submit_command(self, command: str) -> submitit.Job[Any]:
        script = JobPaths.get_first_id_independent_folder(self.folder) / f".submission_file_{uuid.uuid4().hex}.sh"
        try:
            with open(os.open(script, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                # Only its owner can read it: setup lines of a cluster file may have tokens.
                file.write(self._make_submission_file_text(command, ""))
            number = self._accepted = submit(script)
        except SubmissionUnknown:
            raise  # the script is how its job is found later
        except (SlurmError, OSError):
            script.unlink(missing_ok=True)
            raise
        job = self.job_class(folder=self.folder, job_id=number, tasks=list(range(self._num_tasks())))
        job.paths.move_temporary_file(script, "submission_file", keep_as_symlink=True)
        return job

    def _internal_process_submissions(self, delayed_submissions: Sequence[DelayedSubmission]) -> list[Any]:
        self._accepted = None
        try:
            return self._process(delayed_submissions)
        except OSError as error:
            if self._accepted is None:
                raise
            with suppress(SlurmError):
                cancel(self._accepted)  # it would not find the function that it is to call
            raise SubmissionUnknown(
                f"Slurm has accepted job {self._accepted}, but its files in {self.folder} cannot be written "
                f"({error.strerror}), so it was cancelled. Give the same command again when there is space."
            ) from None

    def _process(self, delayed_submissions: Sequence[DelayedSubmission]) -> list[Any]:
        if len(delayed_submissions) == 1:
            return super()._internal_process_submissions(list(delayed_submissions))
        # submitit's own branch for arrays makes an executor of its own class, which would call sbatch by itself.
        folder = JobPaths.get_first_id_independent_folder(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        pickles = []
        for each in delayed_submissions:
            pickles.append(folder / f"{uuid.uuid4().hex}.pkl")
            each.set_timeout(self.parameters.get("time", 5), self.max_num_timeout)
            each.dump(pickles[-1])
        before, self.parameters = self.parameters, {**self.parameters, "map_count": len(pickles)}
        try:
            array = self._submit_command(self._submitit_command_str)
        finally:
            self.parameters = before
        ranks = list(range(array.num_tasks))
        jobs = [
            self.job_class(folder=self.folder, job_id=f"{array.job_id}_{member}", tasks=ranks)
            for member in range(len(pickles))
        ]
        for job, pickle in zip(jobs, pickles, strict=True):
            job.paths.move_temporary_file(pickle, "submitted_pickle")
        return jobs
