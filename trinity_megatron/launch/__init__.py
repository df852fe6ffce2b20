"""Start the ranks of a run."""
