"""Compensated encoding: the rounding of every weight makes up for the errors of those before it, layer by layer."""
