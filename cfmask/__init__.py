"""cfmask: fine-tunes CLIP on ImageNet so that it stays robust, on Slurm clusters."""
