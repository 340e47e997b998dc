"""Measurement of a module without a trace: whatever a forward pass changes is restored."""

import copy
import functools
import hashlib
import random
import signal
import sys
import threading
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint

from lightning_sketch._private import required

_PLAIN = (bool, int, float, str, type(None), tuple)
_SMALL = 1 << 20
_OF_TORCH = frozenset(vars(nn.Module()))

# "eval", or "train" for the mode that every submodule is in.
Mode = Literal["eval", "train"]

# Locked during a measurement: the attention, checkpointing and compiler that torch uses are chosen for the process.
_process = threading.RLock()


class _Depths(threading.local):
    """The number of nested measurements that are running in this thread, by the id of the module."""

    def __init__(self) -> None:
        self.of: Counter[int] = Counter()


_depths = _Depths()


def measurement_depth(module: nn.Module) -> int:
    """Return the number of nested measurements of this module that are running in this thread.

    Hooks that were installed at another depth are inactive: the forward pass is not theirs.
    """
    return _depths.of[id(module)]


class _Interrupts:
    """Interrupts (SIGINT) of the main thread, held back while a module is not in its own state.

    Ctrl-C may come between any two instructions, also where state is half restored. So it is only noted, and raised
    where a batch begins (`raise_interrupt`) or after the state is restored. A second one is raised at once, unless
    state is being restored.
    """

    def __init__(self) -> None:
        self.depth = self.count = 0
        self.restoring = False
        self.handler: Any = None

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if self.depth == 0 and callable(handler := signal.getsignal(signal.SIGINT)):
            self.handler, self.count = handler, 0
            signal.signal(signal.SIGINT, self._note)
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self.depth -= 1
        if self.depth or self.handler is None:
            return
        handler, self.handler = self.handler, None
        signal.signal(signal.SIGINT, handler)
        if self.count:
            self.count = 0
            handler(signal.SIGINT, None)

    def _note(self, number: int, frame: Any) -> None:
        self.count += 1
        if self.count > 1 and not self.restoring:
            self.handler(number, frame)

    def deliver(self) -> None:
        """Raise an interrupt that was held back, if this is the main thread."""
        if self.count and self.handler and threading.current_thread() is threading.main_thread():
            self.count = 0
            self.handler(signal.SIGINT, None)


interrupts_held_back = _Interrupts()


def raise_interrupt() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed since the last batch of a measurement."""
    interrupts_held_back.deliver()


class Preserved:
    """The state of a module during a measurement, as `preserve_state` yields it.

    Args:
        module: The module that is measured.
    """

    def __init__(self, module: nn.Module, mode: Mode):
        self._module, self._mode = module, mode
        seen: set[int] = set()
        self._generators = [g for part in module.modules() for v in vars(part).values() for g in _generators(v, seen)]
        self._restore = self._now = _snapshot(module)
        self._kept: dict[int, Callable[[], bool]] = {}
        for part in module.modules():
            if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.max_norm is not None:
                self.keep(part.weight)
        self._trainable = {n: (p, p._version) for n, p in module.named_parameters() if p.requires_grad}

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Let `restore` restore the present state, inside a context where buffers were replaced by others."""
        before, self._now = self._now, _snapshot(self._module)
        try:
            yield
        finally:
            self._now = before

    def keep(self, parameter: Tensor) -> None:
        """Copy a trainable parameter that the forward pass writes into, to restore its present values at the end."""
        self._kept.setdefault(id(parameter), _parameter(parameter))

    def end(self) -> None:
        """Restore everything, and warn of trainable parameters that were written into without a copy."""
        interrupts_held_back.restoring = True
        try:
            self._restore()
            for put_back in self._kept.values():
                put_back()
        finally:
            interrupts_held_back.restoring = False
        changed = [name for name, (p, v) in self._trainable.items() if p._version != v and id(p) not in self._kept]
        if changed:
            warnings.warn(
                f"the forward pass writes into trainable parameters ({', '.join(changed[:3])}), which a measurement "
                "cannot undo; compute a changed copy of the weight instead of changing it in place.",
                stacklevel=2,
            )

    def draw(self, *key: int) -> None:
        """Set every random generator to a state that depends on these numbers only.

        These are the generators of Python, numpy and torch, on every device in use, and those that the module owns. A
        loss that draws from them then draws the same numbers wherever it is called with this key.
        """
        seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1
        random.seed(seed)
        np.random.seed(seed % (1 << 32))
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # otherwise each call is put on a list, to be made later
            torch.cuda.manual_seed_all(seed)
        if torch.backends.mps.is_available():
            torch.mps.manual_seed(seed)
        for own in self._generators:
            _seed(own, seed)

    def restore(self) -> bool:
        """Restore buffers, attributes and frozen parameters, and return whether an evaluation had changed any."""
        changed = self._now()
        if self._mode == "eval":
            for part in self._module.modules():
                part.training = False
        return changed


