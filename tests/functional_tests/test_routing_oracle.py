"""Counts, bias and momentum of every layout equal those of an oracle that sees all tokens.

Every rank writes down the logits that its routers saw.  The oracle, one float64 process, puts the
tokens of all ranks together, selects, counts and moves the bias, from zero to the last step.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.functional_tests.launch import Job, sampled, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS, LAYERS, TOPK = 4, (2, 3, 4), 4
SEQUENCES, LENGTH = 8, 64
PADDING = 23
# The rate of SMALL; the others are those of the tiny preset.
RATE, BETA, KAPPA = 2e-3, 0.5, 2.0
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
EP2, CP2 = "--expert-model-parallel-size 2", "--context-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
VPP = f"{PP2} --num-layers-per-virtual-pipeline-stage 1"
ETP2, ETP1 = "--expert-tensor-parallel-size 2", "--expert-tensor-parallel-size 1"
PACKED = "--dataloader-inter-document-masking"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective --recompute-modules core_attn moe"
ALL_WORLDS = {
    1: {
        "micro_batch_1": "--micro-batch-size 1",  # 8 accumulations
        "micro_batch_8": "--micro-batch-size 8",
        "recompute": RECOMPUTE,
        "selective": SELECTIVE,
        "eval": "--eval-iters 2 --eval-interval 2",
        "packed": PACKED,
        "padded": "",
        "padded_packed": PACKED,
        "bf16": "--bf16",
        "bf16_recompute": f"--bf16 {RECOMPUTE}",
    },
    2: {
        "tp2": TP2,
        "ep2": EP2,
        "pp2": PP2,
        "vpp": VPP,
        "cp2": CP2,
        "dp2": "--micro-batch-size 1",
        "tp2_packed": f"{TP2} {PACKED} --micro-batch-size 1",
        "tp2_padded": TP2,
        "cp2_padded": CP2,
        "ep2_bf16_distributed": f"{EP2} --bf16 --optimizer adam --use-distributed-optimizer",
    },
    4: {
        "tp2_ep2_etp1": f"{TP2} {EP2} {ETP1}",
        "tp2_ep2_etp2": f"{TP2} {EP2} {ETP2}",
        "pp2_ep2": f"{PP2} {EP2}",
        "tp2_cp2": f"{TP2} {CP2}",
    },
    8: {
        "tp2_cp2_dp2": f"{TP2} {CP2}",
        "tp2_pp2_ep2_recompute": f"{TP2} {PP2} {EP2} {RECOMPUTE}",
        "ep8": "--expert-model-parallel-size 8 --micro-batch-size 1",
    },
}
SAMPLE = (
    *(
        "micro_batch_1",
        "padded",
        "padded_packed",
        "bf16_recompute",
        "vpp",
        "tp2_packed",
        "cp2_padded",
    ),
    *("ep2_bf16_distributed", "tp2_ep2_etp1", "pp2_ep2", "tp2_cp2"),
)
WORLDS = {
    ranks: chosen
    for ranks, jobs in ALL_WORLDS.items()
    if (chosen := sampled(jobs, *(name for name in SAMPLE if name in jobs)))
}
CASES = [(ranks, name) for ranks, jobs in WORLDS.items() for name in jobs]


@pytest.fixture(scope="module")
def traces(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("oracle")

    def job(name: str, flags: str) -> Job:
        probe = {"trace": str(folder / name), "pad": PADDING if "padded" in name else 0}
        return Job(name, f"--train-iters {STEPS} {flags}", probe=probe)

    worlds = [(n, [job(name, flags) for name, flags in jobs.items()]) for n, jobs in WORLDS.items()]
    train(data, folder, worlds)
    return {
        name: [torch.load(folder / f"{name}.{rank}.pt") for rank in range(ranks)]
        for ranks, name in CASES
    }


def select(logits: torch.Tensor, bias: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Experts of each token in float64; where two are equal in fp32, the ones that were taken."""
    biased = torch.sigmoid(logits.double()) + bias
    values, indices = biased.topk(TOPK + 1, dim=-1)
    chosen = torch.zeros_like(found).scatter(1, indices[:, :TOPK], True)
    # Two fp32 numbers of the size of one that differ by less than a rounding of each.
    is_tie = values[:, TOPK - 1] - values[:, TOPK] < 2e-7
    return torch.where(is_tie[:, None], found, chosen)


def smebu(bias: torch.Tensor, momentum: torch.Tensor, counts: torch.Tensor) -> Any:
    """Report eq 23-28 in float64."""
    mean = counts.double().mean()
    delta = RATE * torch.tanh(KAPPA * (mean - counts) / mean)
    momentum = BETA * momentum + (1 - BETA) * (delta - delta.mean())
    return bias + momentum, momentum


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_equals_the_oracle(ranks: int, name: str, traces: dict[str, list[dict[str, Any]]]) -> None:
    tokens = SEQUENCES * LENGTH - (PADDING if "padded" in name else 0)
    for layer in LAYERS:
        bias = momentum = torch.zeros(32, dtype=torch.float64)
        for step in range(1, STEPS + 1):
            counts, seen = torch.zeros(32, dtype=torch.int64), 0
            for trace in traces[name]:
                for when, where, logits, padding, found in trace["calls"]:
                    if (when, where) != (step, layer):
                        continue
                    chosen = select(logits.flatten(0, 1), bias, found)
                    assert torch.equal(chosen, found)
                    if padding is not None:
                        chosen = chosen[~padding.flatten()]
                    counts += chosen.sum(0)
                    seen += len(chosen)
            # Every token of the global batch once: on no rank twice, in no pass again.
            assert seen == tokens
            bias, momentum = smebu(bias, momentum, counts)
            updates = [trace["updates"][step - 1] for trace in traces[name]]
            holders = [u for u in updates if layer in u["layer_numbers"]]
            assert holders
            for update in holders:
                row = update["layer_numbers"].index(layer)
                assert torch.equal(update["tokens_per_expert"][row], counts)
                assert update["dtype"] == "torch.float32"
                # fp32 numbers of the size of 1e-2, rounded a few times: bf16 would be off by 1e-5.
                for key, expected in (("expert_bias", bias), ("bias_momentum", momentum)):
                    found_values = update[key][row].double()
                    torch.testing.assert_close(found_values, expected, rtol=1e-6, atol=2e-9)


def test_the_oracle_has_something_to_say(traces: dict[str, list[dict[str, Any]]]) -> None:
    last = traces["micro_batch_1"][0]["updates"][-1]
    assert last["expert_bias"].abs().max() > 2 * RATE
    loads = last["tokens_per_expert"]
    assert (loads.max(-1).values > 2 * loads.double().mean(-1)).any()
    # The padded runs differ from the others.
    padded = traces["padded"][0]["updates"][0]["tokens_per_expert"]
    assert padded.sum(-1).tolist() == [(SEQUENCES * LENGTH - PADDING) * TOPK] * len(LAYERS)
