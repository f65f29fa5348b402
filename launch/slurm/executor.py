"""submitit's Slurm executor with our own sbatch: submitit's takes options from the environment, and does not check
whether a job was accepted if sbatch's answer was lost."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, JobPaths

from launch.slurm.client import SlurmError
from launch.slurm.control import cancel
from launch.slurm.submission import SubmissionUnknown, submit

_CLEAN = "unset ${!SRUN_*} SLURM_EXPORT_ENV SLURM_KILL_BAD_EXIT SLURM_WAIT"
"""srun reads options from these variables, which a login shell on the node may have set."""


class SlurmExecutor(submitit.SlurmExecutor):
    """submitit's executor; ``submit_array`` submits a single function as a job and several as an array."""

    def __init__(self, folder: str | Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self.parameters["wckey"] = None  # submitit's default, "submitit", is refused by sites that check wckeys
        self._accepted: str | None = None

    def batch_script(self, members: int = 1) -> str:
        """The batch script that would be submitted for this number of functions."""
        with self._array_of(members):
            return self._make_submission_file_text(self._submitit_command_str, "")

    @contextmanager
    def _array_of(self, members: int) -> Iterator[None]:
        before = self.parameters
        self.parameters = before | ({"map_count": members} if members > 1 else {})
        try:
            yield
        finally:
            self.parameters = before

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        # submitit always writes a time limit; "partition" stands for the partition's default.
        text = super()._make_submission_file_text(command, uid)
        lines = [line for line in text.splitlines() if line != "#SBATCH --time=partition"]
        options = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
        return "\n".join([*lines[: options + 1], "", _CLEAN, *lines[options + 1 :]])

    def _submit_command(self, command: str) -> submitit.Job[Any]:
        script = JobPaths.get_first_id_independent_folder(self.folder) / f".submission_file_{uuid.uuid4().hex}.sh"
        try:
            # Readable by its owner only: setup lines of a cluster file may contain tokens.
            with open(os.open(script, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(self._make_submission_file_text(command, ""))
            number = self._accepted = submit(script)
        except SubmissionUnknown:
            raise  # the script stays: its job is found by it
        except (SlurmError, OSError):
            script.unlink(missing_ok=True)
            raise
        job = self.job_class(folder=self.folder, job_id=number, tasks=list(range(self._num_tasks())))
        job.paths.move_temporary_file(script, "submission_file", keep_as_symlink=True)
        return job

    def _internal_process_submissions(self, delayed_submissions: Sequence[DelayedSubmission]) -> list[Any]:
        self._accepted = None
        try:
            if len(delayed_submissions) == 1:
                return super()._internal_process_submissions(list(delayed_submissions))
            return self._submit_members(delayed_submissions)
        except OSError as error:
            if self._accepted is None:
                raise
            with suppress(SlurmError):
                cancel(self._accepted)  # without its pickle it could only fail
            raise SubmissionUnknown(
                f"Slurm has accepted job {self._accepted}, but its files in {self.folder} cannot be written "
                f"({error.strerror}), so it was cancelled. Free some space and repeat the command."
            ) from None

    def _submit_members(self, functions: Sequence[DelayedSubmission]) -> list[Any]:
        """submitit's own code for arrays creates an executor of its own class, which would call sbatch directly."""
        folder = JobPaths.get_first_id_independent_folder(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        pickles = [folder / f"{uuid.uuid4().hex}.pkl" for _ in functions]
        for function, pickle in zip(functions, pickles, strict=True):
            function.set_timeout(self.parameters.get("time", 5), self.max_num_timeout)
            function.dump(pickle)
        with self._array_of(len(pickles)):
            array = self._submit_command(self._submitit_command_str)
        ranks = list(range(array.num_tasks))
        jobs = [
            self.job_class(folder=self.folder, job_id=f"{array.job_id}_{member}", tasks=ranks)
            for member in range(len(pickles))
        ]
        for job, pickle in zip(jobs, pickles, strict=True):
            job.paths.move_temporary_file(pickle, "submitted_pickle")
        return jobs
