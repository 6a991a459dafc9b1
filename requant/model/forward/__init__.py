"""The forward and backward pass in NumPy, with one layer's weights in memory at a time."""
