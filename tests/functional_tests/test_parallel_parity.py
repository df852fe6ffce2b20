"""Ten steps on several ranks equal ten steps on one rank, in every layout."""

from pathlib import Path

import numpy as np
import pytest

from tests.functional_tests.launch import ADAM, Job, sampled, train
from trinity_megatron.telemetry.tensorboard_log import BIAS_TAG, TOKENS_TAG, RunLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 10
TOKENS_PER_LAYER = 8 * 64 * 4  # sequences x tokens x experts of a token
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
EP2, EP4 = "--expert-model-parallel-size 2", "--expert-model-parallel-size 4"
PP2 = "--pipeline-model-parallel-size 2"
CP2 = "--context-parallel-size 2"
ON_TWO = {"tp2": TP2, "ep2": EP2, "pp2": PP2, "cp2": CP2}
ON_FOUR = sampled({"ep4": EP4, "tp2_ep2": f"{TP2} {EP2}", "pp2_ep2": f"{PP2} {EP2}"}, "tp2_ep2")
# Several documents in a sequence, chunks of 75 tokens on four ranks, windows of 16 and 300.
DOCUMENTS = (
    "--dataloader-inter-document-masking --micro-batch-size 1 --train-iters 2 "
    "--seq-length 600 --max-position-embeddings 600"
)
WIDE = f"{DOCUMENTS} --window-size 299,0"
CP4 = "--context-parallel-size 4"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
CUT_DOCUMENTS = {
    "documents_cp2": f"{DOCUMENTS} {CP2} {FULL}",
    "documents_cp4": f"{DOCUMENTS} {CP4}",
    "wide_documents_cp2": f"{WIDE} {CP2}",
    "wide_documents_cp4": f"{WIDE} {CP4} {FULL}",
    "documents_tp2_cp2": f"{DOCUMENTS} {TP2} {CP2}",
    "documents_pp2_cp2": f"{DOCUMENTS} {PP2} {CP2}",
    "documents_fsdp_ep2_cp2": f"{DOCUMENTS} {EP2} {CP2} --use-megatron-fsdp",
}
CUT_ON_TWO = {name: flags for name, flags in CUT_DOCUMENTS.items() if name.endswith("s_cp2")}
CUT_ON_FOUR = sampled(
    {name: flags for name, flags in CUT_DOCUMENTS.items() if name not in CUT_ON_TWO},
    "documents_cp4",
)
# So strong that its scale shows in the gradient norm.  At SMALL's 1e-4 nothing would.
BALANCED = "--train-iters 3 --moe-aux-loss-coeff 3.0"
# One step: what they log can only differ by rounding.
METRICS = (
    *("router/", "attention/", "lm_head/", "data/", "grad_norm/", "update_rms/", "lr/", "train/"),
    "moe/",
)
DISTRIBUTED_ADAM = f"{' '.join(ADAM)} {EP2} --use-distributed-optimizer"


@pytest.fixture(scope="module")
def logs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunLog]:
    folder = tmp_path_factory.mktemp("parity")
    alone = [
        Job("alone"),
        Job("one_micro_batch", "--micro-batch-size 8"),
        Job("adam", " ".join(ADAM)),
        Job("documents", DOCUMENTS),
        Job("wide_documents", WIDE),
        Job("balanced", BALANCED),
        Job("balanced_one_micro_batch", f"{BALANCED} --micro-batch-size 8"),
    ]
    two = [Job(name, flags) for name, flags in ON_TWO.items()]
    two.append(Job("distributed_adam", DISTRIBUTED_ADAM))
    two += [Job(f"balanced_{name}", f"{BALANCED} {flags}") for name, flags in ON_TWO.items()]
    two += [Job(name, flags) for name, flags in CUT_ON_TWO.items()]
    four = [Job(name, flags) for name, flags in (ON_FOUR | CUT_ON_FOUR).items()]
    return train(data, folder, [(1, alone), (2, two), (4, four)])


