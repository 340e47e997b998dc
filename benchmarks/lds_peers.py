"""Attributors of three other packages behind one signature: scores (tests, examples), positive where it helps.

Not dependencies: pip install dattri traker kronfluence, in an environment of its own, since the last brings a
torchvision that must fit your torch. Packages that are not installed are missing from the table.
"""

import contextlib
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from lds_problems import Problem
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

MODULES = {"dattri": "dattri", "traker": "trak", "kronfluence": "kronfluence"}
Peer = Callable[[Problem, list[nn.Module], list[nn.Module]], Tensor]


def installed(package: str) -> bool:
    return importlib.util.find_spec(MODULES[package]) is not None


def peers(linear: bool) -> dict[str, tuple[str, Peer]]:
    """Return, by name in the table, the package and (problem, models on all data, models on halves) -> scores."""
    found: dict[str, tuple[str, Peer]] = {}
    for damping in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1):
        found[f"dattri IF, CG, damping {damping:g}"] = ("dattri", _dattri_if("IFAttributorCG", damping))
    if linear:
        for damping in (1e-3, 2e-3, 1e-2):
            found[f"dattri IF, explicit, damping {damping:g}"] = ("dattri", _dattri_if("IFAttributorExplicit", damping))
    for dim in (64, 256):
        found[f"dattri TRAK, 1 model, dim {dim}"] = ("dattri", _dattri_trak(1, dim))
        found[f"dattri TRAK, 10 models on halves, dim {dim}"] = ("dattri", _dattri_trak(10, dim))
    found["traker TRAK, 10 models on halves, dim 256"] = ("traker", _traker(10, 256))
    found["kronfluence EK-FAC"] = ("kronfluence", _kronfluence("ekfac"))
    return {name: line for name, line in found.items() if installed(line[0])}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and warnings of other packages."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)


def _loaders(given: Problem) -> tuple[DataLoader, DataLoader]:
    return (
        DataLoader(TensorDataset(given.x, given.y), len(given.x)),
        DataLoader(TensorDataset(given.x_test, given.y_test), 25),  # products for 25 tests at once fit in memory
    )


def _dattri_if(kind: str, damping: float) -> Peer:
    def scores(given: Problem, full: list[nn.Module], halves: list[nn.Module]) -> Tensor:
        from dattri.algorithm import influence_function
        from dattri.task import AttributionTask

        model = full[0]

        def loss(params, data):
            x, y = data
            return F.cross_entropy(torch.func.functional_call(model, params, x), y)

        task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
        options = {"max_iter": 50} if kind == "IFAttributorCG" else {}
        attributor = getattr(influence_function, kind)(task=task, regularization=damping, **options)
        train, test = _loaders(given)
        attributor.cache(train)
        return attributor.attribute(train, test).T

    return scores


def _dattri_trak(models: int, dim: int) -> Peer:
    def scores(given: Problem, full: list[nn.Module], halves: list[nn.Module]) -> Tensor:
        from dattri.algorithm.trak import TRAKAttributor
        from dattri.task import AttributionTask

        members = halves[:models] if models > 1 else full[:1]
        model = members[0]

        def log_prob(params, data):
            x, y = data
            return -F.cross_entropy(torch.func.functional_call(model, params, x[None]), y[None])

        def margin(params, data):
            logp = log_prob(params, data)
            return logp - torch.log(1 - torch.exp(logp))

        task = AttributionTask(loss_func=margin, model=model, checkpoints=[m.state_dict() for m in members])
        attributor = TRAKAttributor(
            task=task,
            correct_probability_func=lambda params, data: log_prob(params, data).exp(),
            projector_kwargs={"device": "cpu", "proj_dim": dim},
        )
        train, test = _loaders(given)
        attributor.cache(train)
        with torch.no_grad():
            return attributor.attribute(test).T

    return scores


def _traker(models: int, dim: int) -> Peer:
    def scores(given: Problem, full: list[nn.Module], halves: list[nn.Module]) -> Tensor:
        from trak import TRAKer
        from trak.projectors import BasicProjector, ProjectionType

        size = sum(p.numel() for p in full[0].parameters())
        projector = BasicProjector(
            size, dim, seed=0, proj_type=ProjectionType.normal, device="cpu", dtype=torch.float32, block_size=dim
        )
        with tempfile.TemporaryDirectory() as folder:
            traker = TRAKer(
                halves[0], "image_classification", len(given.x), folder, device="cpu", projector=projector,
                proj_dim=dim, use_half_precision=False,
            )  # fmt: skip
            for number, member in enumerate(halves[:models]):
                traker.load_checkpoint(member.state_dict(), model_id=number)
                traker.featurize([given.x, given.y], num_samples=len(given.x))
            traker.finalize_features()
            for number, member in enumerate(halves[:models]):
                traker.start_scoring_checkpoint("tests", member.state_dict(), number, num_targets=len(given.x_test))
                traker.score([given.x_test, given.y_test], num_samples=len(given.x_test))
            return torch.tensor(traker.finalize_scores("tests")).T.float()

    return scores


def _kronfluence(strategy: str) -> Peer:
    def scores(given: Problem, full: list[nn.Module], halves: list[nn.Module]) -> Tensor:
        import copy

        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.task import Task

        class Classify(Task):
            def compute_train_loss(self, batch, model, sample=False):
                logits = model(batch[0])
                labels = torch.multinomial(logits.softmax(1), 1)[:, 0].detach() if sample else batch[1]
                return F.cross_entropy(logits, labels, reduction="sum")

            def compute_measurement(self, batch, model):
                return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        train, test = TensorDataset(given.x, given.y), TensorDataset(given.x_test, given.y_test)
        with tempfile.TemporaryDirectory() as folder:
            model = prepare_model(copy.deepcopy(full[0]), Classify())
            analyzer = Analyzer("lds", model, Classify(), cpu=True, output_dir=folder, disable_tqdm=True)
            analyzer.fit_all_factors("f", train, len(train), factor_args=FactorArguments(strategy=strategy))
            analyzer.compute_pairwise_scores(
                "s", "f", test, train, per_device_query_batch_size=len(test), per_device_train_batch_size=len(train)
            )
            return analyzer.load_pairwise_scores("s")["all_modules"]

    return scores
