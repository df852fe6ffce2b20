"""Exports for serving: block FP8 (vLLM, SGLang) and GGUF (llama.cpp), and reading them back."""
