"""The largest Hessian eigenvalues of a language model in bfloat16, by differences of gradients, against autograd.

    python benchmarks/sharded_spectrum.py [--small] [--device cuda] [--out FILE]

A Llama of 1.1 billion parameters (with --small, of 0.2 million) is trained for some steps on text with a rule in it.
Then its largest eigenvalues on one batch are computed under FSDP2 with bfloat16 compute, fused attention and activation
checkpointing: with shards in float32, and with the weights rounded to bfloat16 and shards of that type. Prints each
eigenvalue with its error bar beside that of the same weights in float32 by autograd, without shards, and the time of a
product over that of a gradient.
"""

import argparse
import json
import time
import warnings
from contextlib import contextmanager

import torch
import torch.distributed as distributed
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lightning_sketch import Hessian, spectrum

LARGE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def text(vocabulary, examples, length, seed):
    """Return tokens of which most follow from the one before."""
    generator = torch.Generator().manual_seed(seed)
    rare = (torch.rand(examples, length, generator=generator) ** 3 * vocabulary).long()
    surprise = torch.rand(examples, length, generator=generator) < 0.4
    for t in range(1, length):
        follows = (7 * rare[:, t - 1] + 3) % vocabulary
        rare[:, t] = torch.where(surprise[:, t], rare[:, t], follows)
    return rare


def loss_fn(module, batch):
    return module(input_ids=batch, labels=batch, use_cache=False).loss


def llama(config, device, dtype):
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**config, attn_implementation="sdpa")).to(dtype).eval()


def sharded(module, mesh):
    """Shard a Llama, with compute in bfloat16, and checkpoint its layers in training and evaluation."""
    apply_activation_checkpointing(module, check_fn=lambda part: isinstance(part, LlamaDecoderLayer))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in module.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(module, mesh=mesh, mp_policy=policy)


def train(config, device, mesh, steps, size):
    """Return weights after some steps of AdamW, and the last loss."""
    module = sharded(llama(config, device, torch.float32), mesh)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-4 if config is LARGE else 3e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (3e-4 if config is LARGE else 3e-3) * min(1.0, (step + 1) / 20)
        loss = loss_fn(module, text(config["vocab_size"], *size, seed=step + 1).to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    names = {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in module.named_parameters()}
    return {name: p.detach().full_tensor() for name, p in names.items()}, float(loss.detach())


@contextmanager
def seconds(device, found, name):
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    yield
    if device == "cuda":
        torch.cuda.synchronize()
        found[f"{name}_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    found[name] = time.perf_counter() - start


def measured(module, batch, device, products):
    """Return what a spectrum says, and the time of a product and of a gradient."""
    found = {}
    h = Hessian(loss_fn, module, [batch])
    h.gradient()
    with seconds(device, found, "gradient_s"):
        h.gradient()
    with warnings.catch_warnings(record=True) as said, seconds(device, found, "spectrum_s"):
        warnings.simplefilter("always")
        sp = spectrum(h, num_matvecs=products, dim=1024, top_k=5, bottom_k=1, seed=0)
    v = torch.ones(h.space.size, device=device) / h.space.n**0.5
    with seconds(device, found, "product_s"):
        h.matvec(v)
    found |= {
        "top": sp.top(6).tolist(),
        "errors": sp.residuals[:6].tolist(),
        "converged": sp.converged[:6].tolist(),
        "smallest": sp.lambda_min,
        "smallest_error": float(sp.residuals[-1]),
        "product_error": sp.product_error,
        "products": sp.num_products,
        "step": getattr(getattr(h, "_differences", None), "step", None),
        "loss": h.loss(),
        "said": [str(warning.message)[:200] for warning in said],
    }
    return found


def compare(device="cuda", small=False, products=32, steps=60):
    """Return a dict of what `measured` returns for each way."""
    config, size = (SMALL, (16, 64)) if small else (LARGE, (8, 512))
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    weights, trained = train(config, device, mesh, steps, size)
    batch = text(config["vocab_size"], 8 if small else 2, size[1], seed=0).to(device)
    found = {
        "parameters": sum(w.numel() for w in weights.values()),
        "training_loss": trained,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    ways = [(name, dtype) for dtype in ("float32", "bfloat16") for name in (f"{dtype} shards", f"autograd at {dtype}")]
    for name, dtype in ways:
        shards, kind = name.endswith("shards"), getattr(torch, dtype)
        module = llama(config, device, kind if shards else torch.float32)
        with torch.no_grad():
            for own, parameter in module.named_parameters():
                parameter.copy_(weights[own].to(kind))
        if shards:
            module = sharded(module, mesh)
        try:
            found[name] = measured(module, batch, device, products)
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:800]}
        print(json.dumps({name: found[name]}), flush=True)
        del module
        if device == "cuda":
            torch.cuda.empty_cache()
    return found


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--small", action="store_true")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--products", type=int, default=32)
    arguments.add_argument("--steps", type=int, default=60)
    arguments.add_argument("--out")
    asked = arguments.parse_args()
    warnings.simplefilter("ignore")
    store = distributed.HashStore()
    backend = "nccl" if asked.device == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    found = compare(asked.device, asked.small, asked.products, asked.steps)
    if asked.out:
        with open(asked.out, "w") as file:
            json.dump(found, file, indent=1)
    print(f"{found['parameters']:,} parameters, loss {found['training_loss']:.2f} after training, {found['device']}")
    for dtype in ("float32", "bfloat16"):
        one, truth = found[f"{dtype} shards"], found[f"autograd at {dtype}"].get("top", [])
        if "failed" in one:
            print(dtype, one["failed"])
            continue
        times = f"a product {one['product_s'] / one['gradient_s']:.1f} gradients of {one['gradient_s']:.3f} s"
        print(f"{dtype} shards: {times}, step {one['step']:.2g}, products off by {one['product_error']:.1g}")
        for value, error, known, true in zip(one["top"], one["errors"], one["converged"], truth, strict=False):
            off = f"autograd {true:10.4g} ({value / true - 1:+.2%})"
            print(f"  {value:10.4g} ± {error:8.2g} {'' if known else '?':1} {off}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
