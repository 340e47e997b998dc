"""The command does in a process of its own what the library does, says what failed, and its exit code tells."""

import io
import json
import sys

import forks
import numpy as np
import pytest
import torch
from engines import a_store, examples, put

from lightning_sketch import GradientStore, cli
from lightning_sketch.attribution import top_k
from lightning_sketch.cli import main
from lightning_sketch.store import LanceRows

pytest.importorskip("jsonargparse")


def run(*arguments):
    return forks.run("-m", "lightning_sketch", *arguments)


@pytest.mark.slow
def test_info_is_for_a_bug_report():
    done = run("info", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["torch"] == torch.__version__
    assert json.loads(done.stdout)["kernels"].keys() >= {"block_srht on cpu"}


@pytest.mark.slow
def test_a_store_is_verified_compacted_and_exported(tmp_path):
    a_store(tmp_path / "store")
    put(tmp_path / "store", examples(range(10)))
    assert json.loads(run("verify", tmp_path / "store", "--json").stdout) == {"rows": 410}
    assert "rows: 400" in run("compact", tmp_path / "store").stdout
    assert run("export", tmp_path / "store", "lance", tmp_path / "rows.lance").returncode == 0
    again = run("export", tmp_path / "store", "lance", tmp_path / "rows.lance")
    assert again.returncode == 1
    assert "append=True" in again.stderr
    assert "Traceback" not in again.stderr
    assert run("export", tmp_path / "store", "lance", tmp_path / "rows.lance", "--append", "true").returncode == 0
    assert len(LanceRows(tmp_path / "rows.lance")) == 400


@pytest.mark.slow
def test_a_changed_file_is_named(tmp_path):
    a_store(tmp_path / "store")
    file = sorted((tmp_path / "store").rglob("*.safetensors"))[3]
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    done = run("verify", tmp_path / "store")
    assert done.returncode == 1
    assert file.name in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_top_k_of_examples_of_the_store(tmp_path):
    store = a_store(tmp_path / "store")
    done = run("top-k", tmp_path / "store", "7,3", "--k", 4, "--json")
    assert done.returncode == 0, done.stderr
    best = top_k(store.where(example_id=[3, 7]).read(), store, 5, method="cosine")
    found = json.loads(done.stdout)
    assert list(found) == ["7", "3"]
    assert best.example_ids[:, 0].tolist() == [3, 7]  # an example is nearest to itself, and is left out
    assert [[int(id) for id, _ in found[name]] for name in ("3", "7")] == best.example_ids[:, 1:].tolist()
    assert "3:" in run("top-k", tmp_path / "store", "3,7", "--k", 4).stdout


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "npy"])
def test_a_report_reads_examples_from_a_file(tmp_path, kind):
    """That of the library with the same examples in memory."""
    store, texts = a_store(tmp_path / "store"), [f"document {i}" for i in range(400)]
    file, images = tmp_path / f"train.{kind}", np.arange(400 * 9, dtype=np.uint8).reshape(400, 3, 3)
    if kind == "npy":
        np.save(file, images)
    elif kind == "txt":
        file.write_text("\n".join(texts) + "\n")
    elif kind == "jsonl":
        file.write_text("".join(json.dumps({"text": text} if i % 2 else text) + "\n" for i, text in enumerate(texts)))
    else:
        file.write_text(json.dumps(dict(enumerate(texts))))
    main(["report", str(tmp_path / "store"), str(tmp_path / "page.html"), "3,7", "--train", str(file), "--k", "4"])
    train = images if kind == "npy" else texts
    ids = store.metadata()["example_id"]
    store.where((ids != 3) & (ids != 7)).report(
        tmp_path / "same.html",
        store.where(example_id=[3, 7]).read(),
        train=train,
        queries_of=[train[3], train[7]],
        k=4,
    )
    assert (tmp_path / "page.html").read_text() == (tmp_path / "same.html").read_text()


