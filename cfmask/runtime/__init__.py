"""What every process of a run or a conversion stands on, whatever it computes."""