@pytest.mark.parametrize(
    ("name", "serial"),
    [
        *((name, "alone") for name in (*ON_TWO, *ON_FOUR, "one_micro_batch")),
        ("distributed_adam", "adam"),
    ],
)
def test_layout_equals_one_rank(name: str, serial: str, logs: dict[str, RunLog]) -> None:
    parallel, alone = logs[name], logs[serial]
    # fp32 sums in another order: 1e-7 a step, and it grows slowly because training amplifies it.
    for tag, tolerance in (("lm loss", 2e-5), ("grad-norm", 1e-4)):
        expected, values = alone.scalars(tag), parallel.scalars(tag)
        assert list(values) == list(expected) == list(range(1, STEPS + 1))
        np.testing.assert_allclose(
            list(values.values()), list(expected.values()), rtol=tolerance, err_msg=tag
        )
    counts, expected_counts = parallel.tensors(TOKENS_TAG), alone.tensors(TOKENS_TAG)
    assert list(counts) == list(expected_counts) == list(range(1, STEPS + 1))
    assert all((step.sum(-1) == TOKENS_PER_LAYER).all() for step in counts.values())
    # The first step routes with equal weights: integers, hence equal.
    assert np.array_equal(counts[1], expected_counts[1])
    for step in counts:
        # A token that goes elsewhere is missed by one expert and counted by another.
        flips = np.abs(counts[step] - expected_counts[step]).sum() / 2
        share = flips / (len(counts[step]) * TOKENS_PER_LAYER)
        # Scores that differ in the seventh digit may swap two experts of nearly equal score.
        assert share <= 1e-3, f"step {step}: {flips:.0f} tokens flipped ({share:.2%})"
    # Equal counts through the same fp32 formula, of the size of 1e-3: the rounding of the mean.
    np.testing.assert_allclose(
        parallel.tensors(BIAS_TAG)[1], alone.tensors(BIAS_TAG)[1], rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("name", [*CUT_ON_TWO, *CUT_ON_FOUR])
def test_cut_documents_equal_one_rank(name: str, logs: dict[str, RunLog]) -> None:
    parallel, alone = logs[name], logs[name.rpartition("documents")[0] + "documents"]
    for tag in ("lm loss", "grad-norm", "seq_load_balancing_loss"):
        expected, values = alone.scalars(tag), parallel.scalars(tag)
        assert len(values) == 2
        np.testing.assert_allclose(values[1], expected[1], rtol=2e-5, err_msg=tag)
        # A token of the second step may go to another expert of nearly equal score.
        np.testing.assert_allclose(values[2], expected[2], rtol=1e-4, err_msg=tag)
    tags = [tag for tag in alone.scalar_tags() if tag.startswith(("grad_norm/", "attention/"))]
    assert len(tags) > 5
    for tag in tags:
        np.testing.assert_allclose(
            parallel.scalars(tag)[1], alone.scalars(tag)[1], rtol=2e-5, err_msg=tag
        )


def test_documents_and_windows_show_in_the_loss(logs: dict[str, RunLog]) -> None:
    # Otherwise equality would say little.
    first = [logs[name].scalars("grad-norm")[1] for name in ("documents", "wide_documents")]
    assert abs(first[0] / first[1] - 1) > 1e-3


def test_the_runs_learn_and_balance(logs: dict[str, RunLog]) -> None:
    # Otherwise equality would say little.
    loss, bias = logs["alone"].scalars("lm loss"), logs["alone"].tensors(BIAS_TAG)
    assert loss[STEPS] < loss[1] - 0.5
    assert np.abs(bias[STEPS]).max() > 3 * np.abs(bias[1]).max() > 0


@pytest.mark.parametrize("name", [*ON_TWO, "one_micro_batch"])
def test_the_balance_loss_has_one_scale(name: str, logs: dict[str, RunLog]) -> None:
    parallel, alone = logs[f"balanced_{name}"], logs["balanced"]
    for tag, tolerance in (("seq_load_balancing_loss", 1e-5), ("grad-norm", 1e-4)):
        expected, values = (list(log.scalars(tag).values()) for log in (alone, parallel))
        np.testing.assert_allclose(values, expected, rtol=tolerance, err_msg=tag)
    # It does show: the same first step without it has another gradient.
    assert abs(alone.scalars("grad-norm")[1] / logs["alone"].scalars("grad-norm")[1] - 1) > 0.01


@pytest.mark.parametrize(
    ("name", "serial"),
    [*((name, "alone") for name in (*ON_TWO, *ON_FOUR)), ("distributed_adam", "adam")],
)
def test_metrics_do_not_depend_on_the_layout(
    name: str, serial: str, logs: dict[str, RunLog]
) -> None:
    parallel, alone = logs[name], logs[serial]
    tags = [tag for tag in alone.scalar_tags() if tag.startswith(METRICS)]
    assert len(tags) >= 34
    assert [tag for tag in parallel.scalar_tags() if tag.startswith(METRICS)] == tags
    for tag in tags:
        expected, value = alone.scalars(tag)[1], parallel.scalars(tag)[1]
        # TensorBoard keeps fp32.  The difference of micro-batch losses is small beside the losses,
        # and the mean of logits of both signs is small beside them.
        atol = 2e-6 if tag in ("data/batch_het", "router/mean_logit", "lm_head/mean_logit") else 0
        np.testing.assert_allclose(value, expected, rtol=2e-5, atol=atol, err_msg=tag)


def test_groups_add_up_to_the_gradient_norm(logs: dict[str, RunLog]) -> None:
    for log in logs.values():
        groups = [tag for tag in log.scalar_tags() if tag.startswith("grad_norm/")]
        total = sum(log.scalars(tag)[1] ** 2 for tag in groups) ** 0.5
        assert total == pytest.approx(log.scalars("grad-norm")[1], rel=1e-5)


def test_there_are_at_most_80_scalars(logs: dict[str, RunLog]) -> None:
    for log in logs.values():
        # Megatron writes "... vs samples" beside many of them to TensorBoard only.  No name has a
        # layer's number: 60 layers have as many.
        names = [tag for tag in log.scalar_tags() if not tag.endswith(" vs samples")]
        assert 40 < len(names) <= 80
        assert not [name for name in names if any(digit in name for digit in "2345678")]