@contextmanager
def preserve_state(module: nn.Module, *, mode: Mode = "eval", as_trained: bool = False) -> Iterator[Preserved]:
    """Run a module, inside this context, as a pure function of its parameters as far as that is possible.

    Inside: evaluation mode, gradients on, autocast off, compiled parts run eagerly, attention by plain operations (the
    fused kernels have no second derivative), and activation checkpointing of the non-reentrant kind, for the same
    reason. Hooks on gradients do not run, nor do those of `wandb.watch`: they would change the products, or record them
    as training.

    Restored afterwards, also after an error: the random state of Python, numpy and torch on every device, the mode of
    every submodule, buffers, frozen parameters, trainable weights of embeddings with `max_norm`, states of metrics, and
    attributes of modules that are numbers, strings, lists, dicts, sets, deques, random generators and small tensors,
    however deep. Costs a copy of these. Not restored: files, globals, the contents of other objects, tensor attributes
    of more than 2^20 numbers, and frozen parameters where they outnumber the trainable ones (a large frozen base is
    never copied); other trainable parameters that a forward pass writes into are named in a warning. An interrupt
    (Ctrl-C) is held back until all is restored.

    One thread of a process measures at a time, each its own module; the others wait for it. Another thread may draw the
    same numbers from the global random generators twice, since their state is restored, and its attention runs by plain
    operations in the meantime.

    Args:
        module: The module to measure.
        mode: "eval", or "train" to leave every submodule in the mode that it is in.
        as_trained: Whether autocast, fused attention, activation checkpointing and compiled parts stay as they are,
            where nothing is differentiated twice.

    Yields:
        The preserved state, by which random numbers can be fixed and the state restored before each evaluation.

    Raises:
        ValueError: if the mode is neither.

    >>> module = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    >>> with preserve_state(module, mode="train"):
    ...     _ = module(torch.randn(8, 2))
    >>> int(module[0].num_batches_tracked)
    0
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode is 'eval' or 'train', got {mode!r}.")
    with ExitStack() as stack:
        stack.enter_context(interrupts_held_back)
        stack.enter_context(_process)
        stack.enter_context(_one_deeper(module))
        stack.enter_context(_random_state())
        preserved = Preserved(module, mode)
        stack.callback(preserved.end)
        stack.enter_context(_no_hooks(module))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if not as_trained:
            _plainly(module, stack)
        if mode == "eval":
            for part in module.modules():
                part.training = False
        yield preserved


def _plainly(module: nn.Module, stack: ExitStack) -> None:
    """Enter what makes a module run by operations that can be differentiated twice."""
    for device in {p.device.type for p in module.parameters()}:
        stack.enter_context(torch.autocast(device, enabled=False))
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    stack.enter_context(_checkpoints_by_hooks())
    if any(isinstance(part, nn.RNNBase) for part in module.modules()):  # cuDNN's RNNs have no second derivative
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes a second and 24 MB
        stack.enter_context(torch.compiler.set_stance("force_eager"))


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
    """Run reentrant activation checkpointing as the other kind, which can be differentiated twice."""
    namespace: Any = checkpoint
    reentrant = namespace.CheckpointFunction

    class ByHooks:
        @staticmethod
        def apply(function: Callable, preserve_rng_state: bool, *args: Any) -> Any:
            return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)

    namespace.CheckpointFunction = ByHooks
    try:
        yield
    finally:
        namespace.CheckpointFunction = reentrant


@contextmanager
def _no_hooks(module: nn.Module) -> Iterator[None]:
    """Remove hooks on gradients, and forward hooks that only watch, for a time; their handles stay valid."""
    tables: list[Any] = [p._backward_hooks for p in module.parameters() if p._backward_hooks]
    for part in module.modules():
        tables += [part._backward_hooks, part._backward_pre_hooks]
    removed: list[tuple[Any, dict]] = [(table, dict(table)) for table in tables if table]
    for part in module.modules():
        watching = {k: h for k, h in part._forward_hooks.items() if getattr(h, "__module__", "").startswith("wandb.")}
        removed += [(part._forward_hooks, watching)] if watching else []
    before = [(table, dict(table)) for table, _ in removed]
    for table, hooks in removed:
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


def _snapshot(module: nn.Module) -> Callable[[], bool]:
    """Copy the state of a module, and return a function that restores it and says whether it was another."""
    restore: list[Callable[[], bool]] = []
    for part in module.modules():
        restore.append(_attributes(part))
        states: Any = required(part, "_defaults") if _is_metric(part) else {}
        tensors = [*part._buffers.values(), *(getattr(part, name, None) for name in states)]
        tensors += [t for t in vars(part).values() if isinstance(t, Tensor) and t.numel() <= _SMALL]
        restore += [_tensor(t) for t in tensors if isinstance(t, Tensor)]
    frozen = [p for p in module.parameters() if not p.requires_grad]
    if sum(p.numel() for p in frozen) <= sum(p.numel() for p in module.parameters() if p.requires_grad):
        restore += [_parameter(p) for p in frozen]

    return lambda: sum(put_back() for put_back in restore) > 0


def _is_metric(part: nn.Module) -> bool:
    torchmetrics = sys.modules.get("torchmetrics")  # if it was never imported, there are no metrics
    return torchmetrics is not None and isinstance(part, torchmetrics.Metric)


def _parameter(parameter: Tensor) -> Callable[[], bool]:
    """Copy a frozen parameter, which a step may change in place or give other data, and return what restores it."""
    data, values = parameter.data, _tensor(parameter.data)

    def put_back() -> bool:
        other = parameter.data_ptr() != data.data_ptr()
        parameter.data = data
        return values() or other

    return put_back


def _tensor(tensor: Tensor) -> Callable[[], bool]:
    """Copy a tensor, and return a function that restores its values."""
    copy = tensor.detach().clone()
    if tensor.layout != torch.strided:
        version = tensor._version

        def put_back_sparse() -> bool:
            if tensor._version == version:
                return False
            tensor.copy_(copy)
            return True

        return put_back_sparse

    def put_back() -> bool:
        # The version does not help here: batch norm changes its buffers without a new version. Nor is there a new one
        # now, so that a graph which saved the buffer before can still run backward.
        if torch.equal(tensor, copy):
            return False
        with torch.inference_mode(tensor.is_inference()):
            tensor.data.copy_(copy)
        return True

    return put_back


def _attributes(part: nn.Module) -> Callable[[], bool]:
    """Copy the attributes of a submodule, with their contents, and return a function that restores them."""
    before = _own(part)
    training, buffers = part.training, dict(part._buffers)
    seen: set[int] = set()
    contents = [_contents(value, seen) for value in before.values()]

    def put_back() -> bool:
        changed = not (_same_items(part._buffers, buffers) and _same_items(_own(part), before))
        part.training = training
        if not isinstance(part, torch.jit.ScriptModule):  # has a fixed set of buffers
            part._buffers.clear()
            part._buffers.update(buffers)
        for name in vars(part).keys() - before.keys() - _OF_TORCH:
            del part.__dict__[name]
        for name, value in before.items():
            part.__dict__[name] = value
        return sum(restore() for restore in contents) > 0 or changed

    return put_back


def _own(part: nn.Module) -> dict[str, Any]:
    """Return the attributes of a submodule that are not torch's."""
    return {name: value for name, value in vars(part).items() if name not in _OF_TORCH}


