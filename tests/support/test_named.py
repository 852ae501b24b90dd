"""Objects named as `module:Name`: found in the working directory, and every way in which they are not."""

from __future__ import annotations

from collections import OrderedDict

import pytest

from rex_rag.support.named import is_named, load_named


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    folder = tmp_path / "named_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "parts.py").write_text("class Own(dict):\n    class Inner: ...\nNUMBER = 3\n")
    (folder / "broken.py").write_text("import no_such_library\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])


def test_an_object_of_the_working_directory_is_found():
    own = load_named("named_package.parts:Own", dict, "retriever")
    assert issubclass(own, dict)
    assert load_named("named_package.parts:Own.Inner", None, "tool") is own.Inner
    assert load_named("named_package.parts:NUMBER", int, "tool") == 3
    assert load_named("collections:OrderedDict", dict, "tool") is OrderedDict


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("named_package.parts", r"tool='named_package.parts' names no object; write module:Name"),
        ("no_such_module_here:Own", r"there is no module 'no_such_module_here', neither in .* nor installed"),
        ("named_package.other:Own", r"there is no module 'named_package.other' in the package 'named_package'"),
        ("named_package.parts:Owm", r"named_package.parts has no 'Owm'; it has NUMBER, Own"),
        ("named_package.parts:NUMBER", r"is 3; it must be a dict"),
    ],
)
def test_what_is_not_there_is_said(name, said):
    with pytest.raises(ValueError, match=said):
        load_named(name, dict, "tool")


def test_an_error_inside_the_module_is_the_modules():
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        load_named("named_package.broken:Own", None, "tool")


@pytest.mark.parametrize("name", ["http://host:80", "https://h", "bm25", "a/b:c", "localhost:8000", "C:\\x", "a:b:c"])
def test_addresses_and_paths_are_no_names(name):
    assert not is_named(name)
