"""Conversations: reading them, and encoding them with a tokenizer's chat template."""
