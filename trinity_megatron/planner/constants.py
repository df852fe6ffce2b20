"""The numbers of the step model that no table of kernels gives: one set for all models and GPUs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """What a training reaches of what kernels reach alone.

    Attributes:
        sustained: Rate of a matrix product in a long run over that of the table: power, and caches
            that other kernels have filled.
        memory: Share of the memory bandwidth that elementwise kernels reach.
        backward_attention: Time of attention's backward pass over that of the forward pass.
        sink_attention: Time of bf16 attention with a learnable sink over that without.
    network: Share of the network's bandwidth that a collective reaches.
        hidden: Share of communication that disappears behind computation that runs beside it.
        launch: Seconds for which the host is busy with one launch of a kernel, autograd included.
        layer_launches: Kernels of a layer, forward and backward, besides those of each expert.
        expert_launches: Kernels for each local expert: two grouped products, forward and twice
            backward.
        bias_launches: More of them for each local expert with biases.
        fp8_launches: More of them for each local expert in FP8: quantization.
        learned_spread: Standard deviation of the experts' loads over their mean, [a balanced run,
            a run that is not]: under learned routing the fullest rank waits for nobody.
        muon: Rate of Newton-Schulz over that of a matrix product of its size: batches, SYRK.
    """

    sustained: float = 0.80
    memory: float = 0.8
    backward_attention: float = 3.0
    sink_attention: float = 6.0
    network: float = 0.85
    hidden: float = 0.8
    launch: float = 10e-6
    layer_launches: int = 500
    expert_launches: int = 6
    bias_launches: int = 14
    fp8_launches: int = 30
    learned_spread: tuple[float, float] = (0.03, 1.0)
    muon: float = 0.7


CONSTANTS = Constants()
