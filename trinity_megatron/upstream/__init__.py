"""The one registry of what is replaced in Megatron and its libraries."""
