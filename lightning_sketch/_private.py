"""List the private or undocumented names of other packages that this package uses, to be read before an upgrade.

Each row of `NAMES` is (owner, name, used in, breaks):

    owner      import path of the object that has the attribute; a call means an instance
    name       the attribute, or the value of a constant that contains a name
    used in    our files
    breaks     what would silently go wrong without it; empty if there is an error

`tests/test_private.py` asserts that each exists in the installed versions. This module imports nothing.
"""

NAMES: tuple[tuple[str, str, str, str], ...] = (
    # Lightning
    ("Trainer().fit_loop.epoch_loop", "_batches_that_stepped", "_lightning.py", "steps of the logs"),
    ("Trainer().fit_loop.epoch_loop", "max_steps", "_lightning.py", "length of the only run of a search"),
    ("Trainer().fit_loop.epoch_loop", "min_steps", "_lightning.py", "minimum length of it"),
    ("Trainer().fit_loop", "max_epochs", "_lightning.py", "length of it"),
    ("Trainer().fit_loop", "min_epochs", "_lightning.py", "minimum length of it"),
    ("Trainer().fit_loop", "_should_accumulate", "_lightning.py", ""),
    ("Trainer()", "val_check_interval", "_lightning.py", "validation of a search"),
    ("Trainer()", "_active_loop", "_lightning.py", "duplicates of a distributed sampler, batches of a preconditioner"),
    ("Trainer().validate_loop", "_combined_loader", "_lightning.py", "the same"),
    ("Trainer().strategy", "launcher", "_lightning.py", "spawned processes are not refused"),
    ("DDPStrategy()", "_ddp_comm_hook", "callbacks/gradient_sketch_writer/_example_rows.py", "a false refusal"),
    ("pytorch_lightning.Callback", "_generate_state_key", "_lightning.py", "keys of a checkpoint"),
    ("LightningModule()", "_on_before_batch_transfer", "_lightning.py", "the module gets indexed batches"),
    ("LightningModule()", "_compiler_ctx", "_lightning.py, per_example/hooks.py", "compiled modules are not refused"),
    ("LightningModule()", "_current_fx_name", "subspace/", "phase of a subspace's training step"),
    ("LightningModule()", "_metric_attributes", "subspace/", "logging of metrics from a wrapped module"),
    ("LightningModule()", "_device_mesh", "subspace/_wrapper.py", "sharded modules in a subspace"),
    ("pytorch_lightning.loggers.logger", "DummyLogger", "_lightning.py", ""),
    ("pytorch_lightning.utilities.compile", "_maybe_unwrap_optimized", "_lightning.py", ""),
    ("pytorch_lightning.strategies.launchers.multiprocessing", "_MultiProcessingLauncher", "_lightning.py", ""),
    ("pytorch_lightning.utilities.rank_zero", "WarningCache", "subspace/_optimizer.py", ""),
    ("pytorch_lightning.utilities.parsing", "AttributeDict", "subspace/_wrapper.py", ""),
    ("pytorch_lightning.utilities.seed", "isolate_rng", "subspace/_runner.py", ""),
    ("lightning_fabric.utilities.data", "sized_len", "subspace/_run_callbacks.py", ""),
    ("lightning_fabric.utilities.seed", "_collect_rng_states", "subspace/_run_callbacks.py", ""),
    ("lightning_fabric.utilities.seed", "_set_rng_states", "subspace/_run_callbacks.py", ""),
    ("pytorch_lightning.utilities.rank_zero", "rank_zero_module", "_lightning.py", ""),
    ("CSVLogger()", "_prefix", "callbacks/spectrum_monitor/_logging.py", "keys of pictures"),
    ("CSVLogger()", "LOGGER_JOIN_CHAR", "callbacks/spectrum_monitor/_logging.py", "keys of pictures"),
    ("WandbLogger()", "_wandb_init", "_lightning.py", "runs of a search merge into one"),
    ("WandbLogger()", "_experiment", "_lightning.py", "runs of the user are finished"),
    ("TQDMProgressBar()", "_train_progress_bar", "_lightning.py", "text in front of the bar"),
    ("RichProgressBar()", "train_progress_bar_id", "_lightning.py", "text in front of the bar"),
    # torchmetrics
    ("torchmetrics.MeanMetric()", "_defaults", "autodiff/preserve_state.py", "measurements change metrics"),
    ("torchmetrics.MeanMetric()", "_update_count", "autodiff/preserve_state.py", "measurements change metrics"),
    # torch: modules and tensors
    ("torch.nn.Module()", "_parameters", "several", ""),
    ("torch.nn.Module()", "_buffers", "several", ""),
    ("torch.nn.Module()", "_modules", "several", ""),
    ("torch.nn.Module()", "_forward_hooks", "autodiff/preserve_state.py", ""),
    ("torch.nn.Module()", "_backward_hooks", "autodiff/preserve_state.py", ""),
    ("torch.nn.Module()", "_backward_pre_hooks", "autodiff/preserve_state.py", ""),
    ("torch.nn.Module()", "_compiled_call_impl", "per_example/hooks.py", "compiled modules are not refused"),
    ("torch.nn.Module()", "_apply", "subspace/subspace_model.py", "theta_0 is not moved to a device"),
    ("torch.nn.Module()", "_load_from_state_dict", "subspace/subspace_model.py", "theta_0 is not restored"),
    ("torch.nn.Module()", "_load_from_state_dict", "metrics/", "a score adds the state of other subsets"),
    ("torch.nn.Parameter()", "_backward_hooks", "autodiff/preserve_state.py", ""),
    ("torch.nn.Parameter()", "_version", "several", ""),
    ("torch.nn.Parameter()", "_base", "per_example/", ""),
    ("torch.compile(Module())", "_orig_mod", "autodiff/layout.py, per_example/hooks.py", "names of parameters"),
    ("torch.nn.Conv2d()", "_reversed_padding_repeated_twice", "per_example/rules/convolution.py", ""),
    ("torch.nn.modules.batchnorm", "_BatchNorm", "per_example/rules/normalization.py", ""),
    ("torch.distributed.fsdp._common_utils.FSDP_WRAPPED_MODULE", "_fsdp_wrapped_module", "autodiff/layout.py", "names"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper._CHECKPOINT_WRAPPED_MODULE",
        "_checkpoint_wrapped_module",
        "autodiff/layout.py",
        "names of parameters",
    ),
    (
        "torch.distributed.tensor._utils",
        "compute_local_shape_and_global_offset",
        "autodiff/layout.py, autodiff/shards.py",
        "",
    ),
    ("fully_shard(Module())", "_get_fsdp_state", "autodiff/shards.py", ""),
    ("a group of FSDP", "reduce_grads", "autodiff/shards.py", "gradients that are not reduced count as zero"),
    ("a group of FSDP", "all_reduce_grads", "autodiff/shards.py", "the same"),
    ("a group of FSDP", "_partial_reduce_output", "autodiff/shards.py", "accumulated gradients are lost"),
    ("a group of FSDP", "mesh_info", "autodiff/shards.py", ""),
    ("a parameter of FSDP", "unsharded_accumulated_grad", "autodiff/shards.py", "accumulated gradients are lost"),
    ("a parameter of FSDP", "sharded_param", "autodiff/shards.py", ""),
    (
        "torch.nn.parallel.DistributedDataParallel",
        "_set_params_and_buffers_to_ignore_for_model",  # sets the list that a subspace has
        "subspace/subspace_model.py, subspace/subspace_module.py",
        "n numbers are reduced in place of dim",
    ),
    ("torch.utils.checkpoint", "CheckpointFunction", "autodiff/preserve_state.py", "no second derivative"),
    ("torch.optim.Adam(fused=True)", "_step_supports_amp_scaling", "_lightning.py", "rows off by the loss scale"),
    ("torch.optim.SGD(fused=True)", "_step_supports_amp_scaling", "_lightning.py", "rows off by the loss scale"),
    # torch: autograd
    ("torch.autograd.forward_ad", "_current_level", "operators/_apply.py", "compiled derivatives are zero"),
    (
        "torch._C",
        "_are_functorch_transforms_active",
        "operators/_apply.py, operators/kernels/__init__.py",
        "derivatives are zero, vmap fails",
    ),
    ("torch._C", "_current_graph_task_id", "autodiff/gradients.py", "rows of passes inside a pass are wrong"),
    ("torch._C", "_len_torch_dispatch_stack", "operators/kernels/__init__.py", "linearized sketches are wrong"),
    ("torch.autograd.function", "BackwardCFunction", "autodiff/second_derivatives.py", ""),
    ("custom autograd.Function", "_forward_cls", "autodiff/second_derivatives.py", ""),
    ("AddBackward0", "_saved_alpha", "per_example/autograd_graph.py", ""),
    ("SubBackward0", "_saved_alpha", "per_example/autograd_graph.py", ""),
    ("MulBackward0", "_saved_self", "per_example/autograd_graph.py", ""),
    ("MulBackward0", "_saved_other", "per_example/autograd_graph.py", ""),
    ("MulBackward0", "_raw_saved_self", "per_example/autograd_graph.py", ""),
    ("RepeatBackward0", "_saved_repeats", "per_example/autograd_graph.py", ""),
    ("RepeatBackward0", "_saved_self_sym_sizes", "per_example/autograd_graph.py", ""),
    ("ViewBackward0", "_input_metadata", "per_example/autograd_graph.py", ""),
    ("torch", "_weight_norm", "autodiff/plain_formulas.py", ""),
    ("torch", "_make_dual", "autodiff/plain_formulas.py", ""),
    ("torch._C._nn", "multi_margin_loss", "autodiff/plain_formulas.py", ""),
    ("torch._C._nn", "multilabel_margin_loss", "autodiff/plain_formulas.py", ""),
    ("torch._C._nn", "hardsigmoid", "autodiff/plain_formulas.py", ""),
    ("torch._C._nn", "hardsigmoid_", "autodiff/plain_formulas.py", ""),
    ("torch._C._nn", "mse_loss", "autodiff/plain_formulas.py", ""),
    ("torch._C._nn", "huber_loss", "autodiff/plain_formulas.py", ""),
    ("torch._C._nn", "soft_margin_loss", "autodiff/plain_formulas.py", ""),
    ("torch._C._nn", "silu", "autodiff/plain_formulas.py", ""),
    ("torch._C._nn", "silu_", "autodiff/plain_formulas.py", ""),
    ("torch._C._nn", "mish", "autodiff/plain_formulas.py", ""),
    ("torch._C._nn", "mish_", "autodiff/plain_formulas.py", ""),
    ("torch.return_types", "linalg_slogdet", "autodiff/plain_formulas.py", ""),
    ("torch.nn.functional", "has_torch_function", "autodiff/plain_formulas.py", "endless recursion"),
    ("torch.nn.functional", "has_torch_function_unary", "autodiff/plain_formulas.py", "endless recursion"),
    ("torch.nn.functional", "has_torch_function_variadic", "autodiff/plain_formulas.py", "endless recursion"),
    ("torch.autograd", "has_torch_function", "autodiff/plain_formulas.py", "endless recursion"),
    ("torch._tensor", "has_torch_function_unary", "autodiff/plain_formulas.py", "endless recursion"),
    ("torch.backends.cuda.matmul", "fp32_precision", "operators/_precision.py", "torch < 2.9 has another switch"),
)


def required(owner: object, name: str):  # of any type, which cannot be named without an import
    """Return a private attribute without which results would be silently wrong.

    Raises:
        RuntimeError: If the installed version of the package does not have it.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        kind = owner if isinstance(owner, type) else type(owner)
        what = getattr(owner, "__name__", f"{kind.__module__}.{kind.__qualname__}")
        raise RuntimeError(
            f"{what} has no {name} in the version that is installed, and without it numbers would be wrong; install "
            "versions that README.md lists, and report this."
        ) from None
