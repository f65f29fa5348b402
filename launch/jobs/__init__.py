"""The life of a job after its submission: its ranks, their supervision, restarts, and the state of its run."""
