"""The Trinity (AFMoE) model on Megatron-Core: config, layer specs and modules."""
