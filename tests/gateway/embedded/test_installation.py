"""What is found of the pip-installed Triton, and what is said when a part is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hypergen_gateway.embedded.errors import EmbeddedError
from hypergen_gateway.embedded.installation import find_installation, find_libpython, find_package, find_stub


def test_the_installed_triton_is_found_with_the_stub_of_this_python() -> None:
    installation = find_installation()
    assert installation.server.is_file()
    assert (installation.backends / "python" / "libtriton_python.so").is_file()
    assert installation.stub.parent.name == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert all(folder.is_dir() for folder in installation.library_folders)


def test_a_triton_that_is_not_installed_is_named_with_the_command_that_installs_it() -> None:
    with pytest.raises(EmbeddedError, match="pip install"):
        find_package("no_such_package_anywhere")


def test_an_unsupported_python_is_told_which_ones_are_supported(tmp_path: Path) -> None:
    for version in ("2.6", "2.7", "2.10"):
        (tmp_path / version).mkdir()
    with pytest.raises(EmbeddedError, match=r"use one of 2\.6, 2\.7, 2\.10"):
        find_stub(tmp_path)


def test_a_missing_libpython_is_named_with_its_debian_package(tmp_path: Path) -> None:
    package = f"libpython{sys.version_info.major}.{sys.version_info.minor}"
    with pytest.raises(EmbeddedError, match=f"apt-get install {package} "):
        find_libpython([tmp_path])


def test_libpython_is_found_in_the_first_folder_that_has_it(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0").touch()
    assert find_libpython([tmp_path, there]) == there
