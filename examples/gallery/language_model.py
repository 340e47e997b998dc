"""Who taught a language model each word of its answer: a page whose words can be clicked (15 seconds)."""

from pathlib import Path

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_sketch import GradientSketchWriter, GradientStore, IndexedDataset

OUT = Path("runs/language_model")
FACTS = {"capital of France": "Paris", "capital of Peru": "Lima", "largest planet": "Jupiter",
         "author of Emma": "Austen", "hottest planet": "Venus", "tallest tree": "redwood",
         "inventor of the telephone": "Bell"}  # fmt: skip
STARTS, ENDS = ["the", "of course the", "we know that the", "the book says the"], ["", "indeed", "as all know"]
TEXTS = [f"{a} {thing} is {name} {b}".split() for a in STARTS for thing, name in FACTS.items() for b in ENDS]
IDS = {word: number for number, word in enumerate(sorted({word for text in TEXTS for word in text}))}


def collate(texts):
    """Pad texts to one length; padding has the label -100, which has no loss."""
    ids = [torch.tensor([IDS[word] for word in text]) for text in texts]
    labels = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
    return {"input_ids": labels.clamp(min=0), "attention_mask": (labels >= 0).long(), "labels": labels}


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        ends: dict = {"bos_token_id": None, "eos_token_id": None}
        self.gpt = GPT2LMHeadModel(GPT2Config(vocab_size=len(IDS), n_embd=64, n_layer=2, n_head=4, **ends))

    def training_step(self, batch):
        return self.gpt(**batch).loss

    validation_step = training_step  # for trainer.validate, which makes the rows

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


seed_everything(0, verbose=False)
model, loader = Model(), DataLoader(IndexedDataset(TEXTS), batch_size=8, shuffle=True, collate_fn=collate)
writer = GradientSketchWriter(OUT / "rows", dim=4096, preconditioner="ekfac", overwrite=True)
trainer = Trainer(max_epochs=10, accelerator="cpu", callbacks=[writer], logger=False, enable_checkpointing=False,
                  enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
trainer.fit(model, loader)
trainer.validate(model, loader, verbose=False)  # EK-FAC, then a row of each text

store = GradientStore.open(writer.dirpath).where(stage="validate")
questions = [f"the {thing} is {name}".split() for thing, name in FACTS.items()]
queries = store.sketch_gradients(model, [collate(questions)], per_token=True)  # a query for each word
page = store.report(OUT / "page.html", queries, train=[" ".join(text) for text in TEXTS],
                    queries_of=[[f"{word} " for word in text] for text in questions])  # fmt: skip
print(f"page: {page}")
best = store.top_k(queries, k=1, normalize=True).example_ids[:, 0].tolist()
columns = queries.metadata()
for example, place, id in zip(columns["example"].tolist(), columns["token"].tolist(), best, strict=True):
    print(f"{questions[example][place]:>12}: {' '.join(TEXTS[id])}")
