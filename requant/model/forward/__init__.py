"""The model run in NumPy, forward and backward, with one layer's weights in memory at a time."""
