"""The grid: its language, its expansion into runs, and the plan of what is missing."""
