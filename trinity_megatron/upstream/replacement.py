"""An entry of the registry."""

from dataclasses import dataclass

_SOURCES = {
    "megatron": "https://github.com/NVIDIA/Megatron-LM/blob/core_v0.19.2/",
    "torch": "https://github.com/pytorch/pytorch/blob/v2.13.0/",
    "tensorboard": "https://github.com/tensorflow/tensorboard/blob/2.21/",
    "lm_eval": "https://github.com/EleutherAI/lm-evaluation-harness/blob/v0.4.13/",
}


@dataclass(frozen=True)
class Replacement:
    """One upstream attribute that this package replaces.

    Attributes:
        target: ``module:attribute`` or ``module:Class.attribute``.
        reason: Why no config field, spec slot or subclass hook is enough.
        fingerprint: First twelve hexadecimal digits of the SHA-256 of the source of ``source_of``.
            Empty for packages other than Megatron.
        source_of: The function or class that the replacement depends on, if it is not the target.
        patched: The fingerprint of the source with a patch of ``patches/``, which is accepted too.
    """

    target: str
    reason: str
    fingerprint: str = ""
    source_of: str = ""
    patched: str = ""

    @property
    def link(self) -> str:
        """Address of the upstream file."""
        module = self.target.partition(":")[0]
        return f"{_SOURCES[module.partition('.')[0]]}{module.replace('.', '/')}.py"
