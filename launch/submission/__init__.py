"""From flags to jobs: plans, checks, run folders, the code snapshot, the sbatch file."""
