"""Program: products with Hessians of sharded modules of many kinds, on one rank of two, as JSON.

python sharded_modules_run.py FOLDER RANK RANKS [NAMES]. A check that fails is found as the text of its error.
"""

import json
import sys
import warnings

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from sharded_net import dense, meet, numbers, off, shard
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

from lightning_sketch.curvature import (
    GGN,
    Deflated,
    EmpiricalFisher,
    Hessian,
    Preconditioned,
    copy_weights,
    critical_learning_rate,
    keskar_sharpness,
    loss_slice,
    spectrum,
)

RANK = RANKS = 0
PRODUCTS, CHECKS = {}, {}
DRAW = torch.Generator().manual_seed(1)
X, Y = torch.randn(8, 4, generator=DRAW, dtype=torch.float64), torch.randint(3, (8,), generator=DRAW)


def entropy(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def network(*more):
    torch.manual_seed(0)
    parts = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), *more, nn.Linear(6, 3)
    return nn.Sequential(*parts).double()


def mesh():
    return init_device_mesh("cpu", (RANKS,))


def sharded(module=None, *parts, **options):
    module = network() if module is None else module
    return shard(module, mesh(), *(parts or (module[0],)), **options)


def mine(dtype=torch.float64):
    return X[RANK::RANKS].to(dtype), Y[RANK::RANKS].clone()


def hessian(module, loss_fn=entropy, batches=None, **options):
    batches = [mine(next(module.parameters()).dtype)] if batches is None else batches
    return Hessian(loss_fn, module, batches, **options)


def truth(module=None, loss_fn=entropy, batch=(X, Y), names=None):
    return dense(network() if module is None else module, batch, loss_fn, names)[0]


def refused(call):
    """Return the message of a refusal."""
    try:
        call()
    except (ValueError, TypeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def product(function):
    """Check that what a function returns, a sharded Hessian and a matrix, are the same."""
    PRODUCTS[function.__name__] = function
    return function


def check(function):
    CHECKS[function.__name__] = function
    return function


@product
def only_one_part():
    module = network()
    fully_shard(module[2], mesh=mesh())
    return hessian(module), truth()


@product
def after_a_forward_pass():
    """FSDP leaves the outermost part gathered, with parameters that look whole."""
    module = shard(network(), mesh())
    with torch.no_grad():
        module(X)
    return hessian(module), truth()


@product
def after_a_backward_pass():
    module = sharded()
    entropy(module, mine()).backward()
    return hessian(module), truth()


@product
def without_synchronization():
    module = sharded()
    module.set_requires_gradient_sync(False)
    return hessian(module), truth()


@product
def kept_whole_after_forward():
    return hessian(sharded(reshard_after_forward=False)), truth()


@product
def kept_whole_after_backward():
    module = sharded()
    module.set_reshard_after_backward(False)
    x, y = mine()
    return hessian(module, batches=[(x[:3], y[:3]), (x[3:], y[3:])]), truth()


@product
def by_columns():
    options = {"shard_placement_fn": lambda p: Shard(1) if p.ndim > 1 and p.shape[1] % 2 == 0 else None}
    return hessian(sharded(**options)), truth()


@product
def fewer_rows_than_ranks():
    module = nn.Sequential(nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 3)).double()
    matrix = truth(module)
    return hessian(sharded(module)), matrix


@product
def unused_parameters():
    module = network()
    module.register_parameter("unused", nn.Parameter(torch.randn(3).double()))
    return hessian(sharded(module)), torch.block_diag(torch.zeros(3, 3).double(), truth())


@product
def frozen_parameters():
    module = network()
    module[0].requires_grad_(False)
    module[2].requires_grad_(False)
    matrix = truth(module)
    return hessian(sharded(module)), matrix


@product
def some_parameters():
    names = ["0.weight", "4.weight"]
    return hessian(sharded(), parameters=names), truth(names=names)


@product
def one_parameter_twice():
    module = network()
    module[4] = nn.Linear(6, 6).double()
    module[4].weight = module[2].weight
    matrix = truth(module, classes)
    return hessian(sharded(module), classes), matrix


