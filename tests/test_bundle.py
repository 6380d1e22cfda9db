"""The folder on disk: written completely or not at all, and every altered byte noticed."""

import errno
import json
import os
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsparse_export.bundle import MANIFEST, Bundle, staged, write_manifest
from qsparse_export.errors import BundleError, TargetError
from qsparse_export.targets.detect import host


def manifest(**changes):
    here = host()
    plain = {
        "schema": 1,
        "kind": "decoder",
        "name": "m",
        "target": {"name": "cpu", "arch": here.arch, "system": here.system, "features": sorted(here.features)},
        "runtime": "ort",
        "native": True,
    }
    return plain | changes


def make(path, content=b"weights", **changes):
    with staged(path, force=True) as folder:
        (folder / "model.onnx").write_bytes(content)
        write_manifest(folder, manifest(**changes))
    return Bundle.load(path)


def test_written_bundle_reads_back(tmp_path):
    bundle = make(tmp_path / "b")
    assert bundle.manifest["files"]["model.onnx"]["bytes"] == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]
    assert sorted(p.name for p in bundle.path.iterdir()) == [MANIFEST, "model.onnx"]


@given(content=st.binary(min_size=1, max_size=64), data=st.data())
def test_every_flipped_bit_is_noticed(tmp_path_factory, content, data):
    bundle = make(tmp_path_factory.mktemp("b") / "b", content)
    at = data.draw(st.integers(0, len(content) * 8 - 1))
    altered = bytearray(content)
    altered[at // 8] ^= 1 << at % 8
    (bundle.path / "model.onnx").write_bytes(altered)
    with pytest.raises(BundleError, match=r"checksum of model\.onnx"):
        Bundle.load(bundle.path)


def test_missing_resized_and_linked_files_are_noticed(tmp_path):
    path = make(tmp_path / "b").path
    (path / "model.onnx").write_bytes(b"longer than it was")
    with pytest.raises(BundleError, match="bytes, the manifest says 7"):
        Bundle.load(path)
    (path / "model.onnx").unlink()
    with pytest.raises(BundleError, match="missing"):
        Bundle.load(path)
    (tmp_path / "elsewhere").write_bytes(b"weights")
    (path / "model.onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="link"):
        Bundle.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a manifest"),
        ('{"schema": 99, "files": {}}', "schema 99"),
        ('{"schema": 1, "files": {}}', "lacks"),
    ],
)
def test_wrong_manifests_are_refused(tmp_path, text, message):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=message):
        Bundle.load(tmp_path)


def test_a_manifest_cannot_point_outside(tmp_path):
    path = make(tmp_path / "b").path
    plain = json.loads((path / MANIFEST).read_text())
    plain["files"]["../x"] = {"bytes": 1, "sha256": ""}
    (path / MANIFEST).write_text(json.dumps(plain))
    with pytest.raises(BundleError, match="only plain names"):
        Bundle.load(path)


def test_a_folder_without_manifest_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="no bundle"):
        Bundle.load(tmp_path)


def test_occupied_folders_are_not_touched(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(BundleError, match="not empty"), staged(tmp_path, force=force):
            raise AssertionError("must not be entered")
    assert (tmp_path / "precious.txt").read_text() == "mine"
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(BundleError, match="not a folder"), staged(file, force=True):
        raise AssertionError("must not be entered")


def test_force_replaces_a_bundle_and_only_on_success(tmp_path):
    path = make(tmp_path / "b", b"old").path
    with pytest.raises(RuntimeError), staged(path, force=True):
        raise RuntimeError("failed half-way")
    assert (path / "model.onnx").read_bytes() == b"old"
    make(path, b"new")
    assert (path / "model.onnx").read_bytes() == b"new"
    with pytest.raises(BundleError, match="not empty"), staged(path, force=False):
        raise AssertionError("must not be entered")


def test_failure_leaves_nothing(tmp_path):
    with pytest.raises(BundleError, match="No space left"), staged(tmp_path / "b", force=False) as folder:
        (folder / "half").write_bytes(b"x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_bundle_and_the_next_one_cleans_up(tmp_path):
    code = f"""
        import os, signal
        from pathlib import Path
        from qsparse_export.bundle import staged
        with staged(Path({str(tmp_path / "b")!r}), force=False) as folder:
            (folder / "model.onnx").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-P", "-c", textwrap.dedent(code)]).returncode == -9
    assert not (tmp_path / "b").exists()
    assert len(list(tmp_path.iterdir())) == 1
    make(tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]


def test_another_machine_is_refused_with_what_it_lacks(tmp_path):
    target = {"name": "big", "arch": "s390x", "system": "linux", "features": ["vx"]}
    bundle = make(tmp_path / "b", target=target)
    with pytest.raises(TargetError, match=r"made for big \(s390x linux with vx\).*--no-native"):
        bundle.require_host()


def test_a_module_bundle_does_not_generate(tmp_path):
    with pytest.raises(BundleError, match="does not generate"):
        make(tmp_path / "b", kind="module").open()
