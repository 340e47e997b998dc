"""A page to browse: each query with the training examples that helped and that hurt it, in one file."""

import base64
import io
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lightning_sketch.attribution.curvature import Damping
from lightning_sketch.attribution.scores import CurvatureLike, Method, TopK, scored_rows, top_k
from lightning_sketch.store.sketched_gradients import DEFAULTS, STAGES, RowSource, SketchedGradients, Strings

# What users see of the columns that the library writes; all of their own are shown.
_HIDDEN = DEFAULTS.keys() - {"stage", "step", "loss", "prob_true", "weight"}
_HIDDEN |= {"attempt", "dataloader", "example", "example_ids", "part", "token"}
_TEMPLATE = Path(__file__).with_suffix(".html")


def report(
    path: str | Path,
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
    title: str = "Which examples taught what",
) -> Path:
    """Write one HTML file with the best and the worst examples of each query, and return its path.

    The page needs no network and no server. Queries can be searched and sorted; those with a row for each token show
    the text, whose tokens can be clicked.

    Args:
        path: The file, which is replaced.
        queries: The rows of the queries.
        store: The rows of the training examples.
        train: The training examples by their ids, as a list, a dict or a data set: texts, images (arrays or tensors of
            (height, width), or with 1, 3 or 4 channels first or last, whole numbers from 0 to 255 or others from 0 to
            1, or PIL's), or anything else, whose `str` is shown. Only ids are shown if None.
        queries_of: The same of the queries, in their order; for queries by token the tokens of each text, as strings.
        k: The number of examples on each side.
        method: As in `top_k`, as are `curvature`, `damping` and `weighted`.
        curvature: The curvature for influence.
        damping: The damping for influence.
        normalize: Whether scores are relative influence, since without it outliers are in all lists.
        weighted: Whether to multiply by the weights of the rows.
        title: The title of the page.

    Raises:
        ValueError: as `top_k`; if `queries_of` has another length than there are queries; if rows have no ids, and
            `train` is given.
        KeyError: if `train` lacks an example.

    Cost: twice that of `top_k`; the file has the shown examples once each.

    Example::

        store.report("report.html", queries, train=texts, queries_of=questions)
    """
    options: dict[str, Any] = {"method": method, "curvature": curvature, "damping": damping}
    options |= {"normalize": normalize, "weighted": weighted}
    data = answers(queries, store, k, train, queries_of, options)
    how = f"{method}{', relative (divided by lengths)' if normalize else ''}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what top_k has said
        compared = len(scored_rows(queries, store))
    rows = f"{compared:,} rows" if compared == len(store) else f"{compared:,} of {len(store):,} rows"
    about = f"{rows}, {how}. A positive score: without the example the loss of the query would rise."
    text = json.dumps({"title": title, "about": about, **data}, allow_nan=False).replace("<", "\\u003c")
    found = Path(path)
    found.parent.mkdir(parents=True, exist_ok=True)
    found.write_text(_TEMPLATE.read_text(encoding="utf-8").replace("DATA", text, 1), encoding="utf-8")
    return found


