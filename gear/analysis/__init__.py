"""What the trained networks have learned: pure functions from arrays to numbers."""
