"""Reporting: the result table, from the records alone; imports no torch and no pandas."""