def classes(module, batch):
    return F.cross_entropy(module(batch[0])[:, :3], batch[1])


@product
def checkpointed():
    module = network()
    inside = nn.Sequential(checkpoint_wrapper(module[:2], CheckpointImpl.NO_REENTRANT), module[2:])
    return hessian(sharded(inside)), truth()


class Reentrant(nn.Sequential):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=True)


@product
def checkpointed_by_reentry():
    module = network()
    inside = nn.Sequential(module[:2], Reentrant(*module[2:]))
    return hessian(sharded(inside, inside[1])), truth()


@product
def weighted():
    """Batches of 1, 3, 2 and 2 examples, whose losses are weighted means, of sums of weights that are not counts."""
    w = torch.arange(1.0, 9, dtype=torch.float64)

    def loss_fn(module, batch):
        losses = F.cross_entropy(module(batch[0]), batch[1], reduction="none")
        return (losses * batch[2]).sum() / batch[2].sum()

    parts, cut = [t[RANK::RANKS] for t in (X, Y, w)], 1 + RANK
    batches = [tuple(t[:cut] for t in parts), tuple(t[cut:] for t in parts)]
    h = hessian(sharded(), loss_fn, batches, weight_fn=lambda batch: float(batch[2].sum()))
    return h, truth(loss_fn=loss_fn, batch=(X, Y, w))


@product
def uneven():
    x, y = X[: 5 + 3 * RANK][5 * RANK :], Y[: 5 + 3 * RANK][5 * RANK :]
    return hessian(sharded(), batches=[(x[:3], y[:3]), (x[3:], y[3:])][: 2 - RANK]), truth()


@product
def replicated_tensors():
    """DTensors that are whole on every rank, and a loss that is one."""
    whole = [Replicate()]

    def squares(module, batch):
        x, y = batch[0], F.one_hot(batch[1], 3).double()
        if any(isinstance(p, DTensor) for p in module.parameters()):
            x, y = (DTensor.from_local(t, mesh(), whole) for t in (x, y))
        return F.mse_loss(module(x), y)

    return hessian(distribute_module(network(), mesh()), squares, [(X, Y)]), truth(loss_fn=squares)


@product
def hooks_of_weights():
    """They change gradients in training, as for clipping, and not the loss, whose Hessian it is."""
    module = network()
    fully_shard(module[0], mesh=mesh())
    for weight in (module[0].weight, module[2].weight):
        weight.register_hook(lambda g: 2 * g)
    return hessian(module), truth()


@product
def sequence_parallel():
    torch.manual_seed(0)
    parts = nn.Embedding(6, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)
    module = nn.Sequential(*parts).double()
    batch = [torch.randint(6, (2, 4)), torch.randint(6, (2, 4))]

    def loss_fn(module, batch):
        return F.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flatten())

    matrix = truth(module, loss_fn, batch)
    plan = {
        "0": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "1": SequenceParallel(),
        "2": ColwiseParallel(input_layouts=Shard(1)),
        "4": RowwiseParallel(),
    }
    return hessian(parallelize_module(module, mesh(), plan), loss_fn, [batch]), matrix


