"""What follows from the fields of a ``TrinityConfig``."""

from trinity_megatron.model.presets import trinity_preset


def test_pattern_of_the_layers() -> None:
    config = trinity_preset("large", num_layers=10)
    # Source: report 2.1: three local layers with RoPE, then a global one without.
    is_global = [0, 0, 0, 1, 0, 0, 0, 1, 0, 0]
    assert config.no_rope_freq == is_global
    assert config.window_attn_skip_freq == [1 - value for value in is_global]
    assert config.moe_layer_freq == [0] * 6 + [1] * 4


def test_the_momentum_is_that_of_the_rule() -> None:
    # The sign rule of the report has none, also where the preset's own rule is SMEBU.
    found = {
        rule: trinity_preset("tiny", moe_router_bias_update_rule=rule).bias_momentum
        for rule in ("smebu", "sign", "linear", "none")
    }
    assert found == {"smebu": 0.5, "sign": 0.0, "linear": 0.0, "none": 0.0}
    assert trinity_preset("nano").bias_momentum == 0.0
    assert trinity_preset("large").bias_momentum == 0.5
    sign = trinity_preset("tiny", moe_router_bias_update_rule="sign", moe_router_bias_momentum=0.9)
    assert sign.bias_momentum == 0.9
