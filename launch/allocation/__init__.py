"""What a job asks for: the flags, the cluster file, and the allocation that they add up to."""
