"""Our linear layers without gradients against Megatron's."""

import pytest
import torch


@pytest.mark.parametrize("rows", [1, 24])
def test_the_product_equals_megatrons(rows: int, one_rank: None) -> None:
    from megatron.core.tensor_parallel import layers

    from trinity_megatron.model import linear
    from trinity_megatron.model.presets import trinity_preset

    config = trinity_preset("tiny", transformer_impl="local", perform_initialization=False)
    options = {"config": config, "init_method": torch.nn.init.normal_, "bias": False}
    options |= {"skip_bias_add": True}
    for name, own in (
        ("ColumnParallelLinear", {"gather_output": False}),
        ("RowParallelLinear", {"input_is_parallel": True}),
    ):
        theirs, ours = (getattr(of, name)(48, 80, **options, **own) for of in (layers, linear))
        torch.nn.init.normal_(theirs.weight)
        ours.load_state_dict(theirs.state_dict())
        tokens = torch.randn(rows, 2, 48, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            assert torch.equal(ours(tokens)[0], theirs(tokens)[0])
        # With gradients it is Megatron's.
        ours(tokens)[0].square().sum().backward()
        theirs(tokens)[0].square().sum().backward()
        assert torch.equal(ours.weight.grad, theirs.weight.grad)
