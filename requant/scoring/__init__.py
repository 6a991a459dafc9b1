"""Scoring: the predicted harm of each type to each tensor, from calibration, gradients and trial encodings."""
