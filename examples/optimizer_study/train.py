"""One run of the study: as ``trinity-megatron train``, but every evaluation is on the same text.

Megatron evaluates on the next samples each time, in an order of the run's seed.  Here all runs and
all evaluations read one set of ``--eval-iters`` batches, so that losses can be compared over steps.
"""

from torch.utils.data import Dataset

VALIDATION_SEED = 1


class RepeatedSamples(Dataset):
    """The samples of a dataset over and over.

    Args:
        samples: What is repeated.
        num_repeated: How many of them, from the first on.
        size: Length of the whole.
    """

    def __init__(self, samples: Dataset, num_repeated: int, size: int) -> None:
        self.samples, self.num_repeated, self.size = samples, num_repeated, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        return self.samples[index % self.num_repeated]


def main() -> None:
    """Train with the arguments of the command line."""
    from megatron.training import get_args

    from trinity_megatron.training import pretrain

    class FixedValidation(pretrain.DatasetsProvider):
        """The datasets of a training, with the same samples in every evaluation."""

        def __call__(self, num_samples: list[int], vp_stage: int | None = None) -> tuple:
            args = get_args()
            train, _, test = super().__call__(num_samples, vp_stage)
            num_repeated = args.eval_iters * args.eval_global_batch_size
            seed, args.seed = args.seed, VALIDATION_SEED
            _, validation, _ = super().__call__([num_samples[0], num_repeated, 0], vp_stage)
            args.seed = seed
            return train, RepeatedSamples(validation, num_repeated, num_samples[1]), test

    pretrain.DatasetsProvider = FixedValidation
    pretrain.run()


if __name__ == "__main__":
    from trinity_megatron.process.rank import enter_rank

    enter_rank()  # before the imports, which take seconds
    import trinity_megatron.training.pretrain  # noqa: F401  enters the host before Megatron

    main()
