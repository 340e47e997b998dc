"""A module that trains another one in a random subspace of its weights, θ = θ₀ + Dᵀ w, with any training loop."""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_sketch._arguments import kind_of
from lightning_sketch.autodiff.fingerprint import fingerprint
from lightning_sketch.autodiff.functional import swap_tensors
from lightning_sketch.subspace._doubling import block_sizes
from lightning_sketch.subspace._gradient import as_function_of_w, trainable
from lightning_sketch.subspace._state_dict import complete_state, decoded, encoded, trim_state
from lightning_sketch.subspace._weights import FrozenWeights, Weights
from lightning_sketch.subspace.directions import Directions

if TYPE_CHECKING:
    from lightning_sketch.subspace.export import Quantized

Others = Literal["frozen", "full"]
Structure = Literal["layers"]


class Subspace(nn.Module):
    """What `SubspaceModel` and `SubspaceModule` share: w, the weights that follow it, and what is saved of both.

    The weights are no parameters of a subspace, since w determines them: `parameters()` leaves them out.
    """

    directions: Directions
    weights: Weights
    module: Any
    _last_w: Tensor | None
    _initialized = False
    _follows = _shows_weights = False

    def _configure(
        self,
        dim: int,
        sketch: str,
        seed: int,
        parameters: str | Sequence[str],
        max_dim: int | None,
        others: Others,
        head: str | Sequence[str] | None,
        structure: Structure | None,
        scale: float | int | None,
        save_theta0: bool,
    ) -> None:
        """Check and keep the arguments.

        Raises:
            ValueError: If one is out of its range.
        """
        if others not in get_args(Others):
            raise ValueError(f"others={others!r} is not known; use 'frozen' or 'full'.")
        if structure not in (None, *get_args(Structure)):
            raise ValueError(f"structure={structure!r} is not known; use 'layers' or None.")
        if structure is not None and max_dim is not None:
            raise ValueError("structure='layers' has no directions that can be doubled; leave max_dim out.")
        if scale is not None and not (isinstance(scale, float | int) and 0 < scale < math.inf):
            raise ValueError(f"need a scale > 0, got {scale!r}; 0.3, 1 and 3 are usual.")
        self.others, self.save_theta0 = others, save_theta0
        largest = None if max_dim is None else whole(max_dim, "max_dim")
        self._asked_scale = None if scale is None else float(scale)  # None if the optimizer will decide
        self._arguments = (whole(dim, "dim"), sketch, whole(seed, "seed"), largest, self._asked_scale or 1.0)
        self._chosen = (parameters, head, structure is not None)
        self.register_load_state_dict_post_hook(_move_weights)

    def _initialize(self) -> None:
        """Make the directions, w = 0, and θ₀ from the module's current weights, and freeze the module."""
        dim, kind, seed, max_dim, scale = self._arguments
        self.weights = Weights(self.module, *self._chosen)
        of_layers = self.weights.num_layers
        if of_layers and dim <= of_layers:
            raise ValueError(
                f"structure='layers' takes one number for each of {of_layers} layers, so it needs dim > {of_layers}, "
                f"got dim={dim}."
            )
        self.directions = Directions.of(kind, self.n, dim - of_layers, seed, max_dim, scale)
        theta, head = self.weights.parameters(), set(map(id, self.weights.head))
        self._trainable = {name for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        for parameter in theta if self.others == "full" else self.module.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in head)
        dtype = torch.promote_types(theta[0].dtype, torch.float32)
        blocks = [
            nn.Parameter(torch.zeros(size, dtype=dtype, device=theta[0].device)) for size in block_sizes(dim, max_dim)
        ]
        self.w = blocks[0] if max_dim is None else nn.ParameterList(blocks)
        self._last_w = self.coordinates().detach().clone()
        self.frozen = FrozenWeights(self.module, theta)
        self._fingerprint = self._fingerprint_of_start()
        self._initialized = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for parameter in self.module.parameters():
            if parameter.is_shared():  # by processes that a Trainer spawns; of `parameters()` it makes copies itself
                parameter.data = parameter.data.clone()

    @property
    def n(self) -> int:
        """The number of weights that move."""
        return self.weights.layout.n

    @property
    def dim(self) -> int:
        """The number of trained coordinates in use."""
        return len(self.coordinates())

    @property
    def blocks(self) -> list[Tensor]:
        """The parts of w, a parameter each: one, or with `max_dim` several of sizes dim, dim, 2 dim, 4 dim, ..."""
        return list(self.w) if isinstance(self.w, nn.ParameterList) else [self.w]

    @property
    def leaves(self) -> list[nn.Parameter]:
        """The parameters that the optimizer trains for w: its blocks, or what a parametrization computes w from."""
        return [parameter for name, parameter in self.named_parameters() if not name.startswith("module.")]

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The names of parameters whose gradients DDP does not reduce: it reduces the gradient of w."""
        return [f"module.{name}" for name in self.frozen.following]

    def coordinates(self) -> Float[Tensor, " dim"]:
        """Return the entries of w that are in use, as one vector of shape (dim,)."""
        return torch.cat(tuple(self.blocks))[: self.directions.dim] if len(self.blocks) > 1 else self.blocks[0]

    def cut(self, vector: Float[Tensor, " dim"]) -> list[Tensor]:
        """Split a vector of the entries in use into blocks as w is split, with zeros for the entries not in use."""
        sizes = [len(block) for block in self.blocks]
        whole = self.blocks[0].new_zeros(sum(sizes))
        whole[: len(vector)] = vector
        return list(whole.split(sizes))

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over w and the parameters outside of the subspace, without the weights that w determines."""
        start = f"{prefix}.module." if prefix else "module."
        hidden = self._initialized and not self._shows_weights
        following = {start + name for name in self.frozen.following} if hidden else set()
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            if name not in following:
                yield name, parameter

    @torch.no_grad()
    def ready(self) -> None:
        """Set the weights to θ₀ + Dᵀ w if w has changed since the last call; called before each use of the module.

        Weights that were loaded or set by others before w has moved become θ₀.

        Raises:
            RuntimeError: If others wrote into the weights after w has moved.
        """
        if self._follows:
            return
        if self._last_w is not None:
            self._take_over(self._last_w)
        w = self.coordinates()
        if self._last_w is None or self._last_w.shape != w.shape or not torch.equal(self._last_w, w):
            self.weights.assign(self.directions, w, frozen=self._last_w is None)
            self._last_w = w.clone()

    def _take_over(self, w: Tensor) -> None:
        """Make weights that others wrote the new θ₀, or refuse them once w has moved."""
        altered = self.weights.altered(self.directions, w)
        if not altered:
            return
        if w.any() and self.weights.are_at_start(altered):  # as by a setup() that loads θ₀ for each stage
            self._last_w = None
            return
        names = ", ".join(altered[:3]) + (", ..." if len(altered) > 3 else "")
        if w.any() or self.coordinates().any():
            raise RuntimeError(
                f"{len(altered)} weights were written to after training began: {names}. In a subspace they are "
                "θ₀ + Dᵀ w, and the next step would overwrite them. Load or set weights before the first step, or "
                "leave those that the module writes itself out of the subspace: parameters='...'."
            )
        self.weights.reset_start()
        self._fingerprint = self._fingerprint_of_start()
        rank_zero_info(f"{len(altered)} weights were written to since the subspace was made: {names}; they are θ₀ now.")

    @contextmanager
    def following(self) -> Iterator[None]:
        """Make the weights differentiable functions of w within the context, any number of times; takes n numbers."""
        if self._follows or not self._initialized:
            yield
            return
        values = self.weights.values_at(self.directions, self.coordinates())
        with swap_tensors(self.module, self.weights.parameters(), values):
            self._follows = True
            try:
                yield
            finally:
                self._follows = False

    def export(self, path: str | Path, levels: "int | Quantized | None" = None) -> dict[str, int]:
        """Write w and what describes the subspace to one safetensors file, from which `load_subspace` makes the module.

        Args:
            path: The path of the file.
            levels: None to save w as it is; a number, or a rounded w, as in `save_subspace`.

        Returns:
            The number of bytes of each part.
        """
        from lightning_sketch.subspace.export import save_subspace  # which imports this file

        return save_subspace(self, path, levels)

    def materialize(self) -> Any:
        """Return a copy of the module with the trained weights, independent of this one and trainable in full."""
        self.ready()
        plain = copy.deepcopy(self.module)
        for name, parameter in plain.named_parameters():
            if name in self._trainable:
                parameter.requires_grad_(True)
        return plain

    def double_dim(self) -> None:
        """Double the number of directions, of which the current ones are the first; the weights stay the same."""
        self.refuse_computed_w("doubled")
        before, self.directions = self.directions, self.directions.doubled()
        factor = (self.directions.dim / before.dim) ** 0.5
        with torch.no_grad():
            for block in self.blocks:
                block.mul_(factor)
            self.weights.lengthen(factor, self.directions.dim)

    @torch.no_grad()
    def set_scale(self, scale: float | int) -> None:
        """Change the factor of D, and w with it, so that the weights stay the same."""
        factor = self.directions.scale / scale
        self.directions = replace(self.directions, scale=scale)
        if factor == 1:
            return
        if self.coordinates().any():
            self.refuse_computed_w("given another scale")
            for block in self.blocks:
                block[: len(block) - self.weights.num_layers].mul_(factor)
        self.weights.lengthen(factor, self.directions.dim)
        self._last_w = None

    def refuse_computed_w(self, done: str) -> None:
        """Check that w is no result of a parametrization, which cannot be written to.

        Raises:
            RuntimeError: If it is.
        """
        if not set(map(id, self.blocks)) <= set(map(id, self.leaves)):
            raise RuntimeError(f"w is computed by a parametrization, so it cannot be {done}; remove it first.")

    def theta0(self) -> dict[str, Tensor]:
        """Return the initial weights, by name; of sharded parameters, this rank's shards."""
        return dict(zip(self.weights.layout.names, self.weights.start, strict=True))

    def get_extra_state(self) -> dict[str, Any]:
        """Return the spec and the scale of the directions, the number in use, and a fingerprint of θ₀."""
        motions, names = self.weights.motions, self.weights.layout.names
        state = {
            "directions": self.directions.spec(),
            "dim": self.directions.dim,
            "theta0": self._fingerprint,
            "scale": self.directions.scale,
        }
        if any(motion != type(motion)() for motion in motions):
            state["motions"] = {name: tuple(motion) for name, motion in zip(names, motions, strict=True)}
        return state

    def set_extra_state(self, state: Any) -> None:
        """Restore the scale of the directions, the number in use, and the fingerprint of θ₀."""
        state = decoded(state)
        self.directions = replace(self.directions, dim=state["dim"], scale=state.get("scale", 1.0))
        self._fingerprint = state["theta0"]
        self.weights.set_motions(state.get("motions", {}))

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """Return w, the module's buffers, and parameters trained in full; with `save_theta0`, also the initial weights.

        Frozen parameters are contained only if the module has changed them.
        """
        if not self._initialized:  # before `configure_model`
            return super().state_dict(*args, prefix=prefix, **kwargs)
        self.ready()
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        trim_state(self, state, prefix)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the result of `state_dict`; overridden here since a parent module calls this method when it loads."""
        self.ready()
        complete_state(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _fingerprint_of_start(self) -> int:
        following = set(map(id, self.weights.parameters()))
        return fingerprint([p for p in self.module.parameters() if id(p) in following or not p.requires_grad])

    def set_gradient(self, gradient: Float[Tensor, " dim"] | None) -> None:
        """Set the gradient of w, and so that of the parameters that it is computed from."""
        for leaf in self.leaves:
            leaf.grad = None
        if gradient is None:
            return
        with torch.enable_grad():  # by autograd, for hooks on w
            pairs = zip(self.blocks, self._gradient_blocks(gradient), strict=True)
            live = [(block, part.to(block)) for block, part in pairs if block.requires_grad]
            torch.autograd.backward([block for block, _ in live], [part for _, part in live])

    def _gradient_blocks(self, gradient: Tensor | None) -> list[Tensor]:
        """Return a gradient of the entries in use in blocks as w; zeros for None."""
        return self.cut(self.blocks[0].new_zeros(0) if gradient is None else gradient)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Convert θ₀ like the weights, and keep w in float32 at least, since it is a sum of many small steps."""
        if self._initialized and self._last_w is not None:
            self._take_over(self._last_w)
        before = [block.detach() for block in self.blocks] if self._initialized else []
        with self.frozen.cast(fn) if self._initialized else nullcontext():
            super()._apply(fn, recurse)
        if self._initialized:
            for block, old in zip(self.blocks, before, strict=True):
                if block.dtype.itemsize < 4:
                    block.data = old.to(block.device)
            self.weights.to(fn)
            self._last_w = None
            if not self.blocks[0].is_meta:
                self.ready()  # now, since torch.compile cannot do it while it traces a graph
        return self


