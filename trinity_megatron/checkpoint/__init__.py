"""Checkpoints: Megatron <-> Hugging Face.

``load_hf_model(path)`` and ``save_hf_model(model, path)`` are found here; they import Megatron when
they are first asked for.
"""

__all__ = ["load_hf_model", "save_hf_model"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from trinity_megatron.checkpoint import model_io

        return getattr(model_io, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
