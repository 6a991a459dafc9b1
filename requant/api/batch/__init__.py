"""Batches: the job file, its sources, the cache of scores and plans, and the runner of its conversions."""
