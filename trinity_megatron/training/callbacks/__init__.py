"""What is called by the training loop."""
