"""Conversations in sequences: what is packed, in which order, and the loss of what is packed."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

enter_host()

from megatron.core.datasets.utils import Split  # noqa: E402
from megatron.training import global_vars  # noqa: E402
from torch.utils.data import default_collate  # noqa: E402

from trinity_megatron.data.chat.prepare import _ConversationWriter  # noqa: E402
from trinity_megatron.errors import UserError  # noqa: E402
from trinity_megatron.model.attention.rope import rope_on_device  # noqa: E402
from trinity_megatron.training import forward_step  # noqa: E402
from trinity_megatron.training.arguments.chat_checks import (  # noqa: E402
    check_chat_sources,
    finish_chat,
)
from trinity_megatron.training.datasets.chat import (  # noqa: E402
    ChatDataset,
    has_modes,
    pack,
    pack_epochs,
)
from trinity_megatron.training.datasets.epoch_order import EpochOrderConfig  # noqa: E402

VOCAB_SIZE, LENGTH = 96, 64
Conversation = tuple[list[int], list[bool]]


def make_conversations(*lengths: int) -> list[Conversation]:
    """Random tokens other than 0; a context, then an answer, and so on."""
    generator = np.random.RandomState(sum(lengths))
    made = []
    for length in lengths:
        flips = np.cumsum(generator.rand(length) < 0.3) % 2 == 1
        flips[0], flips[-1] = False, True
        made.append((generator.randint(1, VOCAB_SIZE, length).tolist(), flips.tolist()))
    return made


def write_set(prefix: Path, conversations: list[Conversation]) -> str:
    writer = _ConversationWriter(prefix, VOCAB_SIZE)
    for tokens, mask in conversations:
        starts = [i for i in range(len(mask)) if i == 0 or mask[i] != mask[i - 1]]
        lengths = np.diff([*starts, len(mask)])
        writer.add(np.array(tokens), lengths, np.array(mask)[starts].astype(int), 1)
    writer.finish()
    return str(prefix)


def open_set(prefix: str, num_samples: int | None, **given: Any) -> ChatDataset:
    values: dict[str, Any] = {
        "random_seed": 5,
        "sequence_length": LENGTH,
        "blend_per_split": [([prefix], None), None, None],
        "tokenizer": SimpleNamespace(vocab_size=VOCAB_SIZE, eod=0, pad=0, unique_identifiers={}),
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": False,
    }
    config = EpochOrderConfig(**{**values, **given})
    data = ChatDataset.build_low_level_dataset(prefix, config)
    indices = np.arange(ChatDataset.numel_low_level_dataset(data), dtype=np.int32)
    return ChatDataset(data, prefix, indices, num_samples, Split.train, config)


def unpack(sample: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int], list[float]]]:
    """Tokens, labels and mask of each conversation; checks the padding and the positions."""
    boundaries = sample["cu_seqlens"].unique().tolist()
    found = []
    for start, end in zip(boundaries[:-1], boundaries[1:], strict=True):
        part = slice(start, end)
        assert sample["position_ids"][part].tolist() == list(range(end - start))
        if not sample["loss_mask"][part].any():
            assert end == LENGTH and not sample["tokens"][part].any()
            continue
        keys = ("tokens", "labels", "loss_mask")
        found.append(tuple(sample[key][part].tolist() for key in keys))
    return found  # type: ignore[return-value]


def as_read(conversation: Conversation) -> tuple[list[int], list[int], list[float]]:
    tokens, mask = conversation
    end = LENGTH + 1
    return tokens[: end - 1][: len(tokens) - 1], tokens[1:end], [float(m) for m in mask[1:end]]


def test_an_epoch_has_every_conversation_once(tmp_path: Path) -> None:
    conversations = make_conversations(*range(2, 66))
    data = open_set(write_set(tmp_path / "x", conversations), None)
    samples = [data[index] for index in range(len(data))]
    found = [item for sample in samples for item in unpack(sample)]
    assert sorted(found) == sorted(as_read(item) for item in conversations)
    for sample in samples:  # what forward_step takes for padding is the padding, but for its first
        padding = forward_step.padding_positions(sample["tokens"][None], sample["loss_mask"][None])
        assert int(padding.sum()) == max(0, int((sample["tokens"] == 0).sum()) - 1)
    none = data[None]
    assert not none["loss_mask"].any() and torch.equal(none["tokens"], samples[0]["tokens"])


def test_greedy_packing() -> None:
    sizes = np.random.RandomState(0).randint(1, 65, 500)
    ends = pack(sizes, 64)
    assert ends[-1] == 500
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        assert end > start and sizes[start:end].sum() <= 64
        assert end == 500 or sizes[start : end + 1].sum() > 64  # the next one did not fit


def test_a_longer_run_reads_the_same_first(tmp_path: Path) -> None:
    prefix = write_set(tmp_path / "x", make_conversations(*range(2, 40)))
    short, long = open_set(prefix, 7), open_set(prefix, 90)
    assert (len(short), len(long)) == (7, 90)
    for index in range(7):
        for key, value in short[index].items():
            assert torch.equal(value, long[index][key])
    order, ends = pack_epochs(np.full(10, 3), 8, num_samples=30, seed=1)
    assert ends[4] == 10 and sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10].tolist() != order[10:20].tolist()


def test_long_conversations_are_cut_and_counted_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conversations = make_conversations(10, LENGTH + 1, LENGTH + 2, LENGTH + 30)
    # One whose only answer lies behind the cut.
    tokens, _ = conversations[3]
    conversations[3] = (tokens, [False] * (LENGTH + 1) + [True] * 29)
    prefix = write_set(tmp_path / "x", conversations)
    data = open_set(prefix, None)
    said = capsys.readouterr().out
    assert "2 of 4 conversations are longer than --seq-length 64 and are cut: 30 of " in said
    assert "1 have no answer before the cut and are left out" in said
    found = Counter(str(item) for index in range(len(data)) for item in unpack(data[index]))
    assert found == Counter(str(as_read(item)) for item in conversations[:3])
    with pytest.raises(UserError, match="2 of 4 .* longest has 94 tokens. Remedy: a longer --seq"):
        open_set(prefix, None, refuse_long_conversations=True)
    with pytest.raises(UserError, match="nothing is left"):
        open_set(write_set(tmp_path / "y", conversations[3:]), None)


def test_packed_losses_equal_those_of_each_conversation_alone(
    tmp_path: Path, build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two packed samples as one micro-batch, through a window, global layers and experts."""
    model = build().eval()
    conversations = make_conversations(30, 21, 9, 2, 40, 12)
    data = open_set(write_set(tmp_path / "x", conversations), None)
    assert len(data) == 2
    batch = default_collate([data[0], data[1]])
    rows = {"cu_seqlens": batch["cu_seqlens"].clone(), "cu_seqlens_padded": None}
    monkeypatch.setattr(
        global_vars, "_GLOBAL_ARGS", SimpleNamespace(seq_length=LENGTH, context_parallel_size=1)
    )
    packed = forward_step._flatten_documents(dict.fromkeys(forward_step.BATCH_KEYS) | batch, rows)
    with torch.no_grad(), rope_on_device():
        losses = model(
            packed["tokens"],
            packed["position_ids"],
            None,
            labels=packed["labels"],
            packed_seq_params=forward_step.get_packed_seq_params(packed),
        )
        found = (losses * packed["loss_mask"]).sum()
        expected, per_token = torch.zeros(()), {}
        for tokens, labels, mask in map(as_read, conversations):
            one = model(
                torch.tensor([tokens]),
                torch.arange(len(tokens))[None],
                None,
                labels=torch.tensor([labels]),
            )
            per_token[str(tokens)] = one[0]
            expected = expected + (one * torch.tensor(mask)).sum()
    count = packed["loss_mask"].sum()
    assert count == sum(sum(mask) for _, mask in conversations)
    assert abs(found - expected) / count < 1e-5
    boundaries = packed["boundaries"]
    for start, end in zip(boundaries[:-1], boundaries[1:], strict=True):
        alone = per_token.pop(str(packed["tokens"][0, start:end].tolist()), None)
        if alone is not None:
            torch.testing.assert_close(losses[0, start:end], alone, rtol=1e-5, atol=1e-5)
    assert not per_token


