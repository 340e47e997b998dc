"""Program: measurements of a sharded transformer on one rank of several, as JSON.

python sharded_spectrum_run.py FOLDER RANK RANKS HOW, where HOW is "fsdp", "tp" or "both". FOLDER has truth.pt: weights
and what is true of them, by whether embedding and head are tied.
"""

import json
import sys
from collections.abc import Sequence

import torch
import torch.distributed as distributed
from sharded_net import Transformer, examples, loss_fn, meet, numbers, off, shard, tensor_parallel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.profiler import ProfilerActivity, profile

from lightning_sketch.curvature import Hessian, spectrum


class Bench:
    """One rank of several, with truth."""

    def __init__(self, folder, rank, ranks, how):
        meet(folder, rank, ranks)
        self.rank, self.ranks, self.how = rank, ranks, how
        self.truth = torch.load(f"{folder}/truth.pt", mmap=True)
        names = {"fsdp": ("data",), "tp": ("tensor",), "both": ("data", "tensor")}[how]
        mesh = init_device_mesh("cpu", (2,) * len(names), mesh_dim_names=names)
        self.data, self.tensor = (mesh[name] if name in names else None for name in ("data", "tensor"))

    def module(self, tied, dtype, dropout=0.0, weights=None):
        module = Transformer(tied, dropout).to(dtype)
        module.load_state_dict(self.truth[tied]["weights"])
        if weights is not None:
            nn.utils.vector_to_parameters(weights, module.parameters())
        if self.tensor:
            tensor_parallel(module, self.tensor)
        if self.data:
            shard(module, self.data, module.block)
        return module

    @property
    def batches(self):
        """Of two ranks of FSDP the first has two batches, 5 examples, and the second has one, of 3."""
        parts = [slice(0, 3), slice(3, 5)], [slice(5, 8)]
        ids, labels = examples()
        mine = parts[self.data.get_local_rank()] if self.data else parts[0] + parts[1]
        return [(ids[part], labels[part]) for part in mine]

    @property
    def batch(self):
        """The batches as one."""
        return [tuple(map(torch.cat, zip(*self.batches, strict=True)))]

    def eigenvalues(self, h, tol):
        sp = spectrum(h, top_k=5, bottom_k=0, tol=tol)
        return {
            "top": sp.top(5).tolist(),
            "residuals": sp.residuals[:5].tolist(),
            "converged": sp.converged[:5].tolist(),
            "product_error": sp.product_error,
        }

    def vectors(self, h, tied):
        """Return errors of H v, the gradient and the loss, relative to their sizes."""
        truth = self.truth[tied]

        def own(v):
            """Shard a vector as PyTorch shards weights."""
            return numbers(self.module(tied, torch.float64, weights=v).parameters())

        gradient = float((h.gradient() - own(truth["gradient"])).norm() / truth["gradient"].norm())
        return {
            "size": h.space.size,
            "product": off(h, truth["hessian"], own),
            "gradient": gradient,
            "loss": abs(h.loss() / truth["loss"] - 1),
        }

    def spectra(self, tied):
        """Return errors of products and eigenvalues, some of the network with its embedding tied to its head or not."""
        h = Hessian(loss_fn, self.module(tied, torch.float64), self.batch)
        uneven = Hessian(loss_fn, self.module(not tied, torch.float64), self.batches)
        single = Hessian(loss_fn, self.module(not tied, torch.float32), self.batch)
        return {
            "vectors": [self.vectors(h, tied), self.vectors(uneven, not tied)],
            "float64": self.eigenvalues(h, 1e-3),
            "float32": self.eigenvalues(single, 1e-2),
        }

    def training(self, measures):
        """Return all numbers that training leaves, with measurements in between or without."""
        module = self.module(False, torch.float32, dropout=0.2).train()
        module.block.norm2.eval()
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        h, same = Hessian(loss_fn, module, self.batch, mode="train"), []
        torch.manual_seed(1)

        def measure():
            if measures:
                before, draws = shards(module, "grad"), torch.get_rng_state()
                modes = [part.training for part in module.modules()]
                h.matvec(torch.ones(h.space.size))
                h.gradient()
                h.loss()
                same.append(equal(before, shards(module, "grad")) and torch.equal(draws, torch.get_rng_state()))
                same.append(modes == [part.training for part in module.modules()])

        for step in range(2):
            for last in (False, True):
                if self.data:
                    module.set_requires_gradient_sync(last)
                loss_fn(module, self.batches[0]).backward()
                if step == 0:
                    measure()
            optimizer.step()
            optimizer.zero_grad()
        state = [x for p in module.parameters() for x in optimizer.state[p].values()]
        return [*shards(module), *map(local, state), torch.get_rng_state()], same

    def harm(self):
        (plain, _), (measured, same) = self.training(False), self.training(True)
        return {"bits": equal(plain, measured), "left": same}

    def hybrid(self):
        """Return the error of a product where shards are replicated, on a mesh of 2 x 2."""
        module = Transformer()
        module.load_state_dict(self.truth[False]["weights"])
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
        shard(module.double(), mesh, module.block)
        ids, labels = examples()
        h = Hessian(loss_fn, module, [(ids[self.rank :: 4], labels[self.rank :: 4])])
        return off(h, self.truth[False]["hessian"])

    def memory(self):
        """Return sizes of what is allocated, in vectors of this rank's shards."""
        torch.manual_seed(0)
        module = Deep(4)
        if self.how == "tp":
            ways = (RowwiseParallel if i % 2 else ColwiseParallel for i in range(4))
            parallelize_module(module, self.tensor, {f"layers.{i}": way() for i, way in enumerate(ways)})
        else:
            shard(module, self.data, *module.layers)
        x = torch.randn(2, Deep.WIDTH)
        h = Hessian(lambda module, x: module(x).square().mean(), module, [x])
        size, v = 4 * h.space.size, torch.ones(h.space.size)

        def gradient():
            module(x).square().mean().backward()
            module.zero_grad()

        gradient()
        found = {"n": h.shape[0], "size": h.space.size}
        for name, call in (
            ("gradient", gradient),
            ("matvec", lambda: h.matvec(v)),
            ("again", lambda: h.matvec(v)),
            ("spectrum", lambda: spectrum(h, num_matvecs=8, dim=64, top_k=1, bottom_k=0, tol=0.0)),
        ):
            found[name] = allocated(call, size)
        return found


