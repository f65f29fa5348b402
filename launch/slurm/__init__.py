"""The one client of Slurm's commands."""
