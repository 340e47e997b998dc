"""A store returns exactly the rows that were put into it, and files that were changed are refused."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import FORKS

from lightning_sketch import GradientSketchWriter
from lightning_sketch._files import write_document
from lightning_sketch.attribution import GradientStore, read_shard
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators import AFFD, BlockSRHT
from lightning_sketch.store.format import CorruptShard
from lightning_sketch.store.sketched_gradients import SketchedGradients
from lightning_sketch.store.spec import StoreSpec

LAYOUT = Layout(("weight", "bias"), (torch.Size([9, 10]), torch.Size([10])))
SKETCH = BlockSRHT(100, 16, seed=3)


def spec(dtype="float32", sketch=SKETCH, layout=LAYOUT):
    return StoreSpec.of(sketch, layout, dtype=dtype)


def rows(steps, stage="fit", fingerprint=0, scale=1.0):
    """A row for each step, whose numbers depend on the step."""
    steps = torch.tensor(list(steps))
    sketches = scale * torch.sin(steps[:, None] * 16.0 + torch.arange(16.0))
    stages = ("fit", "validate", "test", "predict", "queries")
    columns = {"step": steps, "example_id": 10 * steps, "stage": torch.full_like(steps, stages.index(stage))}
    return SketchedGradients(
        sketches, SKETCH, {**columns, "lr": 1 / (1.0 + steps), "fingerprint": torch.full_like(steps, fingerprint)}
    )


def only_file(store):
    (uri,) = store.shards()
    return uri.partition("#")[0]


def written(path, *parts, dtype="float32", stage="fit", rank=0, parent=None, parent_step=None, **options):
    """A store, after one more run."""
    store = GradientStore.create(path, spec(dtype))
    run = store.begin_run(stage, parent=parent, parent_step=parent_step)
    with store.appender(run, rank, **options) as appender:
        for part in parts:
            appender.put(part)
            appender.flush()
    return GradientStore.open(path)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("bfloat16", 2**-8), ("float16", 2**-11)])
def test_rows_come_back_in_order_with_their_columns(tmp_path, dtype, error):
    """Half a unit in the last place: of the number in bfloat16 (8 bits), of the row's largest in float16 (11 bits)."""
    put = [rows(range(1, 6)), rows([6]), rows(range(7, 20))]
    store = written(tmp_path, *put, dtype=dtype)
    whole = SketchedGradients.cat(put)
    assert len(store) == 19
    back = store.read()
    limit = error * (whole.sketches.abs() if dtype == "bfloat16" else whole.sketches.abs().amax(1, keepdim=True))
    assert ((back.sketches.float() - whole.sketches).abs() <= limit).all()
    for name in ("step", "example_id", "lr"):
        assert torch.equal(back.metadata()[name], whole.metadata()[name])
    assert store.sketch == SKETCH
    assert store.spec.parameters == LAYOUT


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_float16_stores_gradients_of_any_size(tmp_path, scale):
    """By the scale of each row: without it float16 ends at 65504 and rounds all below 6e-8 to zero."""
    part = rows(range(1, 4), scale=scale)
    back = written(tmp_path, part, dtype="float16").read()
    assert ((back.sketches - part.sketches).norm(dim=1) <= 1e-3 * part.sketches.norm(dim=1)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_not_finite_is_zero_and_marked(tmp_path, dtype):
    part = rows(range(1, 5))
    part.sketches[1, 3], part.sketches[2, 0] = torch.nan, torch.inf
    back = written(tmp_path, part, dtype=dtype).read()
    assert back.finite.tolist() == [True, False, False, True]
    assert not back.sketches[1:3].any()


@pytest.mark.parametrize("batch_rows", [1, 3, 4096])
def test_blocks_are_the_rows_a_few_at_a_time(tmp_path, batch_rows):
    store = written(tmp_path, rows(range(1, 6)), rows(range(6, 9)))
    blocks = list(store.blocks(batch_rows))
    assert max(map(len, blocks)) <= batch_rows
    assert torch.equal(SketchedGradients.cat(blocks).sketches, rows(range(1, 9)).sketches)


def test_a_choice_of_rows_is_a_store_of_them(tmp_path):
    store = written(tmp_path, rows(range(1, 6)), rows(range(6, 9)))
    odd = store.where(store.metadata()["step"] % 2 == 1)
    assert odd.metadata()["step"].tolist() == [1, 3, 5, 7]
    assert torch.equal(odd.read().sketches, rows([1, 3, 5, 7]).sketches)
    assert len(odd.where(example_id=50)) == 1
    assert len(store.where(stage="validate")) == 0
    assert len(store.where(stage="validate").read()) == 0
    with pytest.raises(ValueError, match="no column 'steps'"):
        store.where(steps=3)
    with pytest.raises(ValueError, match="no stage 'val'"):
        store.where(stage="val")


def test_ids_of_steps_with_batches_of_different_sizes(tmp_path):
    """Lists of ids are filled up with -1."""

    def step(number, ids):
        part = rows([number])
        return SketchedGradients(part.sketches, SKETCH, {**part.columns, "example_ids": torch.tensor([ids])})

    store = written(tmp_path, step(1, [4, 5, 6]), step(2, [7]))
    assert store.metadata()["example_ids"].tolist() == [[4, 5, 6], [7, -1, -1]]


def test_columns_are_read_without_the_sketches(tmp_path):
    """Changed bytes of a sketch do not matter to metadata(); verify() sees them."""
    store = written(tmp_path, rows(range(1, 6)))
    uri = only_file(store)
    data = bytearray(Path(uri).read_bytes())
    place = data.find(rows([3]).sketches.numpy().tobytes())
    data[place : place + 4] = b"\xff\xff\xff\xff"
    Path(uri).write_bytes(data)
    again = GradientStore.open(tmp_path)
    assert again.metadata()["step"].tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(CorruptShard, match=r"00000000\.safetensors: its contents do not match its checksum"):
        again.verify()


def test_every_flipped_bit_is_seen(tmp_path):
    """In the header, in the columns, in the sketches: opening or verify() refuses."""
    store = written(tmp_path, rows(range(1, 4)))
    uri = only_file(store)
    whole = Path(uri).read_bytes()
    for place in range(0, len(whole), 7):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        Path(uri).write_bytes(data)
        with pytest.raises(CorruptShard):
            GradientStore.open(tmp_path).verify()
    Path(uri).write_bytes(whole)
    assert store.verify() == 3


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_named(tmp_path, kept):
    store = written(tmp_path, rows(range(1, 6)))
    uri = only_file(store)
    whole = Path(uri).read_bytes()
    Path(uri).write_bytes(whole[:kept])
    for read in (lambda: GradientStore.open(tmp_path), store.verify):
        with pytest.raises(CorruptShard, match=r"r00000/a00000001/00000000\.safetensors"):
            read()


def test_foreign_and_missing_files_are_named(tmp_path):
    store = written(tmp_path / "one", rows([1]), rows([2]), rows([3]))
    other = written(tmp_path / "two", rows([1]), dtype="bfloat16")
    folder = tmp_path / "one" / "rows" / "r00000" / "a00000001"
    (folder / "00000001.safetensors").rename(tmp_path / "away")
    with pytest.raises(CorruptShard, match=r"00000001\.safetensors is missing"):
        store.verify()
    with pytest.warns(UserWarning, match=r"rows are missing.*00000001\.safetensors\.$"):
        assert GradientStore.open(tmp_path / "one").metadata()["step"].tolist() == [1, 3]
    (folder / "00000001.safetensors").write_bytes(Path(only_file(other)).read_bytes())
    with pytest.raises(CorruptShard, match=r"00000001\.safetensors belongs elsewhere: its spec"):
        GradientStore.open(tmp_path / "one")
    (folder / "00000001.safetensors").unlink()
    (tmp_path / "away").rename(folder / "mine.safetensors")
    with pytest.raises(CorruptShard, match=r"mine\.safetensors is not a file of a store"):
        GradientStore.open(tmp_path / "one")


def test_another_spec_is_refused_and_both_are_shown(tmp_path):
    written(tmp_path, rows([1]))
    for other, shown in [
        (spec(sketch=BlockSRHT(100, 16, seed=4)), ["'seed': 3", "'seed': 4"]),
        (spec(sketch=AFFD(100, 16, seed=3)), ["block_srht", "affd"]),
        (spec("bfloat16"), ["float32", "bfloat16"]),
        (spec(layout=Layout(("weight", "b"), LAYOUT.shapes)), ["'bias'", "'b'"]),
    ]:
        with pytest.raises(ValueError, match="another spec") as refused:
            GradientStore.create(tmp_path, other)
        assert all(words in str(refused.value) for words in shown)
    assert len(GradientStore.create(tmp_path, spec())) == 1


def test_versions_of_libraries_are_written_down_and_not_compared(tmp_path):
    written(tmp_path, rows([1]))
    stored = json.loads((tmp_path / "spec.json").read_text())
    assert stored["versions"]["torch"] == torch.__version__
    stored["versions"]["torch"] = "1.0"
    del stored["checksum"]
    write_document(tmp_path / "spec.json", {**stored, "of a later version": 1})
    assert len(GradientStore.create(tmp_path, spec())) == 1


def test_of_left_out_parameters_the_names_are_compared(tmp_path):
    """A reason may mention the size of a batch, and a resumed run may begin with another batch."""

    def left_out(**reasons):
        return StoreSpec.of(SKETCH, LAYOUT, left_out=reasons)

    GradientStore.create(tmp_path, left_out(head="called with 8 examples"))
    same = left_out(head="called with 5 examples")
    assert GradientStore.create(tmp_path, same).spec.id == same.id
    with pytest.raises(ValueError, match="another spec:\n  left_out"):
        GradientStore.create(tmp_path, left_out(head="called with 8 examples", tail=""))


def test_bad_specs_and_folders(tmp_path, untyped):
    with pytest.raises(ValueError, match="dtype='int8' is not known"):
        spec("int8")
    with pytest.raises(ValueError, match="the layout has 100 numbers, the sketch takes n=90"):
        spec(sketch=BlockSRHT(90, 16))
    with pytest.raises(FileNotFoundError, match="has no store"):
        GradientStore.open(tmp_path / "nothing")
    written(tmp_path, rows([1]))
    with pytest.raises(ValueError, match="lineage=7 is no fit"):
        GradientStore.open(tmp_path, lineage=7)
    with pytest.raises(ValueError, match="resumes run 9, which is not in"):
        GradientStore.open(tmp_path).begin_run("fit", parent=9, parent_step=1)


def test_shards_are_read_in_other_processes(tmp_path):
    """The visible rows of a store, or a selection of them."""
    store = written(tmp_path, rows([1, 2, 3, 4]), rows([5]), dtype="float16")
    store = store.where(store.metadata()["step"] != 2)
    with FORKS.Pool(1) as pool:
        parts = pool.map(read_shard, store.shards())
    assert torch.equal(SketchedGradients.cat(parts).sketches, store.read().sketches)


def test_export_for_numpy(tmp_path, untyped):
    store = written(tmp_path / "store", rows(range(1, 6)), rows([6]), dtype="bfloat16")
    store.export("npy", tmp_path / "out")
    assert np.array_equal(np.load(tmp_path / "out/sketches.npy"), store.read().sketches.float().numpy())
    assert np.load(tmp_path / "out/step.npy").tolist() == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="use 'npy', 'parquet' or 'lance'"):
        store.export("csv", tmp_path)


