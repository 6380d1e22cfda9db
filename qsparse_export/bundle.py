"""Bundle <-> directory: manifest, files, checksums, and a write that happens completely or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsparse_export.errors import BundleError, TargetError, UsageError

if TYPE_CHECKING:
    from qsparse_export.generate import DecoderShape, Generator
    from qsparse_export.runtimes.base import Runtime

MANIFEST = "manifest.json"
SCHEMA = 1
_REQUIRED = frozenset({"schema", "kind", "name", "target", "runtime", "native", "files"})


@dataclass(frozen=True)
class Bundle:
    """A folder that holds one compiled model; ``manifest`` is the content of its manifest.json."""

    path: Path
    manifest: dict[str, Any]

    @staticmethod
    def load(path: str | Path, *, check: bool = True) -> Bundle:
        """Reads a bundle and, with ``check``, compares every file with its recorded size and SHA-256.

        Raises BundleError when the folder is no bundle, of another schema, incomplete or altered.
        """
        path = Path(path)
        bundle = Bundle(path, _read_manifest(path))
        if check:
            bundle.check_files()
        return bundle

    def check_files(self) -> None:
        """Raises BundleError naming the first file that is missing, resized or altered."""
        for name, wanted in self.manifest["files"].items():
            if Path(name).name != name:
                raise BundleError(f"{self.path}: the manifest names the file {name!r}; only plain names are allowed")
            file = self.path / name
            if file.is_symlink() or not file.is_file():
                raise BundleError(f"{self.path}: {name} is missing or is a link; copy the bundle again, as a whole")
            if file.stat().st_size != wanted["bytes"]:
                raise BundleError(
                    f"{self.path}: {name} has {file.stat().st_size} bytes, the manifest says {wanted['bytes']}; "
                    "the copy is incomplete or was altered: copy or export the bundle again"
                )
            if _sha256(file) != wanted["sha256"]:
                raise BundleError(
                    f"{self.path}: the checksum of {name} differs from the manifest; "
                    "the file is damaged or was altered: copy or export the bundle again"
                )

    def require_host(self) -> None:
        """Raises TargetError when this machine cannot run the bundle's kernels, naming what it lacks."""
        from qsparse_export.runtimes import require_gpu
        from qsparse_export.targets.detect import host
        from qsparse_export.targets.features import GPU_FEATURES

        target, here = self.manifest["target"], host()
        try:
            lacks = sorted(set(target["features"]) - GPU_FEATURES - here.features)
            machine = (target["arch"], target["system"])
        except (KeyError, TypeError) as error:
            raise BundleError(
                f"{self.path / MANIFEST} does not describe a target ({error}); export it again"
            ) from error
        if machine == (here.arch, here.system) and not lacks:
            if self.is_for_gpu():
                require_gpu(self.path)
            return
        wants = f"{machine[0]} {machine[1]}" + (f" with {', '.join(lacks)}" if lacks else "")
        raise TargetError(
            f"{self.path} was made for {target.get('name')} ({wants}), and this machine is {here.arch} {here.system}"
            + (f" without that: it has {', '.join(sorted(here.features)) or 'no feature known here'}" if lacks else "")
            + "; export it with --target cpu on this machine"
            + (", or run it with --no-native (function bodies, slower)" if self._runtime().has_bodies else "")
        )

    def require_bodies(self) -> None:
        """Raises UsageError when the bundle has one way to run, its kernels, and no function bodies."""
        if not self._runtime().has_bodies:
            raise UsageError(
                f"{self.path} is of the runtime {self.manifest['runtime']}, which runs compiled kernels and has no function "
                "bodies: leave --no-native out, or export the model with --runtime ort"
            )

    def _runtime(self) -> Runtime:
        from qsparse_export.runtimes import get_runtime

        return get_runtime(self.manifest["runtime"])

    def open(self, *, threads: int | None = None, native: bool | None = None) -> Generator:
        """Opens the model to generate text, on ``threads`` threads (None: all cores).

        ``native=None`` runs the kernels unless the bundle was made portable; False runs the function bodies.
        Raises TargetError when the bundle's target is another machine and kernels are asked for, UsageError when function
        bodies are and the runtime has none.
        """
        from qsparse_export.generate import Generator

        shape = self.decoder_shape()
        native = self.manifest["native"] if native is None else native
        if native:
            self.require_host()
        else:
            self.require_bodies()
        session = self.runtime(native=native).open(self.path, threads=threads, native=native)
        return Generator(session, shape, self.path / "tokenizer.json")

    def runtime(self, *, native: bool) -> Runtime:
        """What opens the bundle: on the GPU where it is for one and kernels are asked for (:meth:`require_host` first)."""
        from qsparse_export.runtimes import get_runtime, gpu_runtime

        return (
            gpu_runtime(self.manifest["target"])
            if native and self.is_for_gpu()
            else get_runtime(self.manifest["runtime"])
        )

    def is_for_gpu(self) -> bool:
        """Whether it was made for ONNX Runtime's CUDA provider."""
        return self.manifest["runtime"] == "ort" and "cuda" in self.manifest["target"]["features"]

    def decoder_shape(self) -> DecoderShape:
        """What the generation loop must know; BundleError when the bundle holds no decoder."""
        from qsparse_export.generate import DecoderShape

        if self.manifest["kind"] != "decoder":
            raise BundleError(f"{self.path} holds a {self.manifest['kind']}, which does not generate text")
        try:
            model = self.manifest["model"]
            return DecoderShape(
                vocab_size=model["vocab_size"],
                kv_heads=model["kv_heads"],
                head_dim=model["head_dim"],
                max_positions=model["max_positions"],
                eos_token_ids=tuple(model["eos_token_ids"]),
                dtype=self.manifest["dtype"],
            )
        except (KeyError, TypeError) as error:
            raise BundleError(
                f"{self.path / MANIFEST} does not describe a decoder ({error}); export it again"
            ) from error


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise BundleError(f"{path} is no bundle: it has no {MANIFEST}; make one with: qsparse-export MODEL -o {path}")
    try:
        manifest = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise BundleError(f"{file} is not JSON ({error}); export the bundle again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise BundleError(f"{file} is not a manifest: it lists no files; export the bundle again")
    if manifest.get("schema") != SCHEMA:
        raise BundleError(f"{file} has schema {manifest.get('schema')}, this version reads {SCHEMA}; export it again")
    if missing := sorted(_REQUIRED - manifest.keys()):
        raise BundleError(f"{file} lacks {', '.join(missing)}; export the bundle again")
    return manifest


@contextlib.contextmanager
def staged(out: Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes ``out`` when the block ends well, and vanishes when it does not.

    Raises BundleError when ``out`` exists and is not empty, unless ``force``, which replaces it (only a folder that is
    a bundle, or empty). Every file is synced before the rename, so that a crash leaves the old state or the new one.
    """
    _require_writable(out, force)
    staging: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        _remove_abandoned(out, staging)
        (staging / _OWNER).write_text(str(os.getpid()))
        yield staging
        (staging / _OWNER).unlink()
        for file in staging.iterdir():
            _sync(file)
        staging.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        staging.rename(out)
        _sync(out.parent)
    except OSError as error:
        raise BundleError(
            f"cannot write {out}: {error.strerror or error}; nothing was left behind: free some space or choose "
            "another folder with -o"
        ) from error
    finally:
        if staging is not None and staging.exists():
            shutil.rmtree(staging, ignore_errors=True)


_OWNER = ".owner"


def _remove_abandoned(out: Path, mine: Path) -> None:
    """Removes what killed exports to the same place left behind: staging folders whose process is gone."""
    for folder in out.parent.glob(f".{out.name}.*.partial"):
        owner = folder / _OWNER
        if folder != mine and owner.is_file() and not _is_alive(int(owner.read_text() or 0)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process_id > 0


def _require_writable(out: Path, force: bool) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise BundleError(f"{out} exists and is not a folder; choose another one with -o")
    if not out.exists() or not any(out.iterdir()):
        return
    if not force:
        raise BundleError(f"{out} is not empty; choose another folder with -o, or replace the bundle with --force")
    if not (out / MANIFEST).is_file():
        raise BundleError(f"{out} is not empty and holds no bundle; --force replaces bundles only: remove it yourself")


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Adds size and SHA-256 of every file in ``folder`` to ``manifest`` and writes it as manifest.json."""
    files = sorted(file for file in folder.iterdir() if file.name not in (MANIFEST, _OWNER))
    manifest["files"] = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