class SubspaceModel(Subspace):
    """Train a module along `dim` random directions of its weights, in any loop: θ = θ₀ + Dᵀ w, and w is the parameter.

    It is called as the module is, and `parameters()` has w in place of the weights, for the optimizer. Attributes of
    the module can be read and set on it. For Lightning there is `SubspaceModule`, whose arguments these are.

    Gradients flow by `backward` from the tensors that a call returns, once. For a loss of anything else, such as an
    attribute that the forward pass sets or a penalty on `module.parameters()`, for `autograd.grad`, and for second
    derivatives, compute output and loss inside `with model.following():`, which takes a vector of length n more.

    The Trainer of Hugging Face trains it; to evaluate a loss, it needs `TrainingArguments(label_names=["labels"])`.

    The weights of `model.module` are at the w of the last call; `model.ready()` brings them to w, and `materialize()`
    returns a copy there. Freeze layers before they are wrapped. Several GPUs need DDP.

    Cost of a training step: the module's own, one product with D and one with Dᵀ. Memory: one more vector of length n,
    for θ₀.

    Args:
        module: The module to train, a Hugging Face model for instance. Its parameters are frozen from here on.
        dim: The number of trained coordinates, 0 < dim <= n.
        sketch: The kind of sketch whose rows are the directions.
        seed: The seed of the directions.
        parameters: A shell-style pattern, or several, of the names of the parameters that w moves.
        max_dim: The number up to which `dim` can be doubled by `double_dim`; None if it stays.
        others: What is done with the other trainable parameters: "frozen", or "full" to train them as usual.
        head: A pattern of the names of parameters that are outside of the subspace and trained as usual, or several.
        structure: "layers" to learn a scale for each layer, with one of the `dim` numbers.
        scale: The factor of D.
        save_theta0: Whether the state dict contains θ₀; otherwise it has its fingerprint.

    Raises:
        ValueError: If an argument is out of its range, or no parameter matches.
        RuntimeError: At a call, if others wrote into the weights after w has moved.
        TypeError: At a call, if the output has parts other than tensors, numbers, strings and containers of them.

    >>> net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    >>> model = SubspaceModel(net, 4)
    >>> [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    [('w', (4,))]
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    >>> model(torch.ones(3, 8)).square().sum().backward()
    >>> optimizer.step()
    >>> plain = model.materialize()

    Source: Li, Farkhoor, Liu & Yosinski (2018), "Measuring the intrinsic dimension of objective landscapes", ICLR 2018,
    arXiv:1804.08838, eq. (2).
    """

    def __init__(
        self,
        module: nn.Module,
        dim: int,
        *,
        sketch: str = "block_srht",
        seed: int = 0,
        parameters: str | Sequence[str] = "*",
        max_dim: int | None = None,
        others: Others = "frozen",
        head: str | Sequence[str] | None = None,
        structure: Structure | None = None,
        scale: float | int = 1.0,
        save_theta0: bool = False,
    ):
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"SubspaceModel wraps a module, got {kind_of(module)}; pass an nn.Module.")
        self.module = module
        self._configure(dim, sketch, seed, parameters, max_dim, others, head, structure, scale, save_theta0)
        self._initialize()
        call = functools.partial(SubspaceModel._call, self)
        call.__signature__ = inspect.signature(module.forward)  # type: ignore[attr-defined]  # for those who ask for it
        self.__dict__["forward"] = call

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output, as a function of w."""
        self.ready()
        if self._follows or not torch.is_grad_enabled() or not any(leaf.requires_grad for leaf in self.leaves):
            return self.module(*args, **kwargs)
        theta, w = self.weights.parameters(), self.coordinates().detach()
        with trainable(theta):
            output = self.module(*args, **kwargs)

        def sketched() -> list[Tensor]:
            gradient = self.weights.gradient(self.directions, w)
            self.weights.drop_gradients()
            return self._gradient_blocks(gradient)

        return as_function_of_w(output, self.blocks, theta, sketched)

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "nn.DataParallel copies modules for each GPU, but weights that follow w have one home; use "
            "DistributedDataParallel: torchrun for a Trainer of Hugging Face, or CUDA_VISIBLE_DEVICES=0 for one GPU."
        )

    def get_extra_state(self) -> Any:
        """Return what is saved beside w as a tensor, since safetensors files have no others."""
        return encoded(super().get_extra_state())

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the module inside if there is none of this name here, with the weights at w."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            inside = not name.startswith("_") and name != "w" and self.__dict__.get("_initialized")
            if not inside or not hasattr(self.module, name):
                raise
            self.ready()
            return getattr(self.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute on the module that has it."""
        own = name in self.__dict__ or name in self._parameters or name in self._modules or hasattr(type(self), name)
        if self.__dict__.get("_initialized") and not own and hasattr(self.module, name):
            setattr(self.module, name, value)
        else:
            super().__setattr__(name, value)


def whole(value: Any, name: str) -> int:
    """Return a whole number, also one that is given as a float such as 8.0.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    try:
        return index(value)
    except TypeError:
        raise ValueError(f"{name} is a whole number, got {value!r} ({type(value).__name__}); pass an int.") from None


def _move_weights(subspace: Subspace, _: Any) -> None:
    """Move the weights to the w that was loaded, in units of the scale that was asked for."""
    if subspace._asked_scale is not None:
        subspace.set_scale(subspace._asked_scale)
    subspace._last_w = None
    subspace.ready()
