"""Strings from plans and results."""