def test_files_are_written_by_bytes_by_age_and_at_the_end(tmp_path):
    """The test waits for the file of an old row as long as it takes."""
    store = GradientStore.create(tmp_path, spec())
    with store.appender(store.begin_run("fit"), shard_bytes=1, flush_seconds=1e9) as appender:
        for step in range(1, 4):
            appender.put(rows([step]))
    assert len(GradientStore.open(tmp_path).shards()) == 3
    appender = store.appender(store.begin_run("validate"), flush_seconds=0.05)
    appender.put(rows([5], stage="validate"))
    deadline = time.monotonic() + 3600
    while len(GradientStore.open(tmp_path)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(GradientStore.open(tmp_path)) == 4
    appender.close()
    appender.close()


def test_the_caller_may_change_what_was_put(tmp_path):
    store = written(tmp_path)
    part = rows([1, 2])
    with store.appender(store.begin_run("fit")) as appender:
        appender.put(part)
        part.sketches.zero_()
        part.columns["step"][:] = 99
    back = GradientStore.open(tmp_path).read()
    assert torch.equal(back.sketches, rows([1, 2]).sketches)
    assert back.step.tolist() == [1, 2]


def test_a_second_appender_goes_on_after_the_first_and_a_closed_one_takes_nothing(tmp_path):
    store = written(tmp_path)
    run = store.begin_run("fit")
    for step in (1, 2):
        with store.appender(run) as appender:
            appender.put(rows([step]))
    assert GradientStore.open(tmp_path).metadata()["step"].tolist() == [1, 2]
    with pytest.raises(RuntimeError, match="the appender is closed"):
        appender.put(rows([3]))


def test_columns_that_some_rows_have_are_unknown_for_the_others(tmp_path):
    part = rows([1])
    more = SketchedGradients(part.sketches, SKETCH, {**part.columns, "mine": torch.tensor([0.5])})
    more.columns["example_ids"] = torch.tensor([[4, 5]])
    columns = written(tmp_path, more, rows([2])).metadata()
    assert columns["mine"][0] == 0.5
    assert columns["mine"][1].isnan()
    assert columns["example_ids"].tolist() == [[4, 5], [-1, -1]]


def test_the_folder_of_a_writer_that_has_not_written_is_refused():
    with pytest.raises(ValueError, match=r"path=None.*run trainer\.fit first"):
        GradientStore.open(GradientSketchWriter().dirpath)
