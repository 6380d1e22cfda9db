"""What the JavaScript tests need: pinned by content, from the public registry, and missed with the command that gets it."""

import json
import re

import javascript
import pytest

EACH = pytest.mark.parametrize("folder", javascript.PACKAGES, ids=lambda folder: folder.name)


@EACH
def test_every_package_is_pinned_by_content_and_from_no_private_registry(folder):
    lock = json.loads((folder / "package-lock.json").read_text())
    root = lock["packages"].pop("")
    assert root["dependencies"] == json.loads((folder / "package.json").read_text())["dependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in root["dependencies"].values())
    for package in lock["packages"].values():
        assert package["integrity"].startswith("sha512-")
        assert package.get("resolved", "https://registry.npmjs.org/").startswith("https://registry.npmjs.org/")


def test_a_missing_program_is_named_with_its_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match=r"node is missing.*apt-get install nodejs npm"):
        javascript.node(tmp_path / "any.mjs")
    with pytest.raises(pytest.fail.Exception, match=r"chromium is missing.*apt-get install chromium"):
        javascript.browse(tmp_path)


def test_missing_or_other_packages_are_named_with_the_command_that_installs_them(monkeypatch, tmp_path):
    monkeypatch.setattr(javascript, "ROOT", tmp_path)
    folder = tmp_path / "tests"
    folder.mkdir()
    lock = {"packages": {"": {"name": "tests"}, "node_modules/one": {"version": "1.0.0"}}}
    (folder / "package-lock.json").write_text(json.dumps(lock))
    with pytest.raises(pytest.fail.Exception, match="packages are missing: npm ci --prefix tests"):
        javascript.require_packages(folder)
    installed = folder / "node_modules" / ".package-lock.json"
    installed.parent.mkdir()
    installed.write_text(json.dumps({"packages": {"node_modules/one": {"version": "0.9.0"}}}))
    with pytest.raises(pytest.fail.Exception, match=r"packages are not those of .*: npm ci --prefix tests"):
        javascript.require_packages(folder)
    del lock["packages"][""]
    installed.write_text(json.dumps(lock))
    javascript.require_packages(folder)
