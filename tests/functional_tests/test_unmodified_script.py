"""``--spec trinity_megatron.layer_specs get_trinity_layer_spec`` in Megatron's own scripts.

``tests/reference/megatron`` has the released ``pretrain_gpt.py``; its README says from where.
"""

import hashlib
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.functional_tests.launch import ROOT, environment, sampled
from tests.functional_tests.megatron_script import (
    KINDS,
    RELEASED,
    SCRIPT,
    SCRIPTS,
    flags,
    losses,
    patched_copy,
    run,
)
from tests.unit_tests.parallel_state import one_rank_world
from trinity_megatron.checkpoint.torch_dist.reader import TorchDistReader
from trinity_megatron.telemetry.tensorboard_log import RunLog

pytestmark = pytest.mark.slow  # imports megatron.training


def read(checkpoints: Path, part: str) -> list[torch.Tensor]:
    """Tensors of the newest checkpoint whose names contain a word."""
    step = int((checkpoints / "latest_checkpointed_iteration.txt").read_text())
    reader = TorchDistReader(checkpoints / f"iter_{step:07d}")
    keys = [key for key in reader.model_tensors() if part in key]
    return [reader.read(parts) for key in keys for parts in reader.parts(key)]


def test_the_scripts_are_the_released_ones() -> None:
    for name, digest in RELEASED.items():
        assert hashlib.sha256((SCRIPTS / name).read_bytes()).hexdigest().startswith(digest), name