@check
def half_precision():
    """Errors of products with weights or compute in bfloat16, where truth is at the same weights, in float64."""
    found, policy = {}, MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found["policy"] = off(hessian(sharded(network().float(), mp_policy=policy)), truth())
    module = network().bfloat16()
    matrix = truth(module, batch=(X.bfloat16().double(), Y))
    module = sharded(module)
    before = numbers(module.parameters())
    found["weights"] = off(hessian(module), matrix)
    found["restored"] = torch.equal(before, numbers(module.parameters()))

    def under_autocast(module, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return entropy(module, batch).float()

    found["autocast"] = off(hessian(sharded(network().float()), under_autocast), truth())
    return found


@check
def state():
    """Gradients, buffers, modes and random numbers are as they were, with dropout and batch norm in training."""
    module = sharded(network(nn.BatchNorm1d(6), nn.Dropout(0.4))).train()
    module[3].eval()
    entropy(module, mine()).backward()
    h = hessian(module, mode="train", noise_samples=3)
    v, random = torch.ones(h.space.size, dtype=torch.float64), torch.get_rng_state()
    before = [x.clone() for x in (numbers([p.grad for p in module.parameters()]), *module.buffers())]
    modes = [part.training for part in module.modules()]
    u = v.cumsum(0)
    products = h.matvec(v), h.matvec(v)
    after = [numbers([p.grad for p in module.parameters()]), *module.buffers()]
    return {
        "samples": h.noise_samples,
        "random": torch.equal(random, torch.get_rng_state()),
        "same": all(map(torch.equal, before, after)),
        "modes": modes == [part.training for part in module.modules()],
        "repeats": torch.equal(*products),
        "symmetric": [h.space.dot(u, products[0]), h.space.dot(v, h.matvec(u))],
    }


@check
def failures():
    """What all ranks raise if a loss is NaN on one, or one has no examples, and that they go on together."""
    x, y = mine()
    bad = x.clone()
    if RANK == 1:
        bad[0] = float("nan")
    module, found = sharded(), {}
    for name, batches in {"first": [(bad, y)], "second": [(x, y), (bad, y)], "none": [(x, y)] * (1 - RANK)}.items():
        h = hessian(module, batches=batches)
        for call in (lambda h=h: h.matvec(torch.ones(h.space.size).double()), h.gradient, h.loss):
            found.setdefault(name, []).append(refused(call))
    found["after"] = off(hessian(module), truth())
    return found


@check
def no_hessian():
    """What is said where the gradient is not the derivative of the loss."""

    def detached(module, batch):
        out = module(batch[0])
        return (out - 0.5 * out.detach().tanh()).square().mean()

    def hooked(module, batch):
        out = module(batch[0])
        if out.requires_grad:
            out.register_hook(lambda g: 0.01 * g.sign())
        return F.cross_entropy(out, batch[1])

    def constant(module, batch):
        return entropy(module, batch).detach()

    found = {}
    for name, module, loss_fn in (
        ("detached", sharded(), detached),
        ("hooked", sharded(), hooked),
        ("constant", sharded(), constant),
    ):
        h = hessian(module, loss_fn)
        found[name] = refused(lambda h=h: h.matvec(torch.ones(h.space.size).double()))
    return found


@check
def refusals():
    module, batches = sharded(), [mine()]
    stepping = sharded()
    stepping[2].weight.register_post_accumulate_grad_hook(lambda p: p.detach().add_(1))
    embedding = nn.Sequential(nn.Embedding(5, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 3)).double()
    embedded = sharded(embedding)
    words = [(torch.arange(8).view(4, 2) % 5, Y[:4])]
    parallel = parallelize_module(network(), mesh(), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    half = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).half()

    apart = network()
    fully_shard(apart[2], mesh=mesh())
    with torch.no_grad():
        apart[0].weight[0, 0].add_(1e-3 * RANK)

    def multiply(h):
        return h.matvec(torch.ones(h.space.size, dtype=h.dtype))

    before = numbers(stepping.parameters()), numbers(embedded.parameters())
    found = {
        "double_backward": refused(lambda: hessian(module, hvp="double_backward")),
        "forward_over_reverse": refused(lambda: hessian(module, hvp="forward_over_reverse")),
        "micro_batch_size": refused(lambda: hessian(module, micro_batch_size=2)),
        "GGN": refused(lambda: GGN(module, batches)),
        "EmpiricalFisher": refused(lambda: EmpiricalFisher(entropy, module, batches)),
        "over_batches": refused(lambda: spectrum(hessian(module), over_batches=True)),
        "projected": refused(lambda: spectrum(hessian(module), method="projected", dim=32, num_matvecs=16)),
        "loss_slice": refused(lambda: loss_slice(hessian(module), directions=1, points=3)),
        "keskar": refused(lambda: keskar_sharpness(hessian(module))),
        "optimizer in backward": refused(lambda: hessian(stepping).gradient()),
        "max_norm": refused(lambda: multiply(hessian(embedded, batches=words))),
        "other batches": refused(lambda: multiply(hessian(parallel))),
        "drifted apart": refused(lambda: multiply(hessian(apart))),
        "float16": refused(lambda: multiply(hessian(sharded(half)))),
        "whole vector": refused(lambda: hessian(module).matvec(torch.ones(93).double())),
        "noise": refused(lambda: multiply(hessian(sharded(network(nn.Dropout(0.4))), drawing))),
    }
    after = numbers(stepping.parameters()), numbers(embedded.parameters())
    return found | {"restored": all(map(torch.equal, before, after))}


def drawing(module, batch):
    """A loss that draws from a generator of its own."""
    return entropy(module, (batch[0] + 0.1 * torch.randn(batch[0].shape, generator=DRAW).double(), batch[1]))


@check
def optimizer_steps():
    """A second measurement after a step is one at the new weights, whichever way the optimizer writes them."""
    found = {}
    for how in ("foreach", "fused"):
        module = sharded()
        h, optimizer = hessian(module), torch.optim.Adam(module.parameters(), lr=0.1, **{how: True})
        first = h.loss()
        h.matvec(torch.ones(h.space.size).double())
        entropy(module, mine()).backward()
        optimizer.step()
        optimizer.zero_grad()
        matrix, _, loss = dense(whole(module), (X, Y), entropy)
        found[how] = [*off(h, matrix), abs(h.loss() - loss), abs(loss - first)]
        local = next(module.parameters()).to_local()
        local.detach().fill_(float("nan") if RANK == 1 else 0.0)
        found[f"{how} to NaN"] = refused(lambda h=h: h.matvec(torch.ones(h.space.size).double()))
    return found


def whole(module):
    """Return a module with all weights of a sharded one."""
    found = network()
    found.load_state_dict({name: p.full_tensor() for name, p in module.named_parameters()})
    return found


@check
def algebra():
    """Eigenvalues and eigenvectors of sums, multiples, deflated and preconditioned matrices, as errors."""
    h, values = hessian(sharded()), torch.linalg.eigvalsh(truth()).flip(0)
    options = {"num_matvecs": 12, "bottom_k": 0, "tol": 1e-3}
    pairs = spectrum(h, top_k=2, **options).eigenvectors(h, 2)
    products = [h.matvec(v) for v in pairs.vectors]
    off_by = [x - value * v for x, value, v in zip(products, values.tolist(), pairs.vectors, strict=False)]
    return {
        "values": (pairs.values / values[:2] - 1).tolist(),
        "residuals": pairs.residuals.tolist(),
        "lengths": [h.space.norm(v) for v in pairs.vectors],
        "products": list(map(h.space.norm, off_by)),
        "deflated": float(spectrum(Deflated(h, pairs.vectors), top_k=1, **options).lambda_max / values[2]) - 1,
        "sum": h.space.norm((0.5 * h + h).matvec(pairs.vectors[0]) - 1.5 * products[0]) / float(values[0]),
    }


@check
def preconditioned():
    """Eigenvalues of P^-1/2 H P^-1/2, and the critical learning rate, whole and in shards."""
    tops, factors, same = [], [], True
    options = {"num_matvecs": 12, "top_k": 2, "bottom_k": 0, "tol": 1e-3}
    for module, batch in ((sharded(), mine()), (network(), (X, Y))):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        for _ in range(3):
            before = copy_weights(module)
            optimizer.zero_grad()
            entropy(module, batch).backward()
            optimizer.step()
        h = Hessian(entropy, module, [batch])
        after = copy_weights(module)
        factors.append(critical_learning_rate(h, before, 0.05).factor)
        same &= all(torch.equal(x, after[name]) for name, x in copy_weights(module).items())
        tops.append(spectrum(Preconditioned.from_optimizer(h, optimizer), **options).top(2))
    return {"tops": (tops[0] / tops[1] - 1).tolist(), "factors": factors, "same": same}


def main(folder, rank, ranks, *names):
    global RANK, RANKS
    RANK, RANKS = rank, ranks
    meet(folder, rank, ranks)
    found = {}
    for name, call in (PRODUCTS | CHECKS).items():
        if names and name not in names:
            continue
        with warnings.catch_warnings(record=True):
            try:
                found[name] = off(*call()) if name in PRODUCTS else call()
            except Exception as error:  # of one check; the others go on
                found[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
