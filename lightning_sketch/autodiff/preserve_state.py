"""Measure a module without leaving a trace: what a forward pass changes is put back."""

import random
import sys
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint

from lightning_sketch._private import required

_PLAIN = (bool, int, float, str, type(None), tuple)
_SMALL = 1 << 20
_OF_TORCH = frozenset(vars(nn.Module()))

_process = threading.RLock()
"""Held during a measurement: which attention, checkpointing and compiler torch uses is one choice for the process."""


class _Depths(threading.local):
    """How many measurements are going on in this thread, one inside the other, on each module, by id."""

    def __init__(self):
        self.of: Counter[int] = Counter()


_depths = _Depths()


def measurement_depth(module: nn.Module) -> int:
    """Return how many measurements of this module are going on in this thread, one inside the other.

    Hooks that were made at another depth keep still: the forward pass is not theirs.
    """
    return _depths.of[id(module)]


@contextmanager
def preserve_state(module: nn.Module, mode: str = "eval") -> Iterator[None]:
    """Run the module inside, as a pure function of its parameters as far as that is possible.

    Inside: evaluation mode, gradients on, autocast off, compiled parts run eagerly, attention by plain
    operations (the fused kernels have no second derivative), and activation checkpointing of the non-reentrant
    kind, for the same reason.

    Inside, hooks on gradients do not fire, nor do those of `wandb.watch`: they would change the products, or
    count them as training.

    Put back after, also after an error: the random state of Python, numpy and torch on every device, the
    mode of every submodule, buffers, frozen parameters, states of metrics, and number, string, list, dict,
    set, deque and small tensor attributes of modules, however deep. Costs a copy of these. Not put back:
    files, globals, what is inside other objects, tensor attributes of more than 2^20 numbers, and frozen
    parameters where they outnumber the trainable ones (a large frozen base is never copied).

    Of several threads of a process one measures at a time, each its own module; the others wait for it. What another
    thread draws meanwhile from the global random generators it may draw again, since their state is put back, and its
    own attention runs by plain operations meanwhile.

    Args:
        module: what is measured.
        mode: "eval", or "train" to leave every submodule in the mode it is in.

    Raises:
        ValueError: for another mode.
    """
    if mode not in ("eval", "train"):
        raise ValueError(f"mode is 'eval' or 'train', got {mode!r}.")
    with ExitStack() as stack:
        stack.enter_context(_process)
        stack.enter_context(_one_deeper(module))
        stack.enter_context(_random_state())
        stack.callback(_snapshot(module))
        stack.enter_context(_no_hooks(module))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in {p.device.type for p in module.parameters()}:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_checkpoints_by_hooks())
        if any(isinstance(part, nn.RNNBase) for part in module.modules()):  # cuDNN's have no second derivative
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes a second and 24 MB
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if mode == "eval":
            for part in module.modules():
                part.training = False
        yield


@contextmanager
def _one_deeper(module: nn.Module) -> Iterator[None]:
    parts = [id(part) for part in module.modules()]
    _depths.of.update(parts)
    try:
        yield
    finally:
        _depths.of.subtract(parts)
        for part in parts:
            if not _depths.of[part]:
                del _depths.of[part]


@contextmanager
def _checkpoints_by_hooks() -> Iterator[None]:
    """Activation checkpointing of the reentrant kind as the other kind: only that can be differentiated twice."""
    reentrant = checkpoint.CheckpointFunction

    class ByHooks:
        @staticmethod
        def apply(function: Callable, preserve_rng_state: bool, *args: object):
            return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)

    checkpoint.CheckpointFunction = ByHooks
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = reentrant


