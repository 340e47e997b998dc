"""The kernels in numba: the theorems of all kernels; threads change no bit; compiled code is kept where that works."""

import contextlib
import gc
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from forks import Started
from kernel_theorems import FAR, KINDS, KernelTheorems, assert_equal_products, gathered
from marks import slow, some

from lightning_sketch.operators import BlockSRHT, kernels

pytest.importorskip("numba", minversion="0.60")

HOUR = 3600
NOW = "import torch\nfrom lightning_sketch.operators import BlockSRHT, CountSketch, kernel_in_use\n"

CHECKED = """
def errors(sketch):
    x, y = torch.linspace(-1, 1, sketch.n), torch.linspace(-1, 1, sketch.dim)
    for product, v in ((sketch.matvec, x), (sketch.rmatvec, y)):
        yield float((product(v) - product(v.double())).norm() / product(v.double()).norm())

def check(*sketches):
    assert all(error < 1e-6 for sketch in sketches for error in errors(sketch))
    assert kernel_in_use(sketches[0], "cpu") == "numba"

"""

FORKED = """
import multiprocessing, sys, threading
from lightning_sketch.operators.kernels.numba import launches

torch.set_num_threads(2)
launches._SHARED = 0  # small work is shared too
sketch = BlockSRHT(n=1_000_000, dim=100, seed=3)  # four parts
x = torch.linspace(-1, 1, sketch.n)
plain = sketch.matvec(x)
assert launches._threads

def child():
    both = threading.Barrier(2)
    launches._share(lambda *_: both.wait(3600), (), 2, launches._PART, None)
    assert torch.equal(sketch.matvec(x), plain)

process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
sys.exit(process.exitcode)
"""


WITH_REGISTERS = """
from llvmlite import binding

features = binding.get_host_cpu_features()

class Features(type(features)):
    def get(self, name):
        return {lanes} == 16 if name == "avx512f" else self[name]

binding.get_host_cpu_features = lambda: Features(features)
from lightning_sketch.operators.kernels.numba import vectors

assert vectors.LANES == {lanes}
"""


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv("LIGHTNING_SKETCH_KERNEL", "numba")


@pytest.fixture
def threads():
    """Return a function that sets the number of threads, which is restored after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Return the module of launches, in which small work is shared too."""
    from lightning_sketch.operators.kernels.numba import launches

    monkeypatch.setattr(launches, "_SHARED", 0)
    return launches


