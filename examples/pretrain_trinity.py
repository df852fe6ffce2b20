"""Pretrain Trinity with Megatron-Core; the twin of Megatron's ``pretrain_gpt.py``.

torchrun --nproc-per-node 8 examples/pretrain_trinity.py --preset nano --data D --out O [flags]
"""

if __name__ == "__main__":
    # Inside the guard: the helper processes of a checkpoint save import this file again.
    from trinity_megatron.process.rank import enter_rank

    enter_rank()  # before the imports, which take seconds
    from trinity_megatron.training.pretrain import run

    run()
