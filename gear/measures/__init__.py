"""Measures: pure functions from arrays to numbers, without files and runs."""
