"""Ask which documents taught a language model a sentence, and train again without them (80 seconds on one core).

A small GPT learns the first paragraphs of 1,500 docstrings of Python's standard library. The writer then stores a row
per document, the sketch of its gradient after whitening by EK-FAC. Questions are sentences that the GPT has never seen,
cut in two: who taught it to go on like this? Beside the answer stands what looks alike to a bag of words, TF-IDF.

Which of the two is right? What they found for 30 sentences is removed, and the GPT is trained again. Both are far above
random documents; between them another seed may decide: sentences this short repeat the words of those that taught them.
"""

import ast
import random
import shutil
import sys
import sysconfig
from pathlib import Path
from textwrap import shorten

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from sklearn.feature_extraction.text import TfidfVectorizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel
from transformers import get_linear_schedule_with_warmup as schedule

from lightning_sketch import GradientSketchWriter, GradientStore, IndexedDataset
from lightning_sketch.attribution import reliability

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/language_model")
SEED = int(sys.argv[2]) if len(sys.argv) > 2 else 0
DOCUMENTS, VOCABULARY, LONGEST, REMOVED, SHOWN = 1500, 512, 64, 10, 3
QUIET: dict = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
SENTENCES = [  # the beginning is given, the continuation is asked about
    ("Read and return up to n bytes", " from the stream."),
    ("Test whether a path", " is a regular file"),
    ("Get the event loop", " for the current context."),
    ("Release the lock,", " waking up a thread that waits."),
    ("Returns the path of the filename", " for a given extension."),
]


class LanguageModel(LightningModule):
    def __init__(self):
        super().__init__()
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=LONGEST, n_embd=64, n_layer=2, n_head=4, bos_token_id=None,
            eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        self.gpt = GPT2LMHeadModel(config)

    def training_step(self, batch):
        return self.gpt(**batch).loss

    def validation_step(self, batch):
        self.log("loss", self.gpt(**batch).loss)

    def configure_optimizers(self):
        optimizer, steps = torch.optim.AdamW(self.parameters(), lr=3e-3), int(self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": schedule(optimizer, steps // 10, steps), "interval": "step"}]


def docstrings():
    """Return the first paragraphs of the standard library's docstrings, each once, in random order."""
    found = set()
    for file in Path(sysconfig.get_path("stdlib")).rglob("*.py"):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"}.isdisjoint(file.parts):
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.ClassDef | ast.FunctionDef):
                    found.add(" ".join((ast.get_docstring(node) or "").split("\n\n")[0].split()))
    texts = sorted(text for text in found if 6 <= len(text.split()) <= 30)
    random.Random(SEED).shuffle(texts)
    return texts


def halves(text):
    words = text.split()
    middle = len(words) // 2
    return " ".join(words[:middle]), " " + " ".join(words[middle:])


def learned_tokenizer(texts):
    """Learn a byte-pair encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learn = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<start>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, learn)
    return tokenizer


def batch_of(pairs, tokenizer):
    """Return tokens and labels, both (pairs, LONGEST), of given and asked texts; what is not asked has label -100."""
    tokens, labels = torch.zeros(len(pairs), LONGEST).long(), torch.full((len(pairs), LONGEST), -100)
    for row, (given, asked) in enumerate(pairs):
        first = [0, *tokenizer.encode(given).ids]
        ids = torch.tensor([*first, *tokenizer.encode(asked).ids][:LONGEST])
        tokens[row, : len(ids)] = ids
        labels[row, len(first) : len(ids)] = ids[len(first) :]
    return {"input_ids": tokens, "labels": labels}


def main():
    texts = [text for text in docstrings() if text not in ["".join(sentence) for sentence in SENTENCES]]
    questions, texts = SENTENCES + [halves(text) for text in texts[:25]], texts[25 : 25 + DOCUMENTS]
    documents, tokenizer = [("", text) for text in texts], learned_tokenizer(texts)

    def batches(pairs):
        return batch_of(pairs, tokenizer)

    def train(documents):
        seed_everything(SEED, verbose=False)
        model = LanguageModel()
        loader = DataLoader(documents, batch_size=32, shuffle=True, drop_last=True, collate_fn=batches)
        Trainer(max_epochs=8, accelerator="cpu", **QUIET).fit(model, loader)
        return model.eval()

    def losses(model):
        with torch.no_grad():
            return torch.stack([model.gpt(**batches([question])).loss for question in questions])

    # A row for each document; then one for each question, whose gradient is whitened in the same way.
    model = train(documents)
    shutil.rmtree(OUT / "store", ignore_errors=True)  # rows of an earlier run, to which a validation would add its own
    writer = GradientSketchWriter(OUT / "store", dim=4096, preconditioner="ekfac")
    loader = DataLoader(IndexedDataset(documents), batch_size=64, collate_fn=batches)
    Trainer(callbacks=[writer], accelerator="cpu", **QUIET).validate(model, loader, verbose=False)
    store = GradientStore.open(writer.dirpath)
    queries = store.sketch_gradients(model, [batches(questions)])
    taught = store.top_k(queries, REMOVED, method="cosine")

    # The bag of words: pieces of two to four letters, weighted by how rare they are.
    bag = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4)).fit(texts)
    likeness = bag.transform([asked for _, asked in questions]) @ bag.transform(texts).T
    alike = torch.from_numpy(likeness.toarray()).topk(REMOVED)

    for i, (given, asked) in enumerate(SENTENCES):
        print(f"\n{given} |{asked}\n    {'taught it (whitened cosine)':<62}looks like it (TF-IDF)")
        for k in range(SHOWN):
            left = shorten(texts[taught.example_ids[i, k]], 53, placeholder=" ...")
            right = shorten(texts[alike.indices[i, k]], 53, placeholder=" ...")
            print(f"    {taught.scores[i, k]:5.2f}  {left:<55}{alike.values[i, k]:5.2f}  {right}")
    known = reliability(queries, store, method="cosine").mean()
    print(f"\nestimated correlation of these cosines with those of gradients that are not sketched: {known:.2f}")

    # Train again without what was found for any of the questions:
    before = losses(model)
    print(f"\nThe loss of {len(questions)} continuations, {before.mean():.2f}, rises by")
    chance = torch.randint(DOCUMENTS, (len(questions), REMOVED))
    for name, ids in {"taught it": taught.example_ids, "looks like it": alike.indices, "random": chance}.items():
        removed = set(ids.flatten().tolist())
        kept = [document for i, document in enumerate(documents) if i not in removed]
        rise = losses(train(kept)) - before
        error = rise.std() / len(questions) ** 0.5
        print(f"    {rise.mean():5.2f} ± {error:.2f}   without {len(removed)} documents: {name}", flush=True)


if __name__ == "__main__":
    main()
