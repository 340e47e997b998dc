"""The command does in a process of its own what the library does, says what failed, and its exit code tells."""

import json
import subprocess
import sys

import pytest
import torch
from engines import a_store, examples, put

from lightning_sketch import GradientStore
from lightning_sketch.attribution import top_k
from lightning_sketch.store import LanceRows

pytest.importorskip("jsonargparse")


def run(*arguments):
    command = [sys.executable, "-m", "lightning_sketch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


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
    done = run("top-k", tmp_path / "store", "3,7", "--k", 4, "--json")
    assert done.returncode == 0, done.stderr
    best = top_k(store.where(example_id=[3, 7]).read(), store, 4, method="cosine")
    found = json.loads(done.stdout)
    assert [[int(id) for id, _ in found[name]] for name in ("3", "7")] == best.example_ids.tolist()
    assert "3:" in run("top-k", tmp_path / "store", "3,7", "--k", 4).stdout


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


def test_an_id_that_is_not_there_is_said(tmp_path, capsys):
    from lightning_sketch.cli import main

    a_store(tmp_path / "store")
    with pytest.raises(SystemExit) as stopped:
        main(["top-k", str(tmp_path / "store"), "9999"])
    assert stopped.value.code == 1
    assert "no rows of the examples 9999" in capsys.readouterr().err
    assert len(GradientStore.open(tmp_path / "store")) == 400
