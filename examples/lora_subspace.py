"""Adapt a language model whose weights are rounded to 4 bits by a few numbers: a LoRA in a random subspace.

A small Llama learns to count in steps of 1 to 5: after two numbers of a sequence it knows the step, after one it has to
guess. Its weights are rounded to 4 bits and frozen, and it gets adapters of rank 4 that learn to count in steps of 3.
Instead of all n numbers of the adapters, dim numbers are trained: θ = θ₀ + Dᵀ w. Prints how often the number after the
first one is right, by dim. One number does not help this model; it is shown that it can be trained and saved.

What is saved is w and a seed, in a file of one to two kilobytes. Loaded into the same base with the same seed, it gives
the adapted model bit for bit.

Needs peft, and bitsandbytes for the base in 4 bits; without bitsandbytes, the base stays in 32 bits. Takes a minute on
one core.

Source: Morris et al. (2026), "Learning to reason in 13 parameters", arXiv:2602.04118, which goes down to one number.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lightning_sketch.subspace import SubspaceModel, load_subspace, save_subspace

NUMBERS, LENGTH, STEP = 64, 8, 3
DIMS = (1, 16, 64, 256)
CONFIG = LlamaConfig(
    vocab_size=NUMBERS,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=LENGTH,
    use_cache=False,  # a cache of keys is no function of w
)


def sequences(count, steps):
    """Return sequences that count in one of these steps each, modulo NUMBERS."""
    first, step = torch.randint(NUMBERS, (count, 1)), torch.tensor(steps)[torch.randint(len(steps), (count, 1))]
    return (first + step * torch.arange(LENGTH)) % NUMBERS


def train(model, parameters, steps, lr, batches):
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = batches()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model):
    """Return how often the second number of a sequence is the most likely one after the first."""
    batch = torch.arange(NUMBERS)[:, None]
    return float((model(input_ids=batch).logits[:, -1].argmax(-1) == (batch[:, 0] + STEP) % NUMBERS).float().mean())


def adapted(folder):
    """Return the base with new adapters, always the same ones."""
    four_bits = importlib.util.find_spec("bitsandbytes") is not None
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
    base = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **(options if four_bits else {}))
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/lora_subspace"))
    out = parser.parse_args().out
    torch.manual_seed(0)
    base = LlamaForCausalLM(CONFIG)
    train(base, base.parameters(), 1500, 3e-3, lambda: sequences(64, [1, 2, 3, 4, 5]))
    base.save_pretrained(out / "base")

    model = adapted(out / "base")
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if not p.requires_grad}
    print(f"base in {' and '.join(sorted(kinds))}: right after one number {accuracy(model):.0%}")
    print(f"{'dim':>4}{'of n':>10}{'right':>8}{'bytes':>8}")
    for dim in DIMS:
        model = SubspaceModel(adapted(out / "base"), dim)
        train(model, model.parameters(), 300, 0.01, lambda: sequences(64, [STEP]))
        sizes = save_subspace(model, out / f"{dim}.safetensors")
        loaded = load_subspace(out / f"{dim}.safetensors", adapted(out / "base"))
        pairs = zip(loaded.parameters(), model.module.parameters(), strict=True)
        same = all(torch.equal(ours, theirs) for ours, theirs in pairs)
        end = f"{sizes['file']:>8}{'' if same else '  is not the same when loaded'}"
        print(f"{dim:>4}{dim / model.n:>10.3%}{accuracy(loaded):>8.0%}{end}")
    print(f"n = {model.n:,}; files: {out}")


if __name__ == "__main__":
    main()
