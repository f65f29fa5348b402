"""The one path of everything that is sent to Slurm or run by submitit's local executor."""
