"""Synthetic data: documents rewritten by a language model behind an OpenAI-compatible address."""
