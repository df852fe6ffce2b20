"""What a run leaves behind: metrics, pictures, the W&B run."""
