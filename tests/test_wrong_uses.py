"""Each wrong use is refused by a message of our own, of what was asked, what came and what to do; its advice works."""

import re
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path

import pytest
from wrong_uses import TOPICS, WRONG_USES, Given

# These are raised before any code of ours runs, and the page explains them.
OF_OTHERS = ["Model.load_from_checkpoint of a subspace's checkpoint", "Two monitors without names"]

LONG = re.compile(r"spectrum\(|loss_slice\(|find\(|fit\(|validate\(")  # over two seconds, some of them

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # which are tested where they are given


def name_of(use):
    return f"{use.topic}: {use.title}"


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    return Given(tmp_path_factory.mktemp("refused"))


@pytest.fixture(scope="module")
def advised(tmp_path_factory):
    """Return what the advice is tried on, which fits curvatures and writes files."""
    return Given(tmp_path_factory.mktemp("advised"))


@pytest.mark.parametrize("use", WRONG_USES, ids=name_of)
def test_a_wrong_use_is_refused_in_plain_words(use, refused, monkeypatch, untyped):
    if "Lance" in use.title:
        pytest.importorskip("lance")
    monkeypatch.chdir(refused.folder)
    with pytest.raises(use.error) as caught:
        use.run(refused)
    message = str(caught.value)
    assert type(caught.value) is use.error
    assert re.search(use.words, message, re.DOTALL), message
    assert len(message) <= 600
    assert not re.search(r"\d{19}", message), message
    assert re.search(r"[;:.] ", message.replace(str(refused.folder), "")), "one clause cannot also say what to do"
    (*_, last) = traceback.extract_tb(caught.value.__traceback__)
    assert ("lightning_sketch" in last.filename) is (use.title not in OF_OTHERS), f"raised in {last.filename}"


@pytest.mark.parametrize(
    "use",
    [pytest.param(use, marks=[pytest.mark.slow] if LONG.search(use.instead) else []) for use in WRONG_USES],
    ids=name_of,
)
def test_what_to_type_instead_works(use, advised, monkeypatch, untyped):
    if "Lance" in use.title:
        pytest.importorskip("lance")
    monkeypatch.chdir(advised.folder)
    use.run_instead(advised)


def test_the_table_is_complete_and_can_be_shown():
    """Forty uses or more, some of each topic; no two of a topic have one heading; each call is one to six lines."""
    assert len(WRONG_USES) >= 40
    assert set(TOPICS) == {use.topic for use in WRONG_USES}
    assert not [name for name, count in Counter(map(name_of, WRONG_USES)).items() if count > 1]
    for use in WRONG_USES:
        lines = use.code.splitlines()
        assert 1 <= len(lines) <= 6, use.title
        assert max(map(len, lines)) <= 120
        assert use.why.endswith(".")


@pytest.mark.slow
def test_the_page_of_the_documentation_is_made():
    """By a process of its own, as the documentation is built: all entries, and no path of this machine."""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "docs/troubleshooting.py"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\n### ") == len(WRONG_USES)
    assert done.stdout.count("```") == 6 * len(WRONG_USES)
    assert not re.search(r"/tmp|/home|/work|/Users", done.stdout)
