"""llama.cpp in an environment of its own: log-probabilities and tokens of a GGUF file.

Needs cyllama (llama.cpp in a wheel) and numpy, and nothing of ours.  Usage::

    python llama_cpp_worker.py model.gguf question.json answer.npz
"""

import json
import sys
from pathlib import Path

import numpy as np
from cyllama.llama import llama_cpp


def log_probabilities(model: llama_cpp.LlamaModel, tokens: list[int]) -> np.ndarray:
    """Of every token at every place; fp64 ``[s, vocab]``."""
    settings = llama_cpp.LlamaContextParams()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(256, len(tokens))
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = 0  # F32
    settings.flash_attn_type = 0
    context = llama_cpp.LlamaContext(model, settings)
    batch = llama_cpp.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
    batch.add_sequence(tokens, 0, True)
    context.decode(batch)
    rows = [np.array(context.get_logits_ith(place), np.float64) for place in range(len(tokens))]
    logits = np.stack(rows)
    highest = logits.max(-1, keepdims=True)
    return logits - highest - np.log(np.exp(logits - highest).sum(-1, keepdims=True))


def main(gguf: str, question: str, answer: str) -> None:
    """Answer a question: ``{"tokens": [[..]], "lines": [..]}``."""
    asked = json.loads(Path(question).read_text(encoding="utf-8"))
    llama_cpp.disable_logging()
    llama_cpp.llama_backend_init()
    settings = llama_cpp.LlamaModelParams()
    settings.n_gpu_layers = 0
    model = llama_cpp.LlamaModel(gguf, settings)
    vocab = model.get_vocab()
    found = [vocab.tokenize(line, False, False) for line in asked["lines"]]
    scores = [log_probabilities(model, tokens) for tokens in asked["tokens"]]
    np.savez(
        answer,
        log_probabilities=np.stack(scores),
        ids=np.array([number for ids in found for number in ids], np.int64),
        lengths=[len(ids) for ids in found],
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
