"""Bring ONNX Runtime's C headers to a folder, without changing the system: its Python wheels ship none.

On Debian: ``libonnxruntime-dev`` from a newer suite of the machine's own configured mirror, verified by apt with the
distribution's keys, unpacked (its dependencies cannot be installed on an older release, and headers need none).
Elsewhere: the official release archive, verified by its SHA-256. Prints one line that says where the headers came from.
The headers' C ABI is append-only, so any version with the API that the library asks for will do.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

SUITES = ("trixie", "forky", "sid")  # the oldest first: a released suite does not change under us
PACKAGE = "libonnxruntime-dev"
ARCHIVE_URL = "https://github.com/microsoft/onnxruntime/releases/download/v1.23.2/onnxruntime-linux-x64-1.23.2.tgz"
ARCHIVE_SHA256 = "1fa4dcaef22f6f7d5cd81b28c2800414350c10116f5fdd46a2160082551c5f9b"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
TIMEOUT_SECONDS = 300


class FetchError(Exception):
    """One source of headers could not be used; the message says why."""


def _run(command: list[str], cwd: Path | None = None) -> str:
    environment = dict(os.environ, LC_ALL="C")
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FetchError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise FetchError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _os_release() -> dict[str, str]:
    try:
        lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {key: value.strip('"') for key, _, value in (line.partition("=") for line in lines)}


def _mirror() -> str:
    """The URI of the machine's own mirror of the main Debian archive, from its apt configuration."""
    release = _os_release()
    codename = release.get("VERSION_CODENAME", "")
    if release.get("ID") != "debian" or not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise FetchError("not a Debian machine with apt-get and dpkg-deb")
    with tempfile.TemporaryDirectory() as empty:  # without downloaded lists apt prints every URI that it would fetch
        uris = _run(["apt-get", "-o", f"Dir::State::Lists={empty}", "update", "--print-uris"])
    for suite in (codename, *SUITES):
        found = re.search(rf"^'(\S+)/dists/{re.escape(suite)}/InRelease'", uris, re.MULTILINE) if suite else None
        if found:
            return found.group(1)
    raise FetchError(f"apt's sources name no mirror of {codename or 'a known suite'}")


def _copy_headers(tree: Path, output: Path) -> None:
    headers = next(tree.rglob("onnxruntime_c_api.h"), None)
    if headers is None:
        raise FetchError("no onnxruntime_c_api.h inside")
    output.mkdir(parents=True, exist_ok=True)
    for header in headers.parent.glob("*.h"):
        shutil.copyfile(header, output / header.name)


def from_debian(output: Path) -> str:
    """Unpack the headers of the first suite that has the package into ``output``; FetchError when none has."""
    mirror = _mirror()
    signed = f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
    failures = []
    for suite in SUITES:
        with tempfile.TemporaryDirectory() as name:
            private = Path(name)
            for folder in ("lists/partial", "cache/archives/partial"):
                (private / folder).mkdir(parents=True)
            (private / "sources.list").write_text(f"deb {signed}{mirror} {suite} main\n", encoding="utf-8")
            # The machine's own proxy settings still apply; its hooks, lists and caches are left alone.
            (private / "apt.conf").write_text(
                "#clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n"
                "#clear Acquire::IndexTargets::deb::DEP-11;\n",
                encoding="utf-8",
            )
            options = [
                f"-c={private}/apt.conf",
                *("-o", f"Dir::Etc::SourceList={private}/sources.list", "-o", "Dir::Etc::SourceParts=-"),
                *("-o", f"Dir::State={private}", "-o", f"Dir::State::Lists={private}/lists"),
                *("-o", "Dir::State::status=/dev/null", "-o", f"Dir::Cache={private}/cache"),
                *("-o", "Acquire::Languages=none", "-o", "APT::Sandbox::User="),
            ]
            try:
                _run(["apt-get", *options, "update", "--error-on=any"])
                _run(["apt-get", *options, "download", PACKAGE], cwd=private)
                package = next(private.glob("*.deb"))
                _run(["dpkg-deb", "-x", str(package), str(private / "tree")])
                _copy_headers(private / "tree", output)
            except FetchError as error:
                failures.append(f"{suite}: {error}")
                continue
            return f"Debian {suite}, {package.name}, from this machine's own mirror {mirror}"
    raise FetchError("; ".join(failures))


def from_release_archive(output: Path) -> str:
    """Unpack the headers of the official release archive into ``output``; FetchError when it cannot be had."""
    try:
        with urllib.request.urlopen(ARCHIVE_URL, timeout=TIMEOUT_SECONDS) as response:
            content = response.read()
    except OSError as error:
        raise FetchError(f"{ARCHIVE_URL}: {error}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != ARCHIVE_SHA256:
        raise FetchError(f"{ARCHIVE_URL} has SHA-256 {digest}, expected {ARCHIVE_SHA256}")
    with tempfile.TemporaryDirectory() as name, tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive.getmembers():
            if member.isfile() and member.name.endswith(".h"):
                source = archive.extractfile(member)
                if source is not None:
                    (Path(name) / Path(member.name).name).write_bytes(source.read())
        _copy_headers(Path(name), output)
    return f"the official release archive {ARCHIVE_URL}"


def main(arguments: list[str] | None = None) -> int:
    """Fetch into ``--output``; 0 and one line on stdout, or 1 and the reasons on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--source", choices=("debian", "archive"), help="only this source")
    options = parser.parse_args(arguments)
    sources = {"debian": from_debian, "archive": from_release_archive}
    failures = []
    for name in [options.source] if options.source else list(sources):
        try:
            print(sources[name](options.output))
            return 0
        except FetchError as error:
            failures.append(f"{name}: {error}")
    print("\n".join(failures), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
