"""``trinity-megatron generate``: go on with texts, or talk, with the model of a checkpoint.

The checkpoint is loaded into Megatron's model in this process, in the dtype in which it was saved;
the loop is that of the end of a training (:mod:`trinity_megatron.model.generation`).
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trinity_megatron.checkpoint.hf_assets import check_tokenizer, find_tokenizer
from trinity_megatron.checkpoint.model_io import load_megatron_model
from trinity_megatron.checkpoint.torch_dist.reader import TorchDistReader
from trinity_megatron.checkpoint.vocabulary import find_vocab_size
from trinity_megatron.data.chat.template import (
    ChatTemplate,
    Conversation,
    Message,
    load_chat_template,
)
from trinity_megatron.data.tokenizer_file import load_transformers_tokenizer
from trinity_megatron.errors import UserError
from trinity_megatron.model.generation import Sampling, generate_tokens

_GREEDY = Sampling()
_CUT_CHARACTER = "\ufffd"  # of a character whose other bytes are to come


class Generator:
    """The model of a checkpoint with its tokenizer.

    Attributes:
        folder: Of the tokenizer.
        tokenizer: transformers' tokenizer.
        made: Tokens of the latest continuations so far, the last one that ends them included.

    Args:
        load: What ``--save`` was, or the folder of one iteration.
        tokenizer: Folder of the tokenizer; that of the run if None.

    Raises:
        UserError: The checkpoint or its tokenizer is missing or damaged.
    """

    def __init__(self, load: Path, *, tokenizer: Path | None = None) -> None:
        source = TorchDistReader(load)
        self.folder = find_tokenizer_folder(load, source, tokenizer)
        self.tokenizer: Any = load_transformers_tokenizer(self.folder)
        self._vocab_size = find_vocab_size(source.args, self.folder)
        self.made: list[list[int]] = []
        self._model = load_as_saved(load, source)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = _GREEDY,
        stop: Collection[int] = (),
    ) -> Iterator[list[str]]:
        """Continue prompts of token ids together.

        Args:
            prompts: At least one token in each.
            max_new_tokens: Length of a continuation; it ends before at a stop token.
            sampling: How a token is chosen.
            stop: Tokens that end a continuation, beside the end of text.

        Yields:
            What each continuation has got further; together without special tokens the whole text.
        """
        ends = {*stop, self.tokenizer.eos_token_id} - {None}
        made = self.made = [[] for _ in prompts]
        told = ["" for _ in prompts]
        steps = generate_tokens(
            self._model,
            prompts,
            max_new_tokens=max_new_tokens,
            vocab_size=self._vocab_size,
            stop=ends,
            sampling=sampling,
        )
        for step in steps:
            for tokens, token in zip(made, step, strict=True):
                tokens += [] if token is None else [token]
            yield self._print_new_text(made, told)
        yield self._print_new_text(made, told, is_end=True)

    def _print_new_text(
        self, made: Sequence[Sequence[int]], told: list[str], *, is_end: bool = False
    ) -> list[str]:
        """What is new in each text; ``told`` follows.  Half a character waits for its end."""
        new = []
        for row, tokens in enumerate(made):
            # Cleaning up would change what has been told.
            text = self.tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            if not is_end:
                text = text.rstrip(_CUT_CHARACTER)
            new.append(text[len(told[row]) :])
            told[row] = text if len(text) > len(told[row]) else told[row]
        return new

    def encode(self, prompt: str) -> list[int]:
        """Tokens of a prompt, without special tokens.

        Raises:
            UserError: It has none.
        """
        tokens = self.tokenizer(prompt, add_special_tokens=False).input_ids
        if not tokens:
            raise UserError(f"--prompt {prompt!r} has no tokens. Remedy: give some text.")
        return tokens


class Chat:
    """A conversation with the model of a checkpoint.

    Attributes:
        messages: Of the conversation so far.
        is_cut: Whether the latest answer has ended without the token that ends a turn.

    Args:
        generator: The model.
        max_new_tokens: Longest answer in tokens.
        sampling: How a token is chosen; the seed is that of the first answer.

    Raises:
        UserError: Its tokenizer has no chat template that can be used.
    """

    def __init__(self, generator: Generator, *, max_new_tokens: int, sampling: Sampling) -> None:
        self._generator, self._max_new_tokens = generator, max_new_tokens
        self._sampling = sampling
        self._template: ChatTemplate = load_chat_template(generator.folder)
        self.messages: list[Message] = []
        self.is_cut = False

    def answer(self, text: str) -> Iterator[str]:
        """Say something, and get the answer piece by piece.

        Args:
            text: What the user says.

        Raises:
            RowError: The template refuses the conversation, or the text has a special token.
        """
        said = [*self.messages, {"role": "user", "content": text}]
        prompt = self._template.prompt(Conversation(said))
        self.messages = said  # a refused text is not a part of the conversation
        pieces: list[str] = []
        number = len(said) // 2
        for new in self._generator.stream(
            [prompt],
            max_new_tokens=self._max_new_tokens,
            sampling=replace(self._sampling, seed=self._sampling.seed + number),
            stop={self._template.end_of_turn},
        ):
            pieces += new
            yield new[0]
        self.is_cut = self._generator.made[0][-1] != self._template.end_of_turn
        self.messages.append({"role": "assistant", "content": "".join(pieces)})


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
        UserError: The checkpoint or its tokenizer is missing or damaged, or a value is wrong.
    """
    sampling = Sampling(temperature)
    check_length(max_new_tokens)
    generator = Generator(load, tokenizer=tokenizer)
    steps = generator.stream(
        [generator.encode(prompt)], max_new_tokens=max_new_tokens, sampling=sampling
    )
    return "".join(new[0] for new in steps)


def check_length(max_new_tokens: int) -> None:
    """Check that there is something to generate.

    Raises:
        UserError: There is not.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens} is below 1. Remedy: give at least 1.")


def load_as_saved(load: Path, source: TorchDistReader, **layout: int) -> Any:
    """Load a model in the dtype in which it was saved, in evaluation mode.

    Args:
        load: What ``--save`` was, or the folder of one iteration.
        source: Its reader.
        **layout: As in :func:`load_megatron_model`.

    Raises:
        UserError: The checkpoint is damaged.
    """
    dtype = source.model_tensors()["output_layer.weight"][0]
    return load_megatron_model(load, dtype=dtype, **layout).eval()


def find_tokenizer_folder(load: Path, source: TorchDistReader, given: Path | None) -> Path:
    """The folder of a checkpoint's tokenizer.

    Args:
        load: What ``--save`` was, or the folder of one iteration.
        source: Its reader.
        given: ``--tokenizer``; that of the run if None.

    Raises:
        UserError: There is none, or it is another one than the run was trained with.
    """
    folder = given or find_tokenizer(source.folder, source.args)
    if given is not None and not (given / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer {given} holds no tokenizer.json. Remedy: its folder.")
    if folder is None or not (folder / "tokenizer.json").is_file():
        raise UserError(f"{load} has no tokenizer. Remedy: --tokenizer DIR.")
    check_tokenizer(load, folder)
    return folder
