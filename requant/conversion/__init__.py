"""Conversion: from a source and a plan to the output file, its record and its verification."""
