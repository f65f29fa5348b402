"""cfmask: fine-tunes CLIP on ImageNet so that it stays robust, on Slurm clusters."""

__version__ = "0.1.0"
"""The only place that states the version. pyproject.toml reads it here; CHANGELOG.md says what it has."""
