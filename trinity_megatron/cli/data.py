"""``trinity-megatron data``."""

import argparse
from collections.abc import Sequence

from trinity_megatron.cli import data_filter, data_rewrite
from trinity_megatron.errors import UserError


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser of ``trinity-megatron``."""
    parser = commands.add_parser(
        "data",
        help="show what a run reads of a mixture of corpora; filter or rewrite documents",
        description="Look at the data of a run before it starts; filter documents, or make "
        "synthetic data.",
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    show = actions.add_parser(
        "show",
        help="the plan of a mixture: tokens by corpus, language and phase",
        description="Show what a run reads of each corpus in each phase, and how often; exit with "
        "2 if the mixture cannot be met.  docs/mixtures.md describes the file.",
        allow_abbrev=False,
    )
    show.add_argument("mixture", metavar="MIX.yaml", help="file of --data")
    show.add_argument(
        "--seq-length", type=int, default=4096, metavar="N", help="as of the run (%(default)s)"
    )
    show.add_argument(
        "--until",
        metavar="TOKENS",
        help="length of the run, such as 17T (default: the end of the last phase)",
    )
    show.add_argument("--seed", type=int, default=1234, help="as of the run (%(default)s)")
    show.set_defaults(command=run, takes_further_flags=False)
    data_filter.add_parser(actions)
    data_rewrite.add_parser(actions)


def run(args: argparse.Namespace, others: Sequence[str]) -> int:
    """Print the plan of a mixture; return the exit code.

    Raises:
        UserError: The file or a corpus is at fault, or the plan cannot be met.
    """
    from trinity_megatron.data.mixture.open_corpora import find_texts, read_mixture
    from trinity_megatron.data.mixture.plan import make_plan
    from trinity_megatron.data.mixture.plan_table import format_plan
    from trinity_megatron.data.mixture.quantities import parse_tokens
    from trinity_megatron.data.text.text_corpus import TextCorpus

    if args.seq_length < 1:
        raise UserError(f"--seq-length {args.seq_length} is below 1. Remedy: that of the run.")
    data = read_mixture(args.mixture)
    if data is None:
        raise UserError(
            f"--data {args.mixture} is no file of a mixture, and no raw text. Remedy: MIX.yaml."
        )
    try:
        tokens = parse_tokens(args.until) if args.until else data.mixture.end
    except ValueError as error:
        raise UserError(f"--until: {error}. Remedy: --until 17T.") from error
    if tokens is None:
        raise UserError(
            f"--data {args.mixture}: the last phase is open. Remedy: --until with the tokens that "
            "the run consumes."
        )
    samples = -(-tokens // args.seq_length)
    for corpus in find_texts(data) if data.raw else ():
        if isinstance(corpus, TextCorpus):  # the table has the others
            print(f"{corpus.name}: {len(corpus.files)} files of text, {corpus.num_bytes:,} bytes")
    print(format_plan(make_plan(data, seq_length=args.seq_length, seed=args.seed, samples=samples)))
    return 0
