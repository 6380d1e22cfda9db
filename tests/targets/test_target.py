"""Targets are data: every file parses, the host is detected, mistakes are named."""

import platform

import pytest

from qsparse_export.errors import TargetError
from qsparse_export.targets.target import load_target, target_names


@pytest.mark.parametrize("name", target_names())
def test_every_target_parses_under_its_own_name(name):
    target = load_target(name)
    assert target.name == name
    assert target.description
    assert "ort" in target.runtimes


def test_cpu_is_this_machine():
    target = load_target("cpu")
    assert target.arch == platform.machine()
    assert target.system == platform.system().lower()
    assert target.features  # every CPU that runs PyTorch has SSE4.2 or ASIMD


def test_unknown_target_offers_near_names():
    with pytest.raises(TargetError, match="did you mean cpu"):
        load_target("cpuu")


def test_own_toml_file_is_a_target(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\ndescription = "a board"\narch = "aarch64"\nsystem = "linux"\n'
        'features = ["asimd"]\nnative_ops = []\nruntimes = ["ort"]\n'
    )
    assert load_target(str(path)).arch == "aarch64"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "not TOML"),
        ('name = "x"', "missing or unknown fields"),
        (
            'name="x"\ndescription="d"\narch="a"\nsystem="s"\nfeatures=[]\nnative_ops=[]\nruntimes=[]\n',
            "runtimes is empty",
        ),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(TargetError, match=message):
        load_target(str(path))


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(TargetError, match="does not exist"):
        load_target(str(tmp_path / "none.toml"))


def test_unknown_runtime_is_refused_with_what_there_is():
    with pytest.raises(TargetError, match="runs ort, reference, not tvm"):
        load_target("cpu").require_runtime("tvm")
