"""Several corpora in one run: which sample comes from which, by consumed tokens."""