class Deep(nn.Module):
    """Equal layers, each a quarter of all parameters, so that FSDP gathers little at once."""

    WIDTH = 728

    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(self.WIDTH, self.WIDTH, bias=False) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def allocated(call, size):
    """Return the largest block of memory that a call allocates, and the most at once of all blocks and of vectors.

    In units of `size`; vectors are blocks of more than three quarters of it. PyTorch's allocator tells the profiler of
    each block, whoever asked for it, unless another thread frees it, as gloo's do with blocks that FSDP gathers into.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = torch.tensor([e.nbytes() / size for e in sorted(events, key=lambda e: e.start_ns())])
    most = [float(some.cumsum(0).max()) for some in (changes, changes * (changes.abs() > 0.75))]
    return {"largest": float(changes.max()), "all": most[0], "vectors": most[1]}


def local(x):
    return x.to_local().clone() if hasattr(x, "to_local") else x.clone()


def shards(module, of="data"):
    found = [getattr(parameter, of) for parameter in module.parameters()]
    return [None if x is None else local(x) for x in found]


def equal(these: Sequence, those: Sequence):
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(these, those, strict=True))


def main(folder, rank, ranks, how):
    bench = Bench(folder, rank, ranks, how)
    found = bench.spectra(tied=how == "fsdp")
    found |= {"hybrid": bench.hybrid()} if how == "both" else {"harm": bench.harm(), "memory": bench.memory()}
    print(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
