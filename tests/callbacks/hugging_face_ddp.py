"""Train with both callbacks in several processes: `torchrun --nproc-per-node 2 hugging_face_ddp.py FOLDER`."""

import json
import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from lightning_sketch.callbacks.hugging_face import GradientSketchCallback, SpectrumCallback


def main(folder: Path) -> None:
    """Write the spectrum of each process, and the weights after training."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    own = {"bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "eager"}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(vocab_size=11, n_embd=4, n_layer=1, n_head=2, n_positions=6, **own, **drops)
    model = GPT2LMHeadModel(config).double()
    rows = torch.randint(11, (12, 6), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in rows]
    size = 6 // int(sys.argv[2])
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=size, max_steps=2, learning_rate=0.05, lr_scheduler_type="constant",
        use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", optim="sgd", max_grad_norm=0.0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    watch = SpectrumCallback(trainer, num_matvecs=12, dim=64, top_k=2, bottom_k=1, num_batches=1, at_start=True)
    trainer.add_callback(watch)
    trainer.add_callback(GradientSketchCallback(trainer, dim=32, dtype="float32"))
    trainer.train()
    found: dict[str, list] = {
        "lambda_max": [m.lambda_max for m in watch.history],
        "loss": [m.loss for m in watch.history],
    }
    found["examples"] = [row.tolist() for batch in watch._probes.batches for row in batch["input_ids"]]
    (folder / f"rank{arguments.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