@pytest.fixture
def share(launches):
    """Return a function that shares out calls among threads."""

    def share(work, count, of_a_part=1, memory=None):
        launches._share(work, (), count, launches._PART // of_a_part, memory)

    return share


@pytest.fixture
def run(tmp_path):
    """Return a function that runs a program in a process of its own, which has to end well and without a warning."""

    def run(program):
        (tmp_path / "program.py").write_text(NOW + program)
        process = Started(tmp_path / "program.py")
        _, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")

    return run


class TestNumba(KernelTheorems):
    kernel = "numba"

    @pytest.mark.parametrize("chunk", some([1 << bits for bits in range(9)], [1, 4, 8, 32, 64, 128, 256]))
    def test_short_chunks(self, chunk, vectors):
        """Several of them are mapped at once: whole ones where they lie, and others in a copy."""
        for dim in {chunk, 3 * chunk // 4} - {0}:
            assert_equal_products(BlockSRHT(n=21_000, dim=dim, seed=3), 0, 21_000, 2, torch.bfloat16, vectors)
            assert_equal_products(BlockSRHT(n=21_000, dim=dim, seed=3), 300, 20_000, 2, torch.float32, vectors)

    @pytest.mark.parametrize("bits", [16, 18, *map(slow, (17, 19, 20, 21))])
    def test_long_chunks(self, bits, vectors):
        """Made of several blocks that are mixed with each other, in two steps from 2^18 on."""
        sketch = BlockSRHT(n=5 << bits - 1, dim=1 << bits, seed=3)
        for start, stop, dtype in ((0, sketch.n, torch.bfloat16), (99, sketch.n, torch.float32)):
            assert_equal_products(sketch, start, stop, 1, dtype, vectors)

    def test_long_vectors(self, kind, vectors):
        """Of so many chunks that sums are emptied on the way, and of many rows, some at a time."""
        for dim, n in ((100, 1_000_000), (3000, 1_000_000), (5000, 30_000)):
            assert_equal_products(kind(n=n, dim=dim, seed=3), 0, n, 1, torch.float32, vectors)
        assert_equal_products(kind(n=100_000, dim=60_000, seed=3), 0, 100_000, 40, torch.float32, vectors)


def products(kind, draw):
    """Return both products of vectors of several parts and of many rows, and those of pieces and chunks."""
    x = draw(2, 1_000_000).float()
    for dim in (1, 100, 5000, 1 << 16):
        sketch = kind(n=1_000_000, dim=dim, seed=3)
        yield sketch.matvec(x)
        yield sketch.rmatvec(x[:, :dim].bfloat16())
        yield kernels.forward_pieces(sketch, [(5, x[0, :500_000]), (500_100, x[1, :400_000].bfloat16())])
    sketch, x = kind(n=1 << 40, dim=48, seed=3), draw(700, 5, 64).float()
    yield sketch.columns(FAR, FAR + 64).matvec(x[:, 0])
    yield gathered(sketch, x[..., : sketch.chunk].contiguous(), torch.tensor([[5, 0, 8, FAR // 64, 9]]))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_number_of_threads_changes_no_bit(kind, vectors, threads):
    alone = list(products(kind, vectors))
    for number in (2, 3):
        threads(number)
        assert all(map(torch.equal, products(kind, vectors), alone))


def test_sketches_in_several_threads_are_those_of_one(vectors, threads):
    """Each of which has help from others."""
    threads(2)
    x = vectors(3, 700_000).float()
    sketches = [kind(n=700_000, dim=dim, seed=dim) for kind in KINDS for dim in (100, 300, 5000)]

    def job(sketch):
        y = sketch.matvec(x)
        return y, sketch.rmatvec(y)

    alone = [job(sketch) for sketch in sketches]
    with ThreadPoolExecutor(3) as pool:
        for there, back in zip(pool.map(job, sketches * 3), alone * 3, strict=True):
            assert all(map(torch.equal, there, back))


def test_work_is_shared(share, threads):
    """Two parts that wait for each other are both done; on one thread there is no other."""
    threads(2)
    both = threading.Barrier(2)
    share(lambda *_: both.wait(HOUR), 2)
    threads(1)
    seen = []
    share(lambda *range: seen.append((*range, threading.get_ident())), 5, of_a_part=2)
    assert seen == [(start, min(start + 2, 5), threading.get_ident()) for start in (0, 2, 4)]


@pytest.mark.parametrize("where", ["here", "there"])
def test_after_an_error_nobody_works(share, threads, where):
    """Not even when Ctrl-C is pressed here: others would write to what the program has for itself again."""
    threads(2)
    both, release, here, begun, ended = threading.Barrier(2), threading.Event(), threading.get_ident(), [], []

    def work(start, stop):
        begun.append(start)
        if start < 2:
            both.wait(HOUR)
            if (threading.get_ident() == here) == (where == "here"):
                ended.append(start)
                threading.Timer(0.2, release.set).start()  # after the error has been noticed
                raise KeyboardInterrupt
            assert release.wait(HOUR)
        ended.append(start)

    with pytest.raises(KeyboardInterrupt):
        share(work, 1000)
    assert sorted(begun) == sorted(ended)
    assert len(begun) == (2 if where == "here" else 1000)


def test_threads_hold_the_memory_that_they_write_to(launches, share, threads, monkeypatch):
    """Ctrl-C that is pressed twice does not wait for them."""
    threads(2)
    both, release, ended, here, held = threading.Barrier(2), threading.Event(), threading.Event(), [], []
    memory = torch.ones(1)
    alive = weakref.ref(memory)

    def press(*_):
        raise KeyboardInterrupt

    def work(*_):
        both.wait(HOUR)
        if threading.get_ident() in here:
            press()
        assert release.wait(HOUR)
        held.append(alive() is not None)
        ended.set()

    here.append(threading.get_ident())
    with monkeypatch.context() as impatient, contextlib.suppress(KeyboardInterrupt):
        impatient.setattr(launches, "wait", press)
        share(work, 2, memory=memory)
    del memory
    gc.collect()
    release.set()
    assert ended.wait(HOUR)
    assert held == [True]


@pytest.mark.slow
def test_a_program_sketches_until_it_ends():
    """When Python starts no more threads; errors there do not change how a process ends."""
    at_exit = "import atexit\natexit.register(lambda: (check(BlockSRHT(n=5_000_000, dim=48)), print('done')))"
    command = [sys.executable, "-c", f"{NOW}torch.set_num_threads(2)\n{CHECKED}{at_exit}"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("done\n", "")


@pytest.mark.slow
def test_a_forked_process_sketches_too(run):
    """It has none of its parent's threads, and starts others."""
    run(FORKED)


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [8, 16])
def test_registers_of_every_width_give_the_same(run, lanes):
    """A CPU with AVX-512 has 16 numbers in a register, others have 8."""
    dims = 2, 8, 100, 40_000
    run(WITH_REGISTERS.format(lanes=lanes) + CHECKED + f"check(*(BlockSRHT(9000 + 2 * dim, dim) for dim in {dims}))")


@pytest.mark.slow
def test_compiled_code_need_not_be_kept(run, monkeypatch, tmp_path):
    """Neither without a folder to write to nor on a full disk."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_LOCATOR_CLASSES", "UserProvidedCacheLocator")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "folder"))
    run(CHECKED + "check(CountSketch(n=1000, dim=48))")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "full"))
    full = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
    run(full + CHECKED + "check(CountSketch(n=1000, dim=48))")


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["nbi", "nbc"])
def test_kept_code_that_was_cut_off_is_compiled_again(run, monkeypatch, tmp_path, ending):
    """As after a crash of the machine."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "kept"))
    program = CHECKED + "check(CountSketch(n=1000, dim=48))"
    run(program)
    files = list((tmp_path / "kept").rglob(f"*.{ending}"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    run(program)