@pytest.fixture(scope="module", params=sampled(KINDS, "default"))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def trained(kind: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Eight steps of the script on two ranks, with a checkpoint after four and after eight."""
    folder = tmp_path_factory.mktemp("trained")
    command = [sys.executable, "-m", "trinity_megatron.cli", "run", "--nproc", "2", str(SCRIPT)]
    command += [*flags(data, folder), "--expert-model-parallel-size", "2", *KINDS[kind].split()]
    command += ["--train-iters", "8", "--save-interval", "4", "--tensorboard-log-interval", "1"]
    output = run([*command, *into(folder / "whole")], environment())
    return SimpleNamespace(command=command, folder=folder, printed=losses(output))


def into(folder: Path) -> list[str]:
    """Where a run saves, and where it logs the loss of each step; what Megatron prints in the
    second step of a start is a mean over both steps."""
    return ["--save", f"{folder}/saved", "--tensorboard-dir", f"{folder}/log"]


def test_pretrain_gpt_trains_the_spec_on_gloo_ranks(trained: SimpleNamespace) -> None:
    assert len(trained.printed) == 8 and trained.printed[-1] < trained.printed[0] - 0.5
    saved = trained.folder / "whole" / "saved"
    assert len(read(saved, "post_mlp_layernorm")) > 0  # of Trinity's layers alone
    biases = read(saved, "expert_bias")
    assert biases, "no expert bias is saved"
    for bias in biases:  # moved, by a rule whose sum over the experts is zero
        assert bias.abs().max() > 0 and abs(bias.sum()) < 1e-5, bias


def test_a_resume_of_pretrain_gpt_is_the_uninterrupted_run(trained: SimpleNamespace) -> None:
    """Bit for bit: the loss of each step, and all that the last checkpoint holds."""
    whole, resumed = trained.folder / "whole", trained.folder / "resumed"
    shutil.copytree(whole / "saved" / "iter_0000004", resumed / "saved" / "iter_0000004")
    (resumed / "saved" / "latest_checkpointed_iteration.txt").write_text("4")
    run([*trained.command, *into(resumed), "--load", f"{resumed}/saved"], environment())
    expected, found = (RunLog(folder / "log") for folder in (whole, resumed))
    for tag in ("lm loss", "grad-norm", "learning-rate"):
        values = expected.scalars(tag)
        assert list(values) == list(range(1, 9))
        assert found.scalars(tag) == {step: values[step] for step in (5, 6, 7, 8)}, tag
    values, others = (
        saved_values(folder / "saved" / "iter_0000008") for folder in (whole, resumed)
    )
    assert list(values) == list(others)
    different = [name for name in values if not is_equal(values[name], others[name])]
    assert different == [name for name in values if name.endswith(".args")]  # --load is in them


def saved_values(checkpoint: Path) -> dict[str, Any]:
    """Every value of a distributed checkpoint by its path: weights, states, generators, counts."""
    file = checkpoint.with_suffix(".pt")
    dcp_to_torch_save(checkpoint, file)
    content = torch.load(file, weights_only=False)
    file.unlink()
    values: dict[str, Any] = {}

    def collect(value: Any, name: str) -> None:
        if isinstance(value, dict | list | tuple):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                collect(item, f"{name}.{key}")
        else:
            values[name] = value

    collect(content, "")
    return values


def is_equal(value: Any, other: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dtype == other.dtype and torch.equal(value, other)
    return bool(np.array_equal(value, other) if isinstance(value, np.ndarray) else value == other)


def test_what_is_no_script_is_refused(tmp_path: Path) -> None:
    from trinity_megatron.errors import UserError
    from trinity_megatron.training.script import check_script

    assert check_script(str(SCRIPT)) == SCRIPT
    with pytest.raises(UserError, match=r"is no file. Remedy: name a script"):
        check_script(str(tmp_path))


def test_our_training_accepts_a_patched_megatron(tmp_path: Path) -> None:
    code = (
        "from megatron.core.datasets.utils import compile_helpers; compile_helpers()\n"
        "from trinity_megatron.upstream.entries import REGISTRY as r\n"
        "from trinity_megatron.upstream.registry import check_upstream\n"
        "assert not check_upstream([r['megatron.core.datasets.utils:compile_helpers']])"
    )
    path = f"{patched_copy(tmp_path)}:{ROOT}"
    run([sys.executable, "-W", "ignore", "-c", code], environment() | {"PYTHONPATH": path})


def test_a_plain_config_builds_the_same_model(tmp_path: Path) -> None:
    from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

    enter_host()
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.utils import get_model_config, unwrap_model
    from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

    from trinity_megatron.layer_specs import get_trinity_layer_spec
    from trinity_megatron.model.architecture import TRINITY_ARCHITECTURE
    from trinity_megatron.model.config import TrinityConfig
    from trinity_megatron.model.moe.bias_update import finalize_model_grads
    from trinity_megatron.training.model_builder import TrinityModelConfig

    fields = {
        **TRINITY_ARCHITECTURE,
        "transformer_impl": "local",
        "bf16": True,  # Float16Module keeps the config that the builder took before our spec ran
        "params_dtype": torch.bfloat16,
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "moe_router_topk_scaling_factor": 2.5,
        "window_size": (7, 0),
    }
    models = []
    with one_rank_world(tmp_path / "store"):
        for config_type, transformer in (
            (GPTModelConfig, TransformerConfig(**fields, moe_layer_freq=[0, 1, 1, 1])),
            (TrinityModelConfig, TrinityConfig(**fields, num_dense_layers=1)),
        ):
            config = config_type(
                transformer=transformer,
                transformer_layer_spec=get_trinity_layer_spec,
                vocab_size=96,
                seq_length=32,
                position_embedding_type="rope",
            )
            groups = ProcessGroupCollection.use_mpu_process_groups()
            (wrapped,) = GPTModelBuilder(config).build_distributed_models(
                groups, DistributedDataParallelConfig()
            )
            # What Megatron's training loop asks; the bias would never move with another function.
            assert get_model_config(wrapped).finalize_model_grads_func is finalize_model_grads
            model = unwrap_model(wrapped)
            assert isinstance(config.transformer, TrinityConfig)
            assert config.transformer is model.config
            assert model.config.finalize_model_grads_func is finalize_model_grads
            models.append(model)
        plain, ours = (model.state_dict() for model in models)
        assert list(plain) == list(ours)
        for name, tensor in ours.items():
            if isinstance(tensor, torch.Tensor):
                assert torch.equal(plain[name], tensor), name
        assert any("post_mlp_layernorm" in name for name in plain)
        tokens = torch.arange(16).view(1, -1)
        with torch.no_grad():
            logits = [model.eval()(tokens, tokens, None) for model in models]
        assert torch.equal(*logits) and logits[0].std() > 0
        models.clear()  # they hold process groups
        del model, wrapped, config, groups
