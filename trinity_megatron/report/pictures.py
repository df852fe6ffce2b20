"""The pictures of the report, in the order of the page: headings, captions and what they show."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from trinity_megatron.report import balance_figures, figures
from trinity_megatron.report.history import RunHistory
from trinity_megatron.telemetry.step_statistics import GRADIENT_GROUPS
from trinity_megatron.telemetry.tensorboard_log import BIAS_TAG, TOKENS_TAG


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        chapter: Heading under which it stands.
        name: File name without its ending.
        title: Its own heading.
        caption: How to read it.
        draw: Makes the figure; returns None if the run has not recorded what it shows.
        tags: The scalars and tensors it shows, to say which of them a run has not recorded.
    """

    chapter: str
    name: str
    title: str
    caption: str
    draw: Callable[[RunHistory], Figure | None]
    tags: tuple[str, ...]


_TRAINING = "Training"
_BALANCE = "Balance of the experts"
_WARNINGS = "Early warnings"
_SUPPLY = "Data and speed"

PICTURES = (
    Picture(
        _TRAINING,
        "loss",
        "Loss",
        "Mean loss of the training steps and, as dots, of the validation data. Both should fall; "
        "training far below validation is overfitting, a jump that does not come back is "
        "instability. The pale band is the range within each stretch of steps. A dashed line, if "
        "there is one, is the loss of a model that knows only how frequent each token is.",
        figures.loss_figure,
        ("lm loss", "lm loss validation"),
    ),
    Picture(
        _TRAINING,
        "schedule",
        "Learning rates and batch size",
        "Muon's learning rate applies to the matrices of the hidden layers, AdamW's to embedding, "
        "LM head and norms. A kink in another picture at the place of a kink here is the schedule.",
        figures.schedule_figure,
        ("lr/muon", "lr/adamw", "batch-size"),
    ),
    Picture(
        _BALANCE,
        "max_violation_map",
        "MaxVio of every layer",
        "One row a MoE layer, the first layer on top; time runs to the right. Pale is "
        "balanced, dark red is a layer in which one expert gets many times its share. A dark row "
        "is a layer in trouble, a dark column a step at which all layers suffered.",
        balance_figures.violation_map_figure,
        (TOKENS_TAG,),
    ),
    Picture(
        _BALANCE,
        "max_violation",
        "MaxVio over the steps",
        "0 is perfect balance, 1 means that the busiest expert gets twice its share. The dotted "
        "line is what chance alone gives, the dashed one the limit for the average layer. With "
        "more than 6 layers the three that are highest at the end have a colour.",
        balance_figures.violation_figure,
        (TOKENS_TAG,),
    ),
    Picture(
        _BALANCE,
        "expert_load",
        "Load of every expert",
        "One strip a layer, one row an expert, time to the right. White: about its share of the "
        "tokens; red: more; blue: less. A row that stays dark red is a favourite, one that stays "
        "dark blue an expert that learns nothing; a balanced run fades to white. Layers with more "
        "than 64 experts are sorted by the load at the end, busiest on top; the 4 busiest and the "
        "4 least busy fill the upper and the lower quarter of the strip, and in between a row is "
        "the mean of neighbours.",
        balance_figures.expert_load_figure,
        (TOKENS_TAG,),
    ),
    Picture(
        _BALANCE,
        "load_spread",
        "Spread of the load",
        "Load relative to the mean of its layer: the highest and lowest of all layers, and "
        "quantiles averaged over the layers; less than 0.01 is drawn there. They should close in "
        "on 1. Entropy is 1 for perfect balance. An expert without a token for 100 steps is dead.",
        balance_figures.load_spread_figure,
        (
            "moe/load_min",
            "moe/load_q10",
            "moe/load_median",
            "moe/load_q90",
            "moe/load_max",
            "moe/load_entropy",
            "moe/load_entropy_min",
            "moe/dead_experts",
            "moe/dead_experts_window",
        ),
    ),
    Picture(
        _BALANCE,
        "expert_bias",
        "Bias of the experts",
        "What is added to an expert's router score (between 0 and 1) when the experts of a token "
        "are chosen. One line an expert or, with many experts or layers, bands over the experts. "
        "The bias should level off once the load is balanced; bands that open steadily mean that "
        "it fights the router.",
        balance_figures.expert_bias_figure,
        (BIAS_TAG,),
    ),
    Picture(
        _WARNINGS,
        "logits",
        "Logits",
        "Steady growth of a highest logit is the usual first sign of instability, long before the "
        "loss shows it. The bound of the attention logits is an upper bound from the norms of "
        "queries and keys, not the logits themselves.",
        figures.logits_figure,
        (
            "router/max_logit",
            "router/mean_logit",
            "router/logit_std",
            "lm_head/max_logit",
            "lm_head/mean_logit",
            "lm_head/mean_logsumexp",
            "lm_head/z_loss",
            "attention/max_logit_bound",
        ),
    ),
    Picture(
        _WARNINGS,
        "gradient_norm",
        "Gradient norms",
        "Before clipping, on a logarithmic axis. A group that leaves the others is where trouble "
        "starts; single spikes are normal.",
        figures.gradient_norm_figure,
        ("grad-norm", *(f"grad_norm/{name}" for name in GRADIENT_GROUPS)),
    ),
    Picture(
        _SUPPLY,
        "batches",
        "Batches",
        "BatchHet is how much worse the worst micro-batch of a step is than the mean: lower is "
        "better mixed data, and 0 is a step of one micro-batch. The sequence-wise balance loss is "
        "1 when the experts are balanced within each sequence.",
        figures.data_figure,
        ("data/batch_het", "seq_load_balancing_loss"),
    ),
    Picture(
        _SUPPLY,
        "throughput",
        "Throughput",
        "Without evaluation and checkpoints. MFU is the share of the hardware's peak that the "
        "model's arithmetic reaches. With --log-straggler, the work of the slowest rank is over "
        "that of the other ranks: from 1.15 on it is a straggler.",
        figures.throughput_figure,
        ("speed/tokens_per_second", "speed/mfu"),
    ),
)
