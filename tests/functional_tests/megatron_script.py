"""The released ``pretrain_gpt.py`` of Megatron with the flags that make its model a Trinity."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.functional_tests.launch import ROOT

SCRIPTS = ROOT / "tests" / "reference" / "megatron"
SCRIPT = SCRIPTS / "pretrain_gpt.py"
PATCH = ROOT / "patches" / "0001-datasets-no-make-without-makefile.patch"
# First digits of the SHA-256 of the files of the tag core_v0.19.0.
RELEASED = {
    "pretrain_gpt.py": "7283c4aeb5a00c69",
    "gpt_builders.py": "cf4b409d598cd2bb",
    "model_provider.py": "8486f2047dd2bd23",
}
# All of them are Megatron's own.
FLAGS = (
    "--spec trinity_megatron.layer_specs get_trinity_layer_spec "
    "--num-layers 3 --hidden-size 64 --ffn-hidden-size 192 --num-attention-heads 4 "
    "--group-query-attention --num-query-groups 2 --kv-channels 16 --window-size 15,0 "
    "--normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear --qk-layernorm "
    "--attention-output-gate --attention-dropout 0 --hidden-dropout 0 "
    "--position-embedding-type rope --untie-embeddings-and-output-weights "
    "--num-experts 8 --moe-layer-freq [0]+[1]*2 --moe-router-topk 2 --moe-ffn-hidden-size 32 "
    "--moe-shared-expert-intermediate-size 32 --moe-router-score-function sigmoid "
    "--moe-router-enable-expert-bias --moe-router-bias-update-rate 5e-4 "
    "--moe-router-topk-scaling-factor 2.0 --moe-router-dtype fp32 "
    "--moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall "
    "--seq-length 64 --max-position-embeddings 64 --no-create-attention-mask-in-dataloader "
    "--global-batch-size 8 --micro-batch-size 2 --lr 1e-2 --min-lr 1e-3 --lr-decay-style constant "
    "--clip-grad 1.0 --seed 11 --log-interval 1 --eval-iters 0 --eval-interval 100 "
    "--tokenizer-type HuggingFaceTokenizer --num-workers 0"
).split()
# On a GPU without Transformer Engine and apex.
PLAIN_GPU = (
    "--transformer-impl local --no-masked-softmax-fusion --no-persist-layer-norm "
    "--no-gradient-accumulation-fusion --no-rope-fusion --bf16 --use-distributed-optimizer"
).split()


# Runs whose resume is compared, by what is added to ``FLAGS``.  Dropout draws from the generators
# that a checkpoint holds.
SHARDED = "--use-distributed-optimizer"
KINDS = {
    "default": f"{SHARDED} --hidden-dropout 0.1",
    "reshardable": f"{SHARDED} --dist-ckpt-optim-fully-reshardable",
    "bf16": f"{SHARDED} --bf16 --hidden-dropout 0.1",
    "muon": "--optimizer muon --muon-tp-mode duplicated",
    "async": f"{SHARDED} --async-save --async-strategy mcore --use-persistent-ckpt-worker",
    "not sharded": "",
}


def flags(data: Path, folder: Path) -> list[str]:
    """All flags of a run of the script; its cache goes to the folder."""
    named = ["--tokenizer-model", f"{data}/tokenizer", "--train-data-path", f"{data}/train"]
    named += ["--valid-data-path", f"{data}/validation", "--data-cache-path", f"{folder}/cache"]
    return [*FLAGS, *named]


def run(command: list[str], variables: dict[str, str]) -> str:
    """Run a command; what it says."""
    done = subprocess.run(
        command,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,  # on a busy machine
    )
    assert done.returncode == 0, "\n".join(done.stdout.splitlines()[-40:])
    return done.stdout


def losses(output: str) -> list[float]:
    """The losses of the steps that Megatron has printed."""
    return [float(text) for text in re.findall(r"lm loss: (\S+)", output)]


def patched_copy(folder: Path) -> Path:
    """A copy of the installed Megatron with the patch; a folder for ``PYTHONPATH``."""
    if shutil.which("patch") is None:
        pytest.skip("needs the program patch")
    shutil.copytree(Path(sysconfig.get_path("purelib"), "megatron"), folder / "megatron")
    for further in ((), ("--dry-run", "--reverse", "--force")):  # applied, and the check
        with PATCH.open() as text:
            command = ["patch", "-p1", "-d", str(folder), *further]
            subprocess.run(command, stdin=text, check=True, stdout=subprocess.PIPE)
    return folder
