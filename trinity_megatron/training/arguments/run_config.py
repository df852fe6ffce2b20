"""Flags of this package that are no fields of the model."""

# No postponed annotations: Megatron's ArgumentGroupFactory reads the types of the fields.

from dataclasses import dataclass, field

from trinity_megatron.model.presets import PRESETS
from trinity_megatron.optimizer.register import MOMENTUM_DTYPES

_KNOWN = ", ".join(f"{name}: {preset.description}" for name, preset in PRESETS.items())


@dataclass
class RunConfig:
    """Folders and rules of a run."""

    preset: str = field(
        default="tiny",
        metadata={
            "argparse_meta": {
                "help": f"Model and recipe. {_KNOWN}; or the folder of a Hugging Face checkpoint."
            }
        },
    )
    """Model and recipe: a preset, or the folder of a Hugging Face checkpoint."""

    data: str | None = None
    """Folder made by trinity-megatron prepare-data, or the YAML file of a mixture of corpora."""

    out: str | None = None
    """Folder of the run: checkpoints, logs, pictures."""

    keep_last: int | None = field(default=None, metadata={"argparse_meta": {"metavar": "N"}})
    """Keep the newest N complete checkpoints in --save and delete older ones after each save;
    multiples of --save-retain-interval are kept too.  Default: keep all."""

    allow_data_change: bool = False
    """Resume with other training data than those of the checkpoint."""

    refuse_long_conversations: bool = False
    """End the run if a conversation is longer than --seq-length.  Default: cut it."""

    allow_upstream_changes: bool = False
    """Train although the installed Megatron-Core differs in what this package replaces."""

    verify_checksums: bool = field(
        default=True,
        metadata={
            "argparse_meta": {
                "arg_names": ["--no-verify-checksums"],
                "help": "Load a checkpoint without comparing the checksums it was saved with.",
            }
        },
    )
    """Compare a checkpoint that is loaded with the checksums it was saved with."""

    muon_momentum_dtype: str = field(
        default="fp32", metadata={"argparse_meta": {"choices": sorted(MOMENTUM_DTYPES)}}
    )
    """What Muon keeps its momentum in."""
