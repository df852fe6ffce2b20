"""Muon and AdamW on the shards of Megatron-FSDP."""
