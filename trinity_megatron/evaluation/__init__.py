"""What a trained model does: generation, and parity with transformers."""
