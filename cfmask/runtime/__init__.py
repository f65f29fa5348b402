"""What every process of a run or a conversion needs."""