@contextmanager
def _no_hooks(module: nn.Module) -> Iterator[None]:
    """Take away hooks on gradients, and forward hooks that only watch; their handles stay valid."""
    tables = [p._backward_hooks for p in module.parameters() if p._backward_hooks]
    for part in module.modules():
        tables += [part._backward_hooks, part._backward_pre_hooks]
    held = [(table, dict(table)) for table in tables if table]
    for part in module.modules():
        watching = {k: h for k, h in part._forward_hooks.items() if getattr(h, "__module__", "").startswith("wandb.")}
        held += [(part._forward_hooks, watching)] if watching else []
    before = [(table, dict(table)) for table, _ in held]
    for table, hooks in held:
        for key in hooks:
            del table[key]
    try:
        yield
    finally:
        for table, whole in before:  # in their order, which is that of their calls
            added = {key: hook for key, hook in table.items() if key not in whole}
            table.clear()
            table.update({**whole, **added})


@contextmanager
def _random_state() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if mps is not None:
            torch.mps.set_rng_state(mps)


def _snapshot(module: nn.Module) -> Callable[[], None]:
    """Remember all parts of a module; what is returned puts them back."""
    restore: list[Callable[[], None]] = []
    for part in module.modules():
        restore.append(_attributes(part))
        states = required(part, "_defaults") if _is_metric(part) else {}
        tensors = [*part._buffers.values(), *(getattr(part, name, None) for name in states)]
        tensors += [t for t in vars(part).values() if isinstance(t, Tensor) and t.numel() <= _SMALL]
        restore += [_tensor(t) for t in tensors if isinstance(t, Tensor)]
    frozen = [p for p in module.parameters() if not p.requires_grad]
    if sum(p.numel() for p in frozen) <= sum(p.numel() for p in module.parameters() if p.requires_grad):
        restore += [_parameter(p) for p in frozen]
    return lambda: [put_back() for put_back in restore] and None


def _is_metric(part: nn.Module) -> bool:
    torchmetrics = sys.modules.get("torchmetrics")  # without it there are none
    return torchmetrics is not None and isinstance(part, torchmetrics.Metric)


def _parameter(parameter: nn.Parameter) -> Callable[[], None]:
    """Remember a frozen parameter, which may be changed in place or given another tensor, as a mean teacher's is."""
    data, values = parameter.data, _tensor(parameter.data)

    def put_back() -> None:
        parameter.data = data
        values()

    return put_back


def _tensor(tensor: Tensor) -> Callable[[], None]:
    copy = tensor.detach().clone()
    if tensor.layout != torch.strided:
        version = tensor._version
        return lambda: tensor.copy_(copy) if tensor._version != version else None

    def put_back() -> None:
        # Versions say nothing here: batch norm changes its buffers without counting. And none is counted now,
        # so that a graph which saved the buffer before can still run backward.
        if not torch.equal(tensor, copy):
            with torch.inference_mode(tensor.is_inference()):
                tensor.data.copy_(copy)

    return put_back


def _attributes(part: nn.Module) -> Callable[[], None]:
    before = {name: value for name, value in vars(part).items() if name not in _OF_TORCH}
    training, buffers = part.training, dict(part._buffers)
    seen: set[int] = set()
    contents = [_contents(value, seen) for value in before.values()]

    def put_back() -> None:
        part.training = training
        part._buffers.clear()
        part._buffers.update(buffers)
        for name in vars(part).keys() - before.keys() - _OF_TORCH:
            del part.__dict__[name]
        for name, value in before.items():
            part.__dict__[name] = value
        for restore in contents:
            restore()

    return put_back


def _contents(value: object, seen: set[int]) -> Callable[[], None]:
    """Remember what is in a container, and in the containers in it."""
    if id(value) in seen:
        return lambda: None
    seen.add(id(value))
    if type(value) in (list, deque):
        items, inner = list(value), value
    elif type(value) in (dict, defaultdict, OrderedDict, Counter):
        items, inner = dict(value), value.values()
    elif type(value) is set:
        items, inner = set(value), ()
    else:
        return lambda: None
    deeper = [_contents(v, seen) for v in inner if not isinstance(v, _PLAIN)]

    def put_back() -> None:
        value.clear()
        (value.extend if isinstance(value, list | deque) else value.update)(items)
        for restore in deeper:
            restore()

    return put_back
