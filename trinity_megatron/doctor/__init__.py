"""``trinity-megatron gpu-check``: does the GPU path of this machine compute the right thing?"""