def _same_items(a: Any, b: Any) -> bool:
    """Return whether two collections of one kind hold the very same objects."""
    if isinstance(a, set):
        return a == b
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _contents(value: Any, seen: set[int]) -> Callable[[], bool]:
    """Copy the contents of a container, and of containers in it, and return a function that restores them."""
    if id(value) in seen:
        return lambda: False
    seen.add(id(value))
    items: Any
    inner: Any
    if type(value) in (list, deque):
        items, inner = list(value), value
    elif type(value) in (dict, defaultdict, OrderedDict, Counter):
        items, inner = dict(value), value.values()
    elif type(value) is set:
        items, inner = set(value), ()
    elif isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
        return restorer_of_generator(value)
    else:
        return lambda: False
    deeper = [_contents(v, seen) for v in inner if not isinstance(v, _PLAIN)]

    def put_back() -> bool:
        changed = not _same_items(value, items)
        value.clear()
        (value.extend if isinstance(value, list | deque) else value.update)(items)
        return sum(restore() for restore in deeper) > 0 or changed

    return put_back


def _generators(value: Any, seen: set[int]) -> Iterator[Any]:
    """Yield the random generators in an attribute of a module, however deep."""
    if isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
        yield value
    elif isinstance(value, list | tuple | set | deque | dict) and id(value) not in seen:
        seen.add(id(value))
        for item in value.values() if isinstance(value, dict) else value:
            yield from _generators(item, seen)


def _seed(generator: Any, seed: int) -> None:
    """Set the state of a random generator."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        bits: Any = generator.bit_generator
        bits.state = type(bits)(seed).state
    else:
        generator.seed(seed if isinstance(generator, random.Random) else seed % (1 << 32))


def restorer_of_generator(value: Any) -> Callable[[], bool]:
    """Copy the state of a random generator that a module owns, and return a function that restores it."""
    restore: Callable[[], object]
    if isinstance(value, np.random.Generator):
        bits: Any = value.bit_generator
        restore = functools.partial(setattr, bits, "state", copy.deepcopy(bits.state))
    elif isinstance(value, torch.Generator):
        restore = functools.partial(value.set_state, value.get_state())
    elif isinstance(value, np.random.RandomState):
        restore = functools.partial(value.set_state, value.get_state())
    else:
        restore = functools.partial(value.setstate, value.getstate())
    return lambda: restore() is restore  # what a generator has drawn is no change of state: draws are set anyway
