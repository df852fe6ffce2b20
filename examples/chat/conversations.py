"""Conversations to learn and to be asked: sums, copies and opposites.

python examples/chat/conversations.py write FILE [--count 4000]
python examples/chat/conversations.py ask CHECKPOINTS
"""

import argparse
import json
import random
from pathlib import Path

# The model of each run is asked what none of the conversations has.
HELD_OUT_SEED, COUNT_ASKED, LONGEST_ANSWER = 1, 50, 32
_WORDS = "river stone apple green seven window paper cloud little music north bread".split()
_OPPOSITES = {"hot": "cold", "big": "small", "up": "down", "old": "new", "yes": "no", "in": "out"}


def make_turn(draw: random.Random) -> tuple[str, str]:
    """A question and its answer."""
    kind = draw.randrange(3)
    if kind == 0:
        a, b = draw.randrange(20), draw.randrange(20)
        return f"What is {a} + {b}?", f"{a} + {b} = {a + b}"
    if kind == 1:
        words = " ".join(draw.choices(_WORDS, k=draw.randint(1, 4)))
        return f"Repeat: {words}", words
    word = draw.choice(sorted(_OPPOSITES))
    return f"The opposite of {word}?", f"{word} - {_OPPOSITES[word]}"


def held_out_turns() -> list[tuple[str, str]]:
    """Questions that :func:`write` leaves out, and their answers."""
    draw, turns = random.Random(HELD_OUT_SEED), {}
    while len(turns) < COUNT_ASKED:
        question, answer = make_turn(draw)
        if not question.startswith("The opposite"):  # there are too few to hold any back
            turns[question] = answer
    return list(turns.items())


def write(path: Path, count: int) -> None:
    """Write conversations of one to three turns as JSON lines."""
    draw, held_out = random.Random(0), {question for question, _ in held_out_turns()}
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            messages = []
            for _ in range(draw.randint(1, 3)):
                question, answer = make_turn(draw)
                if question in held_out:
                    continue
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": answer})
            if messages:
                file.write(json.dumps({"messages": messages}) + "\n")


def ask(checkpoints: Path) -> None:
    """Ask the held-out questions together; count the answers that end, and those that are right."""
    from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

    enter_host()
    from trinity_megatron.data.chat.template import Conversation, load_chat_template
    from trinity_megatron.evaluation.generate import Generator

    generator = Generator(checkpoints)
    template = load_chat_template(generator.folder)
    turns = held_out_turns()
    prompts = [
        template.prompt(Conversation([{"role": "user", "content": question}]))
        for question, _ in turns
    ]
    answers = [""] * len(turns)
    for new in generator.stream(
        prompts, max_new_tokens=LONGEST_ANSWER, stop={template.end_of_turn}
    ):
        answers = [answer + piece for answer, piece in zip(answers, new, strict=True)]
    ended = sum(tokens[-1] == template.end_of_turn for tokens in generator.made)
    right = sum(answer == wanted for answer, (_, wanted) in zip(answers, turns, strict=True))
    for (question, _), answer in list(zip(turns, answers, strict=True))[:5]:
        print(f"{question} -> {answer}")
    print(f"{ended} of {len(turns)} answers end with {template.end_text}, {right} are right")


def main() -> None:
    """Write or ask."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("write", "ask"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--count", type=int, default=4000)
    args = parser.parse_args()
    if args.what == "write":
        write(args.path, args.count)
    else:
        ask(args.path)


if __name__ == "__main__":
    main()
