"""The entries of the registry: everything that this package replaces in its upstream packages."""

from trinity_megatron.upstream.replacement import Replacement

_TRAINING = "megatron.training.training"
_OPTIMIZER = "megatron.core.optimizer"
_EMERGING = "megatron.core.optimizer.emerging_optimizers"
_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
_ROPE = "megatron.core.models.common.embeddings.rope_utils"
_LAYERS = "megatron.core.tensor_parallel.layers"
_SERIALIZATION = "megatron.core.dist_checkpointing.serialization"
_WRITER_MODULE = "megatron.core.dist_checkpointing.strategies.filesystem_async"
_WRITER = f"{_WRITER_MODULE}:FileSystemWriterAsync"
_TORCH_DIST = "megatron.core.dist_checkpointing.strategies.torch:TorchDistLoadShardedStrategy"
_FSDP = "megatron.core.distributed.fsdp"
_ADAPTER = f"{_FSDP}.mcore_fsdp_adapter"
_MEGATRON_FSDP = f"{_FSDP}.src.megatron_fsdp.megatron_fsdp"
_FSDP_BUFFER = f"{_FSDP}.src.megatron_fsdp.param_and_grad_buffer"
_C10D = "torch.distributed.distributed_c10d"
_ASYNC = "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller"

# Where a rank waits for others: torch's functions come here, all of them.  gloo blocks in wait();
# NCCL blocks the stream there, or in the collective itself.
WAITS = tuple(
    f"{_C10D}:{name}"
    for name in (
        "Work.wait",
        "ProcessGroup._end_coalescing",
        "ProcessGroup._allgather_base",  # torch 2.11 and 2.12, as the next two
        "ProcessGroup._reduce_scatter_base",
        "ProcessGroup.alltoall_base",
        "ProcessGroup.all_gather_single",
        "ProcessGroup.all_gather_single_coalesced",
        "ProcessGroup.all_to_all_single",
        "ProcessGroup.allgather",
        "ProcessGroup.allgather_coalesced",
        "ProcessGroup.allreduce",
        "ProcessGroup.allreduce_coalesced",
        "ProcessGroup.alltoall",
        "ProcessGroup.barrier",
        "ProcessGroup.broadcast",
        "ProcessGroup.gather",
        "ProcessGroup.recv",
        "ProcessGroup.recv_anysource",
        "ProcessGroup.reduce",
        "ProcessGroup.reduce_scatter",
        "ProcessGroup.reduce_scatter_single",
        "ProcessGroup.reduce_scatter_single_coalesced",
        "ProcessGroup.scatter",
        "ProcessGroup.send",
    )
)

