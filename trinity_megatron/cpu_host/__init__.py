"""A CPU as the host of a training: what answers for CUDA, and how to be fast there."""
