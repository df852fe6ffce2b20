"""The released models: names and sizes."""

import pytest

from trinity_megatron.model.presets import PRESETS, trinity_preset


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        # Totals: sums over the tensors of the hub's safetensors headers.  Active: model cards
        # and report Table 1, embeddings included, in 1e9.
        ("nano", 6_120_003_328, 1.024),
        ("mini", 26_123_974_400, 3.475),
        ("large", 398_635_286_016, 13.372),
    ],
)
def test_sizes_of_the_released_models(name: str, total: int, active: float) -> None:
    config = trinity_preset(name)
    assert config.num_parameters() == total
    # Given to three digits after the point.
    assert config.num_active_parameters() / 1e9 == pytest.approx(active, abs=5.01e-4)
    embeddings = config.num_active_parameters() - config.num_active_parameters(embeddings=False)
    assert embeddings == 2 * config.vocab_size * config.hidden_size


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="'huge' is unknown. Remedy.*") as error:
        trinity_preset("huge")
    assert all(name in str(error.value) for name in PRESETS)
