"""Makes tests/ importable (ggml, blocks, compare), whichever test is collected first."""
