"""The client for Slurm's commands; no other package runs them."""
