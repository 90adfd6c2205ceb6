"""Launchers: they start jobs; a job does the stages of its runs; the disk says what came of it."""