def make_args(**given: Any) -> Any:
    values: dict[str, Any] = {
        "data": "d",
        "mock_data": False,
        "refuse_long_conversations": False,
        "pipeline_model_parallel_size": 1,
        "dataloader_inter_document_masking": False,
        "eod_mask_loss": False,
        "dataloader_fast_cache_load": False,
        "dataloader_defer_npy_index_mmap": False,
    }
    return SimpleNamespace(**{**values, **given})


CHAT: Any = SimpleNamespace(inputs=SimpleNamespace(chat="a" * 64))
TEXT: Any = SimpleNamespace(inputs=SimpleNamespace(chat=None))


@pytest.mark.parametrize(
    ("given", "manifest", "message"),
    [
        ({"refuse_long_conversations": True}, TEXT, "--refuse-long-conversations is for"),
        ({"refuse_long_conversations": True}, None, "--refuse-long-conversations is for"),
        ({"pipeline_model_parallel_size": 2}, CHAT, "--pipeline-model-parallel-size 2 with conv"),
        ({"eod_mask_loss": True}, CHAT, "--eod-mask-loss does not go with"),
        ({"dataloader_fast_cache_load": True}, CHAT, "--dataloader-fast-cache-load does not"),
    ],
)
def test_flags_that_do_not_go_with_conversations(given: dict, manifest: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"{message}.*Remedy: "):
        finish_chat(make_args(**given), manifest)


def test_conversations_are_packed_and_text_is_not() -> None:
    chat, text = make_args(), make_args()
    finish_chat(chat, CHAT)
    finish_chat(text, TEXT)
    assert chat.data_is_chat and chat.dataloader_inter_document_masking
    assert not text.data_is_chat and not text.dataloader_inter_document_masking


def test_text_is_not_read_as_conversations_nor_the_other_way(tmp_path: Path) -> None:
    from tests.unit_tests.training.datasets.test_splits import make_set

    chat = write_set(tmp_path / "chat", make_conversations(9, 9))
    text = make_set(tmp_path / "text", 50)
    assert has_modes(chat) and not has_modes(text) and not has_modes("/nowhere")
    for data_is_chat, prefix in ((True, chat), (False, text)):
        identity = {"train": [{"prefix": prefix, "content": "x"}]}
        args: Any = make_args(data_is_chat=data_is_chat, data_identity=identity)
        check_chat_sources(args, {})
        args.data_is_chat = not data_is_chat
        with pytest.raises(UserError, match="would be read as text|is text, and"):
            check_chat_sources(args, {})
