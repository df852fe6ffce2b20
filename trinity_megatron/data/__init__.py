"""Data: preparing a corpus (corpus, tokenizer, manifest, dataset) and reading it in training.

Nothing is imported here, so that reading documents in training needs no tokenizer library.
"""
