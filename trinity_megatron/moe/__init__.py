"""Names of before; the modules are in ``trinity_megatron.model.moe``."""
