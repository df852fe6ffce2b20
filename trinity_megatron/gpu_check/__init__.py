"""``trinity-megatron gpu-check``: what a machine's GPU computes, and how fast."""
