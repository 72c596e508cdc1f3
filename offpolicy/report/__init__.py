"""From many runs to numbers one can compare: finding runs, and tables over tasks and seeds."""
