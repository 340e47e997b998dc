"""Ask which documents taught a causal language model its answer, word by word (ten seconds on a CPU).

The writer finds itself that the loss is a mean over shifted labels, and checks that on every batch.
"""

import sys
from pathlib import Path

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers import get_linear_schedule_with_warmup as schedule

from lightning_sketch import GradientSketchWriter, GradientStore, IndexedDataset

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/padded_language_model")
FACTS = [("capital of France", "Paris"), ("largest planet", "Jupiter"), ("inventor of the telephone", "Bell")]
TEXTS = [f"{start} {thing} is {name} {end}" for start in ("The", "Of course the", "I know that the")
         for thing, name in FACTS for end in ("", "indeed", "as all of us learn at school")]  # fmt: skip


class Model(LightningModule):
    def __init__(self, vocabulary):
        super().__init__()
        ends: dict = {"bos_token_id": None, "eos_token_id": None}
        self.gpt = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=64, n_layer=2, n_head=4, **ends))

    def training_step(self, batch, batch_idx):
        return self.gpt(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.gpt(**batch).loss)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        return [optimizer], [{"scheduler": schedule(optimizer, 10, 80), "interval": "step"}]


def main(per="step"):
    seed_everything(0, verbose=False)
    words = {word: i for i, word in enumerate(["<pad>", *sorted({w for text in TEXTS for w in text.split()})])}
    base = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<pad>")
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    documents = IndexedDataset([{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS])
    loader = DataLoader(documents, batch_size=4, shuffle=True, collate_fn=collate)

    writer = GradientSketchWriter(OUT / per, dim=1024, per=per, overwrite=True)
    trainer = Trainer(max_epochs=20, accelerator="cpu", precision="bf16-mixed", accumulate_grad_batches=2,
                      callbacks=[writer], logger=False, enable_checkpointing=False)  # fmt: skip
    model = Model(len(words))
    trainer.fit(model, loader)
    trainer.validate(model, loader, verbose=False)  # a row per document, at the final weights

    store = GradientStore.open(writer.dirpath)
    query = collate([{"input_ids": tokenizer("The largest planet is Jupiter")["input_ids"]}])
    asked = store.sketch_gradients(model, [query], per_token=True)  # a query for each word
    best = store.top_k(asked, k=3, method="cosine")
    for place, ids in zip(asked.token.tolist(), best.example_ids.tolist(), strict=True):
        print(f"{tokenizer.decode(query['input_ids'][0, place])}: {' | '.join(TEXTS[i] for i in ids)}")
    return store


if __name__ == "__main__":
    main(*sys.argv[2:])