def test_what_a_store_has(tmp_path, capsys):
    store = a_store(tmp_path / "store")
    main(["info", "--store", str(tmp_path / "store"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == len(store)
    assert found["stages"] == {"validate": 400}
    assert found["examples"] == "400: 0, 1, 2, 3, 4, ..."
    assert "source" in found["columns"]
    assert found["files"] == 8


def test_a_table_of_a_stage_names_neighbors(tmp_path):
    from pyarrow import parquet

    a_store(tmp_path / "store")
    put(tmp_path / "store", examples(range(30), stage="test"), stage="test")
    main(
        [
            "export",
            str(tmp_path / "store"),
            "parquet",
            str(tmp_path / "rows.parquet"),
            "--neighbors",
            "4",
            "--stage",
            "test",
        ]
    )
    table = parquet.read_table(tmp_path / "rows.parquet")
    assert len(table) == 30
    assert all(len(row["ids"]) == 4 for row in table["neighbors"].to_pylist())


@pytest.mark.parametrize("verb", ["verify", "compact", "export", "top-k", "report"])
def test_a_terminal_sees_progress_after_two_seconds(tmp_path, monkeypatch, verb):
    """By the share of the files that were read; nothing of it in a file or a pipe, or where it takes less."""
    a_store(tmp_path / "store")
    more = {"export": ["npy", tmp_path / "rows"], "top-k": ["3"], "report": [tmp_path / "page.html", "3"]}.get(verb, [])
    command = [verb, *map(str, [tmp_path / "store", *more])]

    class Terminal(io.StringIO):
        shown = True

        def isatty(self):
            return self.shown

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    main(command)
    assert "%" not in terminal.getvalue()
    monkeypatch.setattr(cli, "_PATIENCE", 0.0)
    main([verb, *map(str, [tmp_path / "store", *more])])
    assert f"{verb}:" in terminal.getvalue()
    assert "%" in terminal.getvalue()
    said, terminal.shown = terminal.getvalue(), False
    main(command)
    assert terminal.getvalue() == said


def test_a_line_of_a_file_is_one_example_whatever_is_in_it(tmp_path, capsys):
    """Separators that Unicode knows beside the end of a line are part of a text; a blank line is no example."""
    texts = ["a\x0cb", "c\u2028d", *(f"document {i}" for i in range(2, 400))]
    a_store(tmp_path / "store")
    (tmp_path / "train.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(text, ensure_ascii=False) for text in texts))
    pages = []
    for kind in ("txt", "jsonl"):
        main(["report", str(tmp_path / "store"), str(tmp_path / kind), "7", "--train", str(tmp_path / f"train.{kind}")])
        pages.append((tmp_path / kind).read_text())
    assert pages[0] == pages[1]
    assert "document 7" in pages[0]
    (tmp_path / "train.jsonl").write_text('"a"\n\n"b"\n')
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "store"), str(tmp_path / "x"), "7", "--train", str(tmp_path / "train.jsonl")])
    assert "line 2 of" in capsys.readouterr().err


def test_equal_ids_of_two_stages_are_not_taken_for_one_example(tmp_path, capsys):
    a_store(tmp_path / "store")
    put(tmp_path / "store", examples(range(30), stage="test"), stage="test")
    with pytest.raises(SystemExit):
        main(["top-k", str(tmp_path / "store"), "3"])
    assert "pass --stage test" in capsys.readouterr().err
    main(["top-k", str(tmp_path / "store"), "3", "--stage", "test", "--json"])
    assert all(int(id) < 30 for id, _ in json.loads(capsys.readouterr().out)["3"])
    with pytest.raises(SystemExit):
        main(["top-k", str(tmp_path / "store"), "3", "--k", "0", "--stage", "test"])
    assert "need k >= 1, got 0" in capsys.readouterr().err


def test_an_answer_is_json_whatever_is_not_a_number():
    assert json.dumps(cli._finite({"a": [1.0, float("nan")], "b": float("inf")}), allow_nan=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["verify", "nowhere"], 1, "has no store"),
        (["top-k", "nowhere", "1", "--method", "dots"], 2, "dot"),
        (["forget"], 2, "choose from"),
        (["--help"], 0, "top-k"),
        (["top-k", "--help"], 0, "influence"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_without_a_traceback(tmp_path, arguments, code, words):
    done = run(*arguments)
    assert done.returncode == code
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_an_id_with_a_comma_goes_into_quotes(tmp_path, capsys):
    put(tmp_path / "store", examples(range(4), example_id=["a", "b", "a,b", "c"]))
    for asked in ('"a,b", c', '"a,b",\nc\n'):
        main(["top-k", str(tmp_path / "store"), asked, "--k", "2", "--json"])
        assert list(json.loads(capsys.readouterr().out)) == ["a,b", "c"]
    for asked in ('"a" b', '"a'):
        with pytest.raises(SystemExit):
            main(["top-k", str(tmp_path / "store"), asked])
        assert "cannot be told apart" in capsys.readouterr().err


def test_an_id_that_is_not_there_is_said(tmp_path, capsys):
    a_store(tmp_path / "store")
    for asked, words in {"9999": "no rows of the examples 9999", "three": "are numbers, got 'three'"}.items():
        with pytest.raises(SystemExit) as stopped:
            main(["top-k", str(tmp_path / "store"), asked])
        assert stopped.value.code == 1
        assert words in capsys.readouterr().err
    assert len(GradientStore.open(tmp_path / "store")) == 400
