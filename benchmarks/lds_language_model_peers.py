"""Attributors of five other packages, and two bags of words, behind one signature, with what they cost.

Not dependencies: pip install kronfluence traker dattri dattri-llm bergson, in an environment of its own, since their
dependencies must fit your torch. Packages that are not installed are missing from the table.
"""

import importlib.util
import math
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lds_language_model_problem import Corpus, Trained, document_losses, token_losses
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

MODULES = {
    "kronfluence": "kronfluence",
    "traker": "trak",
    "dattri": "dattri",
    "dattri-llm": "dattri_llm",
    "bergson": "bergson",
}
BATCH = 32


@dataclass(frozen=True)
class Measured:
    """A value, the processor time that it took, and the most memory of the process meanwhile."""

    value: Any
    seconds: float
    megabytes: float

    def __add__(self, other: "Measured") -> "Measured":
        """Add the cost of another one."""
        return Measured(self.value, self.seconds + other.seconds, max(self.megabytes, other.megabytes))

    def with_value(self, value: Any) -> "Measured":
        return replace(self, value=value)


def measured(make: Callable[[], Any]) -> Measured:
    """Make a value; its memory is known on Linux only."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if reset.exists():
        reset.write_text("5")  # VmHWM falls to what is held now
    start = time.process_time()
    value = make()
    seconds = time.process_time() - start
    peak = int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 1024 if status.exists() else math.nan
    return Measured(value, seconds, peak)


def installed(package: str) -> bool:
    return importlib.util.find_spec(MODULES[package]) is not None


def bags_of_words(corpus: Corpus) -> dict[str, Callable[[], Tensor]]:
    """Return similarities of texts by name: none looks at the model."""
    return {
        "TF-IDF": lambda: _tfidf(corpus, analyzer="char", ngram_range=(2, 4)),
        "TF-IDF of words": lambda: _tfidf(corpus, token_pattern=r"\w+"),
        "BM25": lambda: _bm25(corpus),
        "shared trigrams": lambda: shared_trigrams(corpus),
    }


def _tfidf(corpus: Corpus, **options) -> Tensor:
    made = TfidfVectorizer(sublinear_tf=True, **options).fit(corpus.train)
    return torch.tensor((made.transform(corpus.queries) @ made.transform(corpus.train).T).toarray()).float()


def _bm25(corpus: Corpus, k: float = 1.5, b: float = 0.75) -> Tensor:
    """Okapi BM25 of words."""
    train, queries = ([Counter(re.findall(r"\w+", text.lower())) for text in t] for t in (corpus.train, corpus.queries))
    containing = Counter(word for counts in train for word in counts)
    lengths = torch.tensor([float(counts.total()) for counts in train])
    found = torch.zeros(len(queries), len(train))
    for row, query in zip(found, queries, strict=True):
        for word in query:
            times = torch.tensor([float(counts[word]) for counts in train])
            idf = math.log(1 + (len(train) - containing[word] + 0.5) / (containing[word] + 0.5))
            row += idf * times * (k + 1) / (times + k * (1 - b + b * lengths / lengths.mean()))
    return found


def shared_trigrams(corpus: Corpus) -> Tensor:
    """Return how many different trigrams of words query and document share."""
    train, queries = ([_trigrams(text) for text in texts] for texts in (corpus.train, corpus.queries))
    return torch.tensor([[float(len(query & document)) for document in train] for query in queries])


def _trigrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return set(zip(words, words[1:], words[2:], strict=False))


def _data(corpus: Corpus) -> tuple[TensorDataset, TensorDataset]:
    return TensorDataset(corpus.x, corpus.y), TensorDataset(corpus.x_query, corpus.y_query)


@dataclass(frozen=True)
class Kronfluence:
    """Scores of a first and of a second set of queries, by EK-FAC of its linear layers, damped by a tenth of the mean.

    Everything is kept in files, so that the second set needs no factors, but all gradients again.
    """

    first: Measured
    second: Measured


def kronfluence(corpus: Corpus, trained: Trained, strategy: str = "ekfac") -> Kronfluence:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class Language(Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits, y = model(batch[0]), batch[1]
            if sample:
                with torch.no_grad():
                    drawn = torch.multinomial(logits.flatten(0, 1).softmax(-1), 1).view(y.shape)
                y = torch.where(y >= 0, drawn, y)
            return token_losses(logits, y).sum()

        def compute_measurement(self, batch, model):
            return token_losses(model(batch[0]), batch[1]).sum()

        def get_attention_mask(self, batch):
            return (batch[1] >= 0).long()

    train, queries = _data(corpus)
    with tempfile.TemporaryDirectory() as folder:

        def fit():
            model = prepare_model(trained.module(), Language())
            analyzer = Analyzer("lds", model, Language(), cpu=True, output_dir=folder, disable_tqdm=True)
            analyzer.fit_all_factors(
                "f", train, per_device_batch_size=BATCH, factor_args=FactorArguments(strategy=strategy)
            )
            return analyzer

        def score(analyzer, name: str) -> Tensor:
            analyzer.compute_pairwise_scores(
                name, "f", queries, train, per_device_query_batch_size=len(queries), per_device_train_batch_size=BATCH
            )
            return analyzer.load_pairwise_scores(name)["all_modules"]

        fitted = measured(fit)
        first = measured(lambda: score(fitted.value, "first")) + fitted
        return Kronfluence(first, measured(lambda: score(fitted.value, "second")))


Peer = Callable[[Corpus, list[Trained], list[Trained]], Tensor]


def peers() -> dict[str, tuple[str, Peer]]:
    """Return, by name, the package and (corpus, models on all data, models on halves) -> scores (queries, documents).

    kronfluence, which others are measured against, has a function of its own.
    """
    found: dict[str, tuple[str, Peer]] = {
        f"dattri-llm EK-FAC, damping {c:g} of the mean": (
            "dattri-llm",
            _dattri_llm("EKFACAttributor", damping=c, relative_damping=True, gradient_cache_residency="memory"),
        )
        for c in (0.003, 0.01, 0.03, 0.1, 0.3)
    }
    found["dattri-llm cosine"] = ("dattri-llm", _dattri_llm("TracInAttributor", normalized_grad=True))
    for size in (16, 32):
        for c in (0.03, 0.1, 0.3, 1.0):
            found[f"bergson {size}x{size} a layer, damping {c:g} of the mean"] = ("bergson", _bergson(size, c))
    for dim in (256, 512):
        found[f"traker TRAK, dim {dim}, 5 models on halves"] = ("traker", _traker(dim))
        found[f"dattri TRAK, dim {dim}, 5 models on halves"] = ("dattri", _dattri_trak(dim))
    found["dattri gradients' dot, dim 512"] = ("dattri", _dattri_dot(512))
    return {name: line for name, line in found.items() if installed(line[0])}


def _traker(dim: int) -> Peer:
    def scores(corpus: Corpus, full: list[Trained], halves: list[Trained]) -> Tensor:
        from trak import TRAKer
        from trak.modelout_functions import AbstractModelOutput
        from trak.projectors import BasicProjector, ProjectionType

        class Language(AbstractModelOutput):  # the package has no output function for documents
            def __init__(self):
                pass

            @staticmethod
            def get_output(model, weights, buffers, x, y):
                logits = torch.func.functional_call(model, (weights, buffers), x[None])
                return _margin(document_losses(logits, y[None])).sum()

            def get_out_to_loss_grad(self, model, weights, buffers, batch):
                losses = document_losses(torch.func.functional_call(model, (weights, buffers), batch[0]), batch[1])
                return (1 - (-losses).exp()).detach()[:, None]

        modules = [trained.module() for trained in halves]
        size = sum(p.numel() for p in modules[0].parameters())
        projector = BasicProjector(
            size, dim, seed=0, proj_type=ProjectionType.normal, device="cpu", dtype=torch.float32, block_size=dim
        )
        with tempfile.TemporaryDirectory() as folder:
            traker = TRAKer(
                modules[0], Language(), len(corpus.x), folder, device="cpu", projector=projector, proj_dim=dim,
                use_half_precision=False,
            )  # fmt: skip
            for number, module in enumerate(modules):
                traker.load_checkpoint(module.state_dict(), model_id=number)
                for batch in zip(corpus.x.split(BATCH), corpus.y.split(BATCH), strict=True):
                    traker.featurize(batch, num_samples=len(batch[0]))
            traker.finalize_features()
            traker.projector = BasicProjector(  # it has given its matrix away
                size, dim, seed=0, proj_type=ProjectionType.normal, device="cpu", dtype=torch.float32, block_size=dim
            )
            for number, module in enumerate(modules):
                traker.start_scoring_checkpoint("q", module.state_dict(), number, num_targets=len(corpus.x_query))
                traker.score([corpus.x_query, corpus.y_query], num_samples=len(corpus.x_query))
            return torch.tensor(traker.finalize_scores("q")).T.float()

    return scores


def _margin(losses: Tensor) -> Tensor:
    """Return log p / (1 - p) of p = exp(-loss)."""
    return -losses - torch.log1p(-(-losses).exp())


def _dattri_loaders(corpus: Corpus) -> list[DataLoader]:
    return [DataLoader(data, BATCH) for data in _data(corpus)]


def _dattri_trak(dim: int) -> Peer:
    def scores(corpus: Corpus, full: list[Trained], halves: list[Trained]) -> Tensor:
        from dattri.algorithm.trak import TRAKAttributor
        from dattri.task import AttributionTask

        model = halves[0].module()

        def losses(params, data):
            x, y = data
            return document_losses(torch.func.functional_call(model, params, x[None]), y[None])[0]

        task = AttributionTask(
            loss_func=lambda params, data: _margin(losses(params, data)),
            model=model,
            checkpoints=[trained.module().state_dict() for trained in halves],
        )
        attributor = TRAKAttributor(
            task=task,
            correct_probability_func=lambda params, data: (-losses(params, data)).exp(),
            projector_kwargs={"device": "cpu", "proj_dim": dim},
        )
        train, queries = _dattri_loaders(corpus)
        attributor.cache(train)
        with torch.no_grad():
            return attributor.attribute(queries).T

    return scores


def _dattri_dot(dim: int) -> Peer:
    def scores(corpus: Corpus, full: list[Trained], halves: list[Trained]) -> Tensor:
        from dattri.algorithm.tracin import TracInAttributor
        from dattri.task import AttributionTask

        model = full[0].module()

        def loss(params, data):
            x, y = data
            return document_losses(torch.func.functional_call(model, params, x[None]), y[None])[0]

        task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
        attributor = TracInAttributor(
            task=task,
            weight_list=torch.ones(1),
            normalized_grad=False,
            projector_kwargs={"device": "cpu", "proj_dim": dim},
        )
        with torch.no_grad():
            return attributor.attribute(*_dattri_loaders(corpus)).T

    return scores


def _dattri_llm(kind: str, **options) -> Peer:
    def scores(corpus: Corpus, full: list[Trained], halves: list[Trained]) -> Tensor:
        import dattri_llm

        def loss(model, batch):
            return token_losses(model(batch["input_ids"]), batch["labels"]).sum()

        train, queries = (
            [{"input_ids": x, "labels": y} for x, y in zip(*data.tensors, strict=True)] for data in _data(corpus)
        )
        model = full[0].module()
        covered = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.LayerNorm | nn.Embedding)]
        covered.remove("positions")  # its gradient is one of the batch there
        with tempfile.TemporaryDirectory() as folder:
            arguments = dattri_llm.AttributionArguments(
                output_dir=folder, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH
            )
            attributor = getattr(dattri_llm, kind)(
                arguments, task=dattri_llm.AttributionTask(loss_func=loss, model=model)
            )
            found = attributor.attribute(
                train,
                queries,
                hook_config=dattri_llm.HookManagerConfig(hook_types=dict.fromkeys(covered, "linear_io")),
                **options,
            )
        return found.agnostic_matrix()[1].T

    return scores


def _bergson(size: int, damping: float) -> Peer:
    """Use its hooks on linear layers, which project from both sides; its pipeline wants a Hugging Face model."""

    def scores(corpus: Corpus, full: list[Trained], halves: list[Trained]) -> Tensor:
        from bergson import GradientProcessor, InMemoryCollector
        from bergson.config import IndexConfig

        module = full[0].module()
        module.device = torch.device("cpu")

        def collect(data: TensorDataset, hessians: bool) -> tuple[dict[str, Tensor], GradientProcessor]:
            x, y = data.tensors
            processor = GradientProcessor(projection_dim=size)
            with tempfile.TemporaryDirectory() as folder:
                collector = InMemoryCollector(
                    model=module, data=range(len(x)), processor=processor,
                    cfg=IndexConfig(run_path=folder), skip_hessians=not hessians,
                )  # fmt: skip
                for ids in torch.arange(len(x)).split(BATCH):
                    with collector.with_batch(y[ids] >= 0):
                        losses = token_losses(module(x[ids]), y[ids]).sum(1)
                        losses.sum().backward()
                    collector.process_batch(ids.tolist(), losses=losses)
                collector.teardown()
            return collector.gradients, processor

        train, queries = _data(corpus)
        rows, processor = collect(train, True)
        asked, _ = collect(queries, False)
        total = torch.zeros(len(corpus.x_query), len(corpus.x))
        for name, (values, vectors) in processor.hessians_eigen.items():
            inverse = vectors / (values + damping * values.mean()) @ vectors.T
            total += asked[name].float() @ inverse @ rows[name].float().T
        return total

    return scores
