"""``trinity-megatron generate``: continue a prompt with the model of a Megatron checkpoint.

The weights go from the checkpoint into transformers' model in memory, whose generation (cache,
sampling, devices) is used as it is; the table of the conversion makes that exact.  The expert bias
stays in fp32, also where transformers' own loading in bf16 would round it.
"""

import math
from pathlib import Path
from typing import Any

import torch

from trinity_megatron.checkpoint.hf_assets import check_tokenizer, find_assets, find_tokenizer
from trinity_megatron.checkpoint.model_args import config_from_args
from trinity_megatron.checkpoint.torch_dist.reader import TorchDistReader
from trinity_megatron.checkpoint.transformers_model import load_transformers_model
from trinity_megatron.checkpoint.vocabulary import find_vocab_size
from trinity_megatron.errors import UserError


def generate(
    load: Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    tokenizer: Path | None = None,
) -> str:
    """Continue a prompt.

    Args:
        load: What ``--save`` was, or the folder of one iteration.
        prompt: The text to continue.
        max_new_tokens: Length of the continuation in tokens; it ends before at an end of text.
        temperature: 0 takes the likeliest token.
        tokenizer: Folder of the tokenizer; that of the run if None.

    Returns:
        The continuation, without the prompt.

    Raises:
        UserError: The checkpoint or its tokenizer is missing or damaged.
    """
    from transformers import AutoTokenizer

    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature {temperature} is no temperature. Remedy: 0 or more.")
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens} is below 1. Remedy: give at least 1.")
    source = TorchDistReader(load)
    assets = find_assets(load)
    folder = tokenizer or find_tokenizer(source.folder, source.args)
    if tokenizer is not None and not (tokenizer / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer {tokenizer} holds no tokenizer.json. Remedy: its folder.")
    if folder is None or not (folder / "tokenizer.json").is_file():
        raise UserError(f"{load} has no tokenizer. Remedy: --tokenizer DIR.")
    check_tokenizer(load, folder)
    encoder: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokens = encoder(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    if not tokens.numel():
        raise UserError(f"--prompt {prompt!r} has no tokens. Remedy: give some text.")
    config = config_from_args(source.args)
    config.tokenizer_vocab_size = find_vocab_size(source.args, folder)
    model = load_transformers_model(source, config, assets=assets, name=str(source.folder))
    if torch.cuda.is_available():
        model = model.cuda()
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature:
        sampling["temperature"] = temperature
    output = model.generate(
        tokens.to(model.device),
        attention_mask=torch.ones_like(tokens, device=model.device),
        max_new_tokens=max_new_tokens,
        eos_token_id=encoder.eos_token_id,
        pad_token_id=encoder.eos_token_id,
        **sampling,
    )
    return encoder.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)