_ENTRIES = (
    # The training loop: callbacks.
    Replacement(
        f"{_TRAINING}:train",
        "callbacks run at the begin and the end of the loop",
        fingerprint="3c2299658ae7",
    ),
    Replacement(
        f"{_TRAINING}:train_step",
        "callbacks run before and after each step",
        fingerprint="68989d425b23",
    ),
    Replacement(
        f"{_TRAINING}:save_checkpoint",
        "callbacks run before and after each save",
        fingerprint="b652984ca8c8",
    ),
    Replacement(
        f"{_TRAINING}:load_checkpoint",
        "all ranks verify the checkpoint before one is chosen (`--on-damage previous`)",
        fingerprint="4f03d48a7938",
    ),
    Replacement(
        f"{_TRAINING}:maybe_finalize_async_save",
        "callbacks run when an asynchronous save ends",
        fingerprint="403a01e56d5a",
    ),
    Replacement(
        f"{_TRAINING}:evaluate_and_print_results",
        "callbacks run before each evaluation",
        fingerprint="699dfbe69cf2",
    ),
    Replacement(
        f"{_TRAINING}:logical_and_across_model_parallel_group",
        "a rank without model-parallel peers need not ask its device",
        fingerprint="04bcebc76638",
    ),
    Replacement(
        f"{_TRAINING}:reduce_max_stat_across_model_parallel_group",
        "a rank without model-parallel peers need not ask its device",
        fingerprint="93e4f1eace4f",
    ),
    Replacement(
        f"{_TRAINING}:get_signal_handler",
        "several signals request a save, on any rank",
        fingerprint="b0b789345f8b",
    ),
    Replacement(
        f"{_TRAINING}:num_floating_point_operations",
        "FLOPs account for sliding-window attention",
        fingerprint="f9ed9b380e17",
    ),
    Replacement(
        f"{_TRAINING}:OptimizerParamScheduler",
        "a branch holds its parent's learning rates and anneals them to 0",
        fingerprint="2936733983b5",
    ),
    Replacement(
        f"{_TRAINING}:initialize_megatron",
        "pretrain() does not pass allow_no_cuda on",
        fingerprint="d9b467adcaed",
    ),
    Replacement(
        f"{_TRAINING}:build_train_valid_test_data_iterators",
        "on a CPU the seeds that data loaders draw do not move the generator of dropout, which a "
        "resume has just loaded",
        fingerprint="d12ed278f953",
    ),
    # Stragglers (`--log-straggler`).
    Replacement(
        f"{_TRAINING}:stimer",
        "a rank's work without its waits for others, on CPU ranks too, and no open port",
        source_of=f"{_TRAINING}:post_training_step_callbacks",
        fingerprint="a9a0370634ac",
    ),
    *(Replacement(target, "the time in it is no work (`--log-straggler`)") for target in WAITS),
    # The model.
    Replacement(
        f"{_ROPE}:_apply_rotary_pos_emb_bshd",
        "one kernel on a GPU without Transformer Engine, in the place of twenty",
        fingerprint="4a54b66e47ae",
    ),
    Replacement(
        f"{_ROPE}:_apply_rotary_pos_emb_thd",
        "packed documents without a loop over them and without waits for the device",
        fingerprint="99798acffbb2",
    ),
    Replacement(
        f"{_LAYERS}:fused_weight_gradient_mlp_cuda",
        "torch has the product that adds a weight gradient to main_grad, where apex is missing",
        source_of=f"{_LAYERS}:LinearWithGradAccumulationAndAsyncCommunication",
        fingerprint="9ffc0bd1a944",
    ),
    Replacement(
        f"{_LAYERS}:_grad_accum_fusion_available",
        "the flag that says so",
        source_of=f"{_LAYERS}:ColumnParallelLinear",
        fingerprint="7cbdf5d289f2",
    ),
    Replacement(
        "torch._inductor.output_code:CompiledFxGraph.__call__",
        "the computed floor of a step counts what torch has compiled as one operation",
    ),
    # Sharded parameters.
    Replacement(
        "megatron.training.models.dist_utils:FullyShardedDataParallel",
        "the expert bias stays whole; checkpoints have the format of all other runs",
        fingerprint="3f19d9a2288c",
    ),
    Replacement(
        f"{_TRAINING}:get_megatron_optimizer",
        "Muon and AdamW on the shards of Megatron-FSDP",
        fingerprint="b473223298c4",
    ),
    Replacement(
        f"{_ADAPTER}:DeviceMesh",
        "meshes of CPU ranks",
        source_of=f"{_ADAPTER}:FullyShardedDataParallel._init_dist_index",
        fingerprint="71a8eb4fd53b",
    ),
    Replacement(
        f"{_MEGATRON_FSDP}:torch",
        "the device of a CPU rank",
        source_of=f"{_MEGATRON_FSDP}:MegatronFSDP.__init__",
        fingerprint="d07b622fa2f3",
    ),
    # Writers.
    Replacement(
        "megatron.training.global_vars:_set_tensorboard_writer",
        "TensorBoard's files are opened when the loop begins, not while a start may be refused",
        fingerprint="9eec040faaed",
    ),
    Replacement(
        "megatron.training.global_vars:_set_wandb_writer",
        "W&B starts in the background and may fail without ending the training",
        fingerprint="45900feb85c3",
    ),
    Replacement(
        "megatron.training.global_vars:_GLOBAL_WANDB_WRITER",
        "the writer that starts in the background",
        source_of="megatron.training.global_vars:get_wandb_writer",
        fingerprint="1133d0460bb6",
    ),
    Replacement(
        "torch.utils.tensorboard:SummaryWriter", "each step is in the record once after a resume"
    ),
    Replacement(
        "tensorboard.summary.writer.event_file_writer:RecordWriter",
        "a full disk does not end the thread that writes events",
    ),
    # The data.
    Replacement(
        "megatron.core.datasets.gpt_dataset:safe_numpy_load",
        "the index cache is not unpickled",
        fingerprint="0e6b43640f8a",
    ),
    Replacement(
        "megatron.core.datasets.blended_dataset:safe_numpy_load",
        "the index cache is not unpickled",
        fingerprint="0e6b43640f8a",
    ),
    # The optimizer.
    Replacement(
        f"{_EMERGING}:_EMERGING_OPTIMIZERS",
        "`--optimizer muon` is this package's Muon",
        source_of=f"{_EMERGING}:_create_emerging_optimizer",
        fingerprint="5b6794be8f8d",
    ),
    Replacement(
        f"{_EMERGING}:get_supported_coefficient_types",
        "the coefficients of Newton-Schulz are known without the emerging-optimizers package",
        fingerprint="d9f8c690df07",
    ),
    Replacement(
        f"{_EMERGING}:HAVE_EMERGING_OPTIMIZERS",
        "Muon does not need the emerging-optimizers package",
        source_of=f"{_OPTIMIZER}:_get_megatron_emerging_optimizer",
        fingerprint="bb0185983746",
    ),
    Replacement(
        f"{_OPTIMIZER}:_EMERGING_OPTIMIZERS",
        "the same table under the name that the builder reads",
        source_of=f"{_OPTIMIZER}:_get_megatron_emerging_optimizer",
        fingerprint="bb0185983746",
    ),
    Replacement(
        f"{_OPTIMIZER}:HAVE_EMERGING_OPTIMIZERS",
        "the same flag under the name that the builder reads",
        source_of=f"{_OPTIMIZER}:_get_megatron_emerging_optimizer",
        fingerprint="bb0185983746",
    ),
    Replacement(
        f"{_OPTIMIZER}:_get_megatron_emerging_optimizer",
        "Muon is sharded by the distributed optimizer",
        fingerprint="bb0185983746",
    ),
    Replacement(
        f"{_OPTIMIZER}:DistributedOptimizer",
        "torch's AdamW resumes bit for bit",
        source_of=_DISTRIBUTED,
        fingerprint="cd54fd90549c",
    ),
    Replacement(
        f"{_DISTRIBUTED}._compute_per_buffer_param_layout",
        "no shard of a buffer of experts cuts a matrix",
        fingerprint="68d85cf9f1fe",
    ),
    Replacement(
        f"{_LAYERS}:_MODEL_PARALLEL_ATTRIBUTE_DEFAULTS",
        "the float32 master of a weight keeps how Muon splits it",
        source_of=f"{_LAYERS}:copy_tensor_model_parallel_attributes",
        fingerprint="6537018adbec",
    ),
    # Checkpoints: saving.
    Replacement(
        f"{_WRITER_MODULE}:get_write_results_queue",
        "a synchronous save needs no helper process (half a GiB and seconds of imports a rank)",
        fingerprint="e395fb0e86a0",
    ),
    Replacement(
        f"{_WRITER}.prepare_write_data",
        "what an asynchronous save writes is a copy on a CPU, too",
        fingerprint="60f430ed8238",
    ),
    Replacement(
        f"{_WRITER}.get_save_function_and_args",
        "an error of a writer keeps its text",
        fingerprint="91b193455aa9",
    ),
    Replacement(
        f"{_WRITER}.write_preloaded_data",
        "an error of a writer keeps its text",
        fingerprint="d6182c03ee67",
    ),
    Replacement(
        f"{_WRITER}.retrieve_write_results",
        "checksums are saved with the shards",
        fingerprint="344f081b9cd4",
    ),
    Replacement(
        f"{_ASYNC}.async_loop",
        "the process that saves needs the stand-ins for CUDA too",
        fingerprint="8511da332fcc",
    ),
    Replacement(
        f"{_ASYNC}._get_process",
        "the run does not wait for a process that saves and was killed",
        fingerprint="ba04e15392b2",
    ),
    Replacement(
        "megatron.training.checkpointing:_async_delete_checkpoint_impl",
        "--keep-last deletes complete checkpoints only",
        fingerprint="be821becfe6f",
    ),
    # Checkpoints: loading, without running code, with checksums.
    Replacement(
        f"{_TORCH_DIST}.load",
        "a damaged shard is one error on all ranks",
        fingerprint="422f2d0ba4ff",
    ),
    Replacement(
        f"{_SERIALIZATION}:verify_integrity_manifest",
        "an unreadable manifest is one error",
        fingerprint="c0eff384961b",
    ),
    Replacement(
        f"{_SERIALIZATION}:load_common_state_dict",
        "metadata are checked first",
        fingerprint="969bf1cc5ec1",
    ),
    Replacement(
        "megatron.core.dist_checkpointing:load_common_state_dict",
        "the same function under its other name",
        source_of=f"{_SERIALIZATION}:load_common_state_dict",
        fingerprint="969bf1cc5ec1",
    ),
    Replacement(
        "torch.distributed.checkpoint.filesystem:pickle", "metadata are unpickled by an allow-list"
    ),
    Replacement("torch:load", "shards are loaded by an allow-list, with checksums"),
    Replacement(
        "torch.distributed.checkpoint.filesystem:FileSystemReader.read_data",
        "shards are read ahead and compared with their checksums",
    ),
    Replacement(
        "torch.distributed.checkpoint.filesystem:FileSystemReader._slice_file",
        "names in a checkpoint cannot lead out of its folder",
    ),
    # A CPU as the host of a training (cpu_host/cuda_stand_ins.py).
    Replacement(
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        "without CUDA there is no device generator",
        fingerprint="b179c9d95438",
    ),
    Replacement(
        "megatron.core.dist_checkpointing.mapping:ShardedTensor.init_data.__defaults__",
        "its default is torch.empty of before the stand-ins",
        source_of="megatron.core.dist_checkpointing.mapping:ShardedTensor.init_data",
        fingerprint="6790a965b32d",
    ),
    Replacement(
        "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        "callers need host numbers, and the tensors are on the host",
        fingerprint="8fc5847a887d",
    ),
    Replacement(
        "megatron.core.optimizer.clip_grads:l2_norm_impl",
        "a running fp32 sum over a large tensor is wrong in the fifth digit on a CPU; on a GPU "
        "without Transformer Engine and apex every tensor's norm is waited for",
        source_of="megatron.core.optimizer.clip_grads:get_grad_norm_fp32",
        fingerprint="810944e99b1e",
    ),
    Replacement(
        "megatron.core.optimizer.clip_grads:multi_tensor_scale_impl",
        "gradients are scaled in place, without a copy",
        source_of="megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32",
        fingerprint="cf07b488fb76",
    ),
    Replacement(
        "megatron.core.optimizer.clip_grads:multi_tensor_scale_tensor_impl",
        "with it the norm stays on a GPU without Transformer Engine and apex",
        source_of="megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32",
        fingerprint="cf07b488fb76",
    ),
    Replacement(
        "megatron.core.datasets.utils:compile_helpers",
        "the wheel has the compiled helper but no Makefile",
        fingerprint="84029a50ae8c",
        patched="e38508766e1a",
    ),
    # Dry worlds of the planner.
    Replacement(
        "torch.distributed:all_gather_object",
        "a rank of a world without a network answers for all: with what it has itself",
    ),
    Replacement(
        "torch.distributed.device_mesh:DeviceMesh.mesh",
        "the ranks of a mesh are numbers where other tensors have no data",
    ),
    Replacement(
        f"{_FSDP_BUFFER}:validate_uneven_dtensor",
        "a rank of a world without a network cannot compare its shards with those of others",
        fingerprint="4cd4ab78861f",
    ),
    # Task files of an evaluation, which run no program.
    Replacement(
        "lm_eval.tasks._yaml_loader:_make_loader",
        "`!function` of a user's task file is not called",
    ),
    Replacement("lm_eval.api.task:get_metric", "a metric is no script of the package evaluate"),
    Replacement("lm_eval.utils:env", "a template of a task cannot leave its sandbox"),
    # The launcher.
    Replacement(
        "torch.distributed.elastic.multiprocessing.api:PContext.close",
        "the exit codes of all ranks are known after a signal",
    ),
)

REGISTRY = {entry.target: entry for entry in _ENTRIES}
