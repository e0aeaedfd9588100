"""The reproduction: the paper's numbers, ours beside them, the plan, its times, the report."""
