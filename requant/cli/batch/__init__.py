"""`requant batch`: the table of jobs, its sources, the runner and what a batch remembers."""