def answers(
    queries: SketchedGradients, store: RowSource, k: int, train: Any, queries_of: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the queries with their answers, and the examples that these name, as what JSON can hold."""
    helped, hurt = (top_k(queries, store, k, largest=largest, **options) for largest in (True, False))
    columns = queries.metadata()
    by_token = "token" in columns
    numbers = columns["example"].tolist() if by_token else list(range(len(queries)))
    groups: dict[int, list[int]] = {}
    for row, number in enumerate(numbers):
        groups.setdefault(number, []).append(row)
    if queries_of is not None and len(queries_of) != len(groups):
        raise ValueError(f"queries_of has {len(queries_of)} entries for {len(groups)} queries; pass one for each.")
    found = [_query(n, rows, columns, (helped, hurt), queries_of, by_token) for n, rows in enumerate(groups.values())]
    if train is not None and helped.unit != "example":
        raise ValueError(
            "the rows have no example ids, so that train cannot be shown; load the data as IndexedDataset."
        )
    ids = {str(id): id for both in (helped, hurt) for row in _lists(both.example_ids) for id in row}
    return {"unit": helped.unit, "queries": found, "examples": _examples(ids, store, train, helped.unit)}


def _query(
    number: int, rows: list[int], columns: Mapping[str, Any], both: tuple[TopK, TopK], queries_of: Any, by_token: bool
) -> dict[str, Any]:
    content = None if queries_of is None else queries_of[number]
    own = [_answer(row, columns, both, by_token) for row in rows]
    facts = {} if by_token else own[0].pop("facts")
    if by_token and any("loss" in answer["facts"] for answer in own):
        facts = {"loss": sum(answer["facts"].get("loss", 0.0) for answer in own) / len(own)}
    tokens = [str(token) for token in content] if by_token and content is not None else None
    last = max(answer["token"] for answer in own) if by_token else 0
    if tokens is not None and last >= len(tokens):
        raise ValueError(
            f"query {number} has rows up to token {last}, and queries_of[{number}] has {len(tokens)} tokens; pass all."
        )
    if by_token and tokens is None:
        tokens = [f"[{place}] " for place in range(1 + last)]
    return {"number": number, "id": number, "tokens": tokens, "facts": facts, "answers": own,
            "content": tokens if by_token else shown(content)}  # fmt: skip


def _answer(row: int, columns: Mapping[str, Any], both: tuple[TopK, TopK], by_token: bool) -> dict[str, Any]:
    helped, hurt = (_signed(top, row, sign) for top, sign in zip(both, (1, -1), strict=True))
    facts = _facts(columns, row)
    if both[0].reliability is not None:
        facts["reliability"] = _number(float(both[0].reliability[row]))
    strength = max([abs(score) for _, score in [*helped, *hurt]], default=0.0)
    token = int(columns["token"][row]) if by_token else None
    return {"token": token, "helped": helped, "hurt": hurt, "facts": facts, "strength": strength}


def _signed(top: TopK, row: int, sign: int) -> list[tuple[str, float]]:
    """Return the ids and scores of a query that have a sign: of few examples, the last that helped may hurt."""
    pairs = zip(_lists(top.example_ids)[row], top.scores[row].tolist(), strict=True)
    return [(str(id), score) for id, score in pairs if score * sign > 0 and math.isfinite(score)]


def _examples(ids: Mapping[str, Any], store: RowSource, train: Any, unit: str) -> dict[str, Any]:
    """Return what is shown of each example: its content, and the columns of its first row."""
    columns = store.metadata()
    known = columns["example_id"].tolist() if unit == "example" else columns["step"].tolist() if unit == "step" else []
    places = {str(id): place for place, id in reversed(list(enumerate(known)))}
    found = {}
    for name, id in ids.items():
        place = places.get(name, id if unit == "row" else None)
        content = None if train is None or unit != "example" else shown(_of(train, id))
        found[name] = {"content": content, "facts": {} if place is None else _facts(columns, place)}
    return found


def _of(train: Any, id: Any) -> Any:
    try:
        return train[id]
    except (KeyError, IndexError) as error:
        raise KeyError(
            f"train has no example {id!r}, which the store has; pass the data in their order, or a dict by id."
        ) from error


def _facts(columns: Mapping[str, Any], row: int) -> dict[str, Any]:
    """Return the known values of a row that say something to a user."""
    facts: dict[str, Any] = {}
    for name, column in columns.items():
        if name in _HIDDEN:
            continue
        value = column[row] if isinstance(column, Strings) else column[row].tolist()
        if name == "stage":
            value = STAGES[int(value)]
        if isinstance(value, float):
            value = _number(value)
        if value is not None and not (name in DEFAULTS and name != "stage" and value == DEFAULTS[name]):
            facts[name] = value if isinstance(value, int | float | bool) else str(value)
    return facts


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _lists(ids: Any) -> list[list[Any]]:
    return ids.tolist() if isinstance(ids, Tensor) else [list(row) for row in ids]


def shown(content: Any) -> Any:
    """Return a text as it is, an image as {"image": data URI}, anything else as its `str`."""
    if content is None or isinstance(content, str):
        return content
    if hasattr(content, "save") and hasattr(content, "mode"):  # PIL's
        return {"image": _png(content)}
    if isinstance(content, np.ndarray | Tensor):
        array = content.detach().cpu().float().numpy() if isinstance(content, Tensor) else content
        if array.ndim in (2, 3) and min(array.shape) > 0:
            return {"image": _png(_pixels(array, content))}
    if isinstance(content, list | tuple) and content and isinstance(content[0], np.ndarray | Tensor):
        label = ", ".join(str(part.tolist() if hasattr(part, "tolist") else part) for part in content[1:])
        return {**shown(content[0]), "alt": label} if isinstance(shown(content[0]), dict) else str(content)
    return str(content)


def _pixels(array: np.ndarray, content: Any) -> Any:
    """Return an array as an image of PIL."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images in a report need Pillow: pip install 'lightning-sketch[plots]'.") from error
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
        raise ValueError(
            f"an image has the shape {tuple(content.shape)}; pass (height, width), or with 1, 3 or 4 channels."
        )
    whole = not (content.is_floating_point() if isinstance(content, Tensor) else content.dtype.kind == "f")
    pixels = (array if whole else 255 * np.nan_to_num(array).clip(0, 1)).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def _png(image: Any) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
