"""``TrinityConfig``: Megatron's ``TransformerConfig`` plus only what Megatron lacks.

Source: Trinity Large technical report (arXiv 2602.17004), Table 1 and section 2; transformers
``models/afmoe``.
"""

# No postponed annotations: Megatron's ArgumentGroupFactory reads the types of the fields.

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Literal

from megatron.core.transformer.transformer_config import TransformerConfig

from trinity_megatron.errors import UserError
from trinity_megatron.model.architecture import count_dense_layers, find_other_architecture
from trinity_megatron.model.config_checks import check_config
from trinity_megatron.model.moe.expert_bias import DEFAULT_MOMENTUM
from trinity_megatron.model.size_rules import check_sizes

BiasUpdateRule = Literal["smebu", "sign", "linear", "none"]

# Fields with a flag of their own; Megatron has flags for the others that are set by flags.
FLAG_FIELDS = (
    "num_dense_layers",
    "global_attn_every_n_layers",
    "scale_embeddings",
    "moe_router_bias_update_rule",
    "moe_router_bias_momentum",
    "moe_router_bias_clamp_scale",
    "moe_router_bias_warmup_steps",
    "moe_router_bias_freeze_step",
    "lm_head_z_loss_coeff",
)


@dataclass
class TrinityConfig(TransformerConfig):
    """Configuration of a Trinity (AFMoE) model.

    ``num_dense_layers`` and ``global_attn_every_n_layers`` are the only places where the layer
    pattern is stated: ``moe_layer_freq``, ``no_rope_freq`` and ``window_attn_skip_freq`` follow.

    Raises:
        UserError: A field contradicts another one or the architecture; the message names the
            field, its value and the remedy.
    """

    vocab_size: int = 200192
    """Rows of the embedding and of the LM head, padding included."""

    tokenizer_vocab_size: int | None = None
    """Rows that a token can have: ids below it.  The others are Megatron's padding; None where it
    is not known."""

    num_dense_layers: int = 0
    """Leading layers with a dense MLP; the others are MoE layers."""

    global_attn_every_n_layers: int = 4
    """Layer i (1-based) is global (no window, no RoPE) if i is a multiple of this, else local."""

    rotary_base: int = 10000
    """Base of the rotary embedding of the local layers (theta)."""

    max_position_embeddings: int = 131072
    """Longest context that the model is meant for; nothing is allocated by it."""

    set_matrices_aside: bool = False
    """A layer keeps the shapes of its matrices alone, until they have their places in the buffers
    of a wrapper; see `initialization.set_matrices_aside`."""

    scale_embeddings: bool = field(
        default=True,
        metadata={
            "argparse_meta": {
                "arg_names": ["--no-scale-embeddings"],
                "help": "Do not multiply the embedding by the square root of the hidden size.",
            }
        },
    )
    """Multiply the embedding by sqrt(d) (report eq 39; ``mup_enabled`` in transformers)."""

    moe_router_bias_update_rule: BiasUpdateRule = "smebu"
    """Rule of the expert bias: ``smebu`` (report eq 23-28), ``sign`` (centred sign, 19-22),
    ``linear`` (SMEBU without tanh) or ``none`` (the bias stays)."""

    moe_router_bias_update_rate: float = 5e-4
    """SMEBU's lambda, or the rate of another rule (report section 2.2; Megatron's is 1e-3)."""

    moe_router_bias_momentum: float | None = None
    """Beta, the momentum of the bias update (report eq 27); None for the rule's own: 0.5 for
    ``smebu``, 0 for the others."""

    moe_router_bias_clamp_scale: float = 2.0
    """SMEBU's kappa, the scale inside the tanh (report eq 24)."""

    moe_router_bias_warmup_steps: int = 0
    """Steps over which the update rate of the bias rises linearly from zero."""

    moe_router_bias_freeze_step: int | None = None
    """Last step that moves the bias; None to move it to the end."""

    lm_head_z_loss_coeff: float = 0.0
    """Coefficient of the mean squared logsumexp of the LM head's logits (report section 3.3)."""

    init_seed: int = 1234
    """Seed of the parameter initialisation, which does not depend on the parallel layout."""

    finalize_model_grads_func: Callable | None = None

    def __post_init__(self) -> None:
        """Check the fields, derive the layer pattern and run Megatron's own checks."""
        check_sizes(partial(getattr, self), lambda name: f"{name}={getattr(self, name)!r}")
        check_config(self)
        self.moe_layer_freq = [
            int(layer >= self.num_dense_layers) for layer in range(self.num_layers)
        ]
        pattern = [self.is_global_layer(layer + 1) for layer in range(self.num_layers)]
        self.no_rope_freq = [int(is_global) for is_global in pattern]
        self.window_attn_skip_freq = [int(not is_global) for is_global in pattern]
        # Every matrix is drawn by initialization.initialize_parameters after the build, so that
        # the values do not depend on the layout; the builders' own draws would be thrown away.
        self.perform_initialization = False
        self.init_method_std = self.initializer_std
        super().__post_init__()

    @classmethod
    def from_transformer_config(cls, config: TransformerConfig) -> "TrinityConfig":
        """Turn a plain Megatron config (an unmodified ``pretrain_gpt.py``) into a Trinity one.

        Args:
            config: Finished Megatron config; returned as it is if it is a ``TrinityConfig``.

        Raises:
            UserError: The config contradicts the architecture, e.g. a softmax router.
        """
        if isinstance(config, cls):
            return config
        values = {f.name: getattr(config, f.name) for f in fields(TransformerConfig)}
        if wrong := find_other_architecture(config):
            raise UserError(
                "The Trinity layer spec was asked for with a config of another architecture: "
                + ", ".join(f"{k}={v!r} (Trinity: {ours!r})" for k, (v, ours) in wrong.items())
                + ". Set the matching Megatron flags, or use examples/pretrain_trinity.py --preset."
            )
        values["num_dense_layers"] = count_dense_layers(
            values["moe_layer_freq"], num_layers=config.num_layers
        )
        # Derived by __post_init__ once more; their finished values would be refused as input.
        for name in ("init_method", "output_layer_init_method", "embedding_init_method"):
            values[name] = None
        return cls(**values)

    @property
    def initializer_std(self) -> float:
        """Sigma of the truncated normal of every matrix: 0.5/sqrt(d).  Source: report eq 37-38."""
        return 0.5 / math.sqrt(self.hidden_size)

    @property
    def post_norm_gain(self) -> float:
        """Initial gain of the two post-norms: 1/sqrt(L).  Source: report eq 34-35."""
        return self.num_layers**-0.5

    @property
    def embedding_multiplier(self) -> float:
        """Factor on the embedding: sqrt(d), or 1 without ``scale_embeddings``.

        Source: report eq 39.
        """
        return math.sqrt(self.hidden_size) if self.scale_embeddings else 1.0

    @property
    def bias_momentum(self) -> float:
        """Beta of the bias update: the one that is set, or the rule's own."""
        if self.moe_router_bias_momentum is not None:
            return self.moe_router_bias_momentum
        return DEFAULT_MOMENTUM[self.moe_router_bias_update_rule]

    @property
    def num_moe_layers(self) -> int:
        """Number of layers with routed experts."""
        return self.num_layers - self.num_dense_layers

    def is_global_layer(self, layer_number: int) -> bool:
        """Whether the layer (1-based) attends without window and without RoPE."""
        return layer_number % self.global_attn_every_n_layers == 0

    def num_parameters(self) -> int:
        """Number of parameters of the whole model, by arithmetic (nothing is built).

        The expert bias is counted, as in the released checkpoints.
        """
        return self._count(self.num_moe_experts or 0)

    def num_active_parameters(self, *, embeddings: bool = True) -> int:
        """Number of parameters that one token uses.

        Args:
            embeddings: Count the embedding and the LM head (the convention of the model cards).
        """
        active = self._count(self.moe_router_topk)
        return active if embeddings else active - 2 * self.vocab_size * self.hidden_size

    def _count(self, num_experts: int) -> int:
        d, head_dim = self.hidden_size, self.kv_channels
        assert head_dim is not None and self.num_query_groups is not None
        query = self.num_attention_heads * head_dim * d  # the same for q, gate and o
        attention = 3 * query + 2 * self.num_query_groups * head_dim * d + 2 * head_dim
        norms = 4 * d
        dense = 3 * d * (self.ffn_hidden_size or 0)
        moe = 0
        if self.num_moe_layers:
            shared = 3 * d * (self.moe_shared_expert_intermediate_size or 0)
            routed = num_experts * 3 * d * (self.moe_ffn_hidden_size or 0)
            total = self.num_moe_experts or 0
            moe = total * d + total + shared + routed  # router, expert bias, experts
        layers = self.num_layers * (attention + norms)
        layers += self.num_dense_layers * dense + self.num_moe_layers * moe
        return 2 * self.vocab_size * d + d + layers
