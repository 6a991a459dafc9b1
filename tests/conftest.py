"""Makes tests/ importable (ggml, blocks, compare), whichever test is collected first."""

from hypothesis import settings

# scripts/mutation.py: a few examples, always the same
settings.register_profile("mutation", max_examples=20, deadline=None, derandomize=True, database=None)
