"""MaxVio that chance gives, against a simulation."""

import numpy as np
import pytest

from trinity_megatron.report.balance_windows import sampling_noise


@pytest.mark.parametrize(
    ("tokens", "num_experts"), [(0.5, 32), (4.0, 256), (128.0, 32), (1e5, 256)]
)
def test_noise_is_that_of_a_router_that_draws_lots(tokens: float, num_experts: int) -> None:
    generator = np.random.default_rng(0)
    share = np.full(num_experts, 1 / num_experts)
    draws = generator.multinomial(round(tokens * num_experts), share, size=4000)
    simulated = draws.max(axis=1) / tokens - 1
    error = simulated.std() / np.sqrt(len(draws))
    # Beyond the simulation's own error, a multinomial has 1/N less variance than Poisson counts.
    allowed = 4 * error + simulated.mean() / num_experts
    assert sampling_noise(tokens, num_experts) == pytest.approx(simulated.mean(), abs=allowed)


def test_noise_of_a_layer_without_tokens() -> None:
    assert sampling_noise(0.0, 8) == 0.0
