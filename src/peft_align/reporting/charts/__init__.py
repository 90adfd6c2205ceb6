"""The report's charts: one module for each kind of question."""
