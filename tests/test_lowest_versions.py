"""The versions that `make test-lowest` installs are the lowest that the package promises."""

import re
from importlib.metadata import requires
from pathlib import Path

PINNED = Path(__file__).parents[1] / "constraints-lowest.txt"


def release(version):
    """A version as numbers, without the zeros at its end."""
    return tuple(int(part) for part in re.sub(r"(\.0)+$", "", version).split("."))


def test_each_lower_bound_is_installed_by_the_leg_of_lowest_versions():
    promised = {
        found[1]: release(found[2])
        for requirement in requires("lightning-sketch") or []
        if (found := re.match(r"([\w-]+)[^>]*>=([\d.]+)", requirement))
    }
    pinned = dict(line.split("==") for line in PINNED.read_text().splitlines() if "==" in line)
    del pinned["rich"], pinned["peft"]  # what an old Lightning and old transformers need
    assert len(promised) == 17
    assert promised.pop("torch") <= release(pinned.pop("torch"))
    assert pinned.pop("lightning") == pinned["pytorch-lightning"]  # the two namespaces of one package
    assert promised == {name: release(version) for name, version in pinned.items()}
