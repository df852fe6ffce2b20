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

    branch_from: str | None = field(default=None, metadata={"argparse_meta": {"metavar": "DIR"}})
    """Begin at a checkpoint of the run in DIR, with its optimizer and its position in the data, and
    anneal its learning rate to 0.  That run is only read, and may go on."""

    branch_step: int | None = field(default=None, metadata={"argparse_meta": {"metavar": "N"}})
    """The step to branch from.  Default: the newest (on one rank)."""

    anneal_tokens: str | None = field(default=None, metadata={"argparse_meta": {"metavar": "T"}})
    """Tokens of the branch, e.g. 100B; rounded up to whole steps."""

    anneal_style: str = field(
        default="linear", metadata={"argparse_meta": {"choices": ["linear", "cosine"]}}
    )
    """How the learning rate of the branch goes to 0."""

    keep_every: str | None = field(default=None, metadata={"argparse_meta": {"metavar": "T"}})
    """With --keep-last, keep the first checkpoint after every T tokens, e.g. 100B, for ever."""

    skip_spikes: float | None = field(
        default=None, metadata={"argparse_meta": {"metavar": "SIGMA"}}
    )
    """Skip a step, on all ranks, whose loss or gradient norm lies more than SIGMA standard
    deviations above the mean of the steps of --spike-window, or is NaN or infinite; 6 is usual.
    Default: skip none, and end at a NaN."""

    spike_window: int = field(default=128, metadata={"argparse_meta": {"metavar": "N"}})
    """Number of steps that --skip-spikes compares with; it begins when half of them are done."""

    rewind_on_spike: bool = False
    """Where --skip-spikes has skipped ten steps in a row, end with exit code 1; the next start goes
    back to a checkpoint before them and passes over the batches up to there."""

    on_damage: str = field(
        default="fail", metadata={"argparse_meta": {"choices": ["fail", "previous"]}}
    )
    """What to do where the latest checkpoint of the run is damaged: end and name the file, or set
    it aside and go on from the newest whole one before it."""

    on_failed_save: str = field(
        default="continue", metadata={"argparse_meta": {"choices": ["continue", "fail"]}}
    )
    """What to do where the disk refuses a save: say so and train on, as long as a later save
    succeeds, or end at once."""

    check_replicas: int | None = field(default=None, metadata={"argparse_meta": {"metavar": "N"}})
    """Compare checksums of parameters, expert bias and counters over data-parallel ranks every N
    steps and before each save; end where a rank differs.  Default: do not."""

    evaluate_every: int | None = field(default=None, metadata={"argparse_meta": {"metavar": "N"}})
    """Score the model on --evaluate-tasks after every N steps, as trinity-megatron evaluate does.
    Default: do not."""

    evaluate_tasks: str | None = field(
        default=None, metadata={"argparse_meta": {"metavar": "NAMES"}}
    )
    """Tasks of lm-evaluation-harness, with commas between them; also niah and perplexity."""

    evaluate_data: str | None = field(default=None, metadata={"argparse_meta": {"metavar": "DIR"}})
    """Task files and data of --evaluate-tasks; nothing is downloaded."""

    evaluate_limit: int | None = field(default=None, metadata={"argparse_meta": {"metavar": "N"}})
    """Only the first N documents of each task."""

    hang_seconds: float | None = field(
        default=None, metadata={"argparse_meta": {"metavar": "SECONDS"}}
    )
    """Name a rank that hangs, with the stacks of all, when nothing has happened for so long.
    Default: 180, or half of the time after which collectives give up
    (--distributed-timeout-minutes), which ends the run."""

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
