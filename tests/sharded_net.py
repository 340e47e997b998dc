"""A small transformer for tests of sharded modules, its Hessian as a matrix, and parts of vectors on ranks."""

import copy
from datetime import timedelta

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.func import functional_call, grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

WORDS, LENGTH, WIDTH = 10, 5, 12


class Block(nn.Module):
    """Attention of two heads and an MLP."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=i > 1) for i in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (part(h).unflatten(-1, (-1, WIDTH // 2)).transpose(1, 2) for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.drop(self.out(attended))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class Transformer(nn.Module):
    """With a plain parameter for positions, which tensor parallelism leaves whole on every rank; n = 1584, or 1464."""

    def __init__(self, tied=False, dropout=0.0):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.position = nn.Parameter(0.3 * torch.randn(LENGTH, WIDTH))
        self.block = Block(dropout)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(self.block(self.embed(ids) + self.position)))


def loss_fn(module, batch):
    """Return the cross-entropy of next words."""
    return F.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flatten())


def examples():
    """Return eight sequences, of which a third of the words to predict are noise."""
    draw = torch.Generator().manual_seed(7)
    ids = torch.randint(WORDS, (8, LENGTH), generator=draw)
    return ids, (3 * ids + 1 + (torch.rand(8, LENGTH, generator=draw) < 0.3).long()) % WORDS


def trained(tied):
    """Return a transformer after 20 steps of Adam: its largest eigenvalues stand apart."""
    torch.manual_seed(0)
    module = Transformer(tied)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        loss_fn(module, examples()).backward()
        optimizer.step()
    return module


def tensor_parallel(module, mesh):
    """Split the transformer over a mesh: heads, MLP, words. Norms, positions and a tied embedding are left whole."""
    columns, rows = ColwiseParallel(), RowwiseParallel()
    plan = {f"block.{name}": columns for name in ("q", "k", "v", "up")} | {"block.out": rows, "block.down": rows}
    if module.head.weight is not module.embed.weight:
        plan |= {
            "embed": RowwiseParallel(input_layouts=Replicate()),
            "head": ColwiseParallel(output_layouts=Replicate()),
        }
    return parallelize_module(module, mesh, plan)


def shard(module, mesh, *parts, **options):
    """Shard some parts of a module on their own, and then the rest, by FSDP2."""
    for part in (*parts, module):
        fully_shard(part, mesh=mesh, **options)
    return module


def meet(folder, rank, ranks):
    """Join the other ranks; one that waits for another for a minute fails."""
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", ranks)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))


class _Loss(nn.Module):
    def __init__(self, module, loss_fn):
        super().__init__()
        self.module, self.loss_fn = module, loss_fn

    def forward(self, batch):
        return self.loss_fn(self.module, batch)


def dense(module, batch, loss_fn=loss_fn, names=None):
    """Return H, the gradient and the loss of a whole module in float64, by autograd, for parameters of some names."""
    whole = _Loss(copy.deepcopy(module).double(), loss_fn)
    names = [n for n, p in module.named_parameters() if p.requires_grad and (names is None or n in names)]
    parameters = dict(whole.module.named_parameters())
    sizes = [parameters[name].numel() for name in names]

    def loss(flat):
        moved = {f"module.{n}": x.view_as(parameters[n]) for n, x in zip(names, flat.split(sizes), strict=True)}
        return functional_call(whole, moved, (batch,), tie_weights=True)

    flat = torch.cat([parameters[name].detach().flatten() for name in names])
    with sdpa_kernel(SDPBackend.MATH):
        pull = vjp(grad(loss), flat)[1]
        matrix = vmap(lambda v: pull(v)[0], chunk_size=128)(torch.eye(len(flat), dtype=flat.dtype))
        return matrix, grad(loss)(flat), float(loss(flat))


def own_part(h, v):
    """Return this rank's part of a whole vector, as PyTorch shards its tensors."""
    parts = [
        distribute_tensor(x.detach().contiguous(), p.device_mesh, p.placements) if isinstance(p, DTensor) else x
        for x, p in zip(h.layout.unflatten(v), h.parameters, strict=True)
    ]
    return numbers(parts)


def numbers(tensors):
    """Return this rank's numbers of several tensors as one vector."""
    return torch.cat([(x.to_local() if isinstance(x, DTensor) else x).detach().flatten() for x in tensors])


def off(h, matrix, own=None):
    """Return the error of this rank's part of H v along a random vector, and the stated one, relative to ||H v||.

    Args:
        h: The sharded Hessian.
        matrix: The truth.
        own: A function of a whole vector that returns this rank's part, if it is not `own_part`.
    """
    own = own or (lambda v: own_part(h, v))
    v = torch.randn(len(matrix), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    truth = matrix @ v
    found = h.matvec(own(v).to(h.dtype)).double()
    return float((found - own(truth)).norm() / truth.norm()), h.space.norm(h.last_error()) / float(truth.norm())
