"""From arrays to numbers: pure functions, no file and no run."""
