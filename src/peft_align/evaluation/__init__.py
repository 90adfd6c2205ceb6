"""Evaluation: benchmarks of one checkpoint, each scored once and kept with its samples."""
