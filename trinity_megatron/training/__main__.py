"""``python -m trinity_megatron.training``: what ``trinity-megatron train`` starts on every rank."""

if __name__ == "__main__":
    # Inside the guard: the helper processes of a checkpoint save import this module again.
    from trinity_megatron.process.rank import enter_rank

    enter_rank()  # before the imports, which take seconds
    from trinity_megatron.training.pretrain import run

    run()
