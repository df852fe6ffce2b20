"""The processes of a run: ranks, their helpers, environment, temporary files and output."""
