"""The command that installs an extra is one for the way this copy was installed."""

import json
from importlib.metadata import PackageNotFoundError

import pytest

from mpt import extras


class Installed:
    def __init__(self, origin: object) -> None:
        self._text = None if origin is None else json.dumps(origin)

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return self._text


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'mpt-home[qlora]'"),
        ({"url": "file:///home/a%20b/mpt", "dir_info": {"editable": True}}, "pip install -e '/home/a b/mpt[qlora]'"),
        ({"url": "file:///src/mpt", "dir_info": {}}, "pip install '/src/mpt[qlora]'"),
        (
            {"url": "file:///tmp/mpt_home-0.1.0.whl", "archive_info": {}},
            "pip install 'mpt-home[qlora] @ file:///tmp/mpt_home-0.1.0.whl'",
        ),
    ],
)
def test_an_extra_is_installed_as_this_copy_was(monkeypatch: pytest.MonkeyPatch, origin: object, command: str) -> None:
    monkeypatch.setattr(extras, "distribution", lambda name: Installed(origin))
    assert extras.install("qlora") == f"`{command}`"


def test_a_copy_that_nobody_installed_says_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "distribution", missing)
    assert extras.install("data") == "`pip install 'mpt-home[data]'`"
