"""The content of a report as a table of Weights & Biases."""

import base64
import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lightning_sketch.attribution.curvature import Damping
from lightning_sketch.attribution.report import answers
from lightning_sketch.attribution.scores import CurvatureLike, Method
from lightning_sketch.store.sketched_gradients import RowSource, SketchedGradients

if TYPE_CHECKING:
    import wandb


def report_table(
    queries: SketchedGradients,
    store: RowSource,
    *,
    train: Any = None,
    queries_of: Sequence[Any] | None = None,
    k: int = 10,
    method: Method = "dot",
    curvature: CurvatureLike = "ggn",
    damping: Damping = "auto",
    normalize: bool = True,
    weighted: bool = False,
) -> "wandb.Table":
    """Return what `report` shows as a table of W&B, with a row for each query and each of its examples.

    Its columns are `query` and `query text` or `query image`, `token` for queries by token, `effect` ("helped" or
    "hurt"), `rank` (1 for the strongest), `score`, `example` and `example text` or `example image`, and what is known
    of both, such as `query loss` and `example prob_true`; what is not known is None.

    Args:
        queries: The rows of the queries.
        store: The rows of the training examples.
        train: The training examples by their ids, as in `report`, and `queries_of`.
        queries_of: The same of the queries.
        k: The number of examples on each side.
        method: As in `top_k`, as are `curvature`, `damping` and `weighted`.
        curvature: The curvature for influence.
        damping: The damping for influence.
        normalize: Whether scores are relative influence.
        weighted: Whether to multiply by the weights of the rows.

    Raises:
        ValueError: as `report`.
        KeyError: as `report`.
        ImportError: if wandb is missing.

    Cost: that of `report`.

    Example::

        wandb.log({"answers": report_table(queries, store, train=texts, queries_of=questions)})
    """
    try:
        import wandb
    except ImportError as error:
        raise ImportError("report_table needs wandb: pip install 'lightning-sketch[wandb]', or use report.") from error
    options: dict[str, Any] = {"method": method, "curvature": curvature, "damping": damping}
    options |= {"normalize": normalize, "weighted": weighted}
    rows = list(_rows(answers(queries, store, k, train, queries_of, options)))
    first = ["query", "query text", "query image", "token", "effect", "rank", "score"]
    first += ["example", "example text", "example image"]
    names = sorted({name for row in rows for name in row} - set(first))
    columns = [name for name in first if any(row.get(name) is not None for row in rows)] + names
    return wandb.Table([*columns], [[row.get(name) for name in columns] for row in rows])


def _rows(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield for each query and example what the table says of them."""
    examples = {
        id: {**_content("example", known["content"]), **_prefixed("example", known["facts"])}
        for id, known in data["examples"].items()
    }
    for query in data["queries"]:
        content = _content("query", "".join(query["tokens"]) if query["tokens"] else query["content"])
        for answer in query["answers"]:
            facts = answer.get("facts", {}) if query["tokens"] else query["facts"]
            token = None if answer["token"] is None else f"{answer['token']}: {query['tokens'][answer['token']]}"
            own = {"query": query["number"], **content, "token": token, **_prefixed("query", facts)}
            for effect in ("helped", "hurt"):
                for rank, (id, score) in enumerate(answer[effect], 1):
                    yield {**own, "effect": effect, "rank": rank, "score": score, "example": id, **examples[id]}


def _prefixed(prefix: str, facts: dict[str, Any]) -> dict[str, Any]:
    taken = {name: f"column {name}" for name in ("image", "text")}  # where a user's column has a name of the table's
    return {f"{prefix} {taken.get(name, name)}": value for name, value in facts.items()}


def _content(prefix: str, content: Any) -> dict[str, Any]:
    """Return a text as it is, and an image of a report as one of W&B, whose columns are of one kind each."""
    if not isinstance(content, dict):
        return {f"{prefix} text": content}
    import wandb
    from PIL import Image

    png = base64.b64decode(content["image"].partition(",")[2])
    return {f"{prefix} image": wandb.Image(Image.open(io.BytesIO(png)), caption=content.get("alt"))}
