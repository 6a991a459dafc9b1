"""The solver: the plan of least loss under linear constraints, as a multiple-choice knapsack."""
