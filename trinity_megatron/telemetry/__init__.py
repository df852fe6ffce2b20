"""Metrics of a run and where they go: TensorBoard, W&B."""
