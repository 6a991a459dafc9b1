"""Many sources, many budgets each: the table of jobs, its sources, the outputs' names and what a batch remembers."""
