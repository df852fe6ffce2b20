"""The optional package ``gguf`` of llama.cpp."""

from types import ModuleType

from trinity_megatron.errors import UserError


def import_gguf() -> ModuleType:
    """The package.

    Raises:
        UserError: It is not installed, or does not know the architecture.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            f"--format gguf needs the package gguf, which cannot be imported ({error}). Remedy: "
            "pip install 'gguf>=0.18'."
        ) from error
    if not hasattr(gguf.MODEL_ARCH, "AFMOE"):
        raise UserError(
            "--format gguf: the installed package gguf does not know the architecture afmoe. "
            "Remedy: pip install --upgrade 'gguf>=0.18'."
        )
    return gguf
