"""The data set and the model of tools/demo.py, both made from a seed."""
