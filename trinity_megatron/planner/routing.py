"""What learned routing costs: the fullest expert-parallel rank sets the pace of all."""

from math import log, sqrt

from trinity_megatron.planner.layout import Layout
from trinity_megatron.planner.model_description import ModelDescription


def rank_imbalance(model: ModelDescription, layout: Layout, spread: float) -> float:
    """Expected rows of the fullest expert-parallel rank over the mean.

    The loads of experts vary by ``spread``; a rank's load is the sum of its experts' and varies
    less by the root of their number; of n normal numbers the greatest is about sqrt(2 log n)
    deviations above the mean.

    Args:
        model: Its number of experts.
        layout: Its expert-parallel size.
        spread: Standard deviation of the experts' loads over their mean.
    """
    ranks = layout.expert_model_parallel_size
    if ranks == 1:
        return 1.0
    experts = model.num_moe_experts / ranks
    return min(float(ranks), 1 + spread * sqrt(2 * log(ranks) / experts))
