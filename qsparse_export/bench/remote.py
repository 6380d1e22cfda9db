"""``qsparse-bench --remote``: copies a bundle to a device, runs its qsparse-device-bench there, fetches the report."""

from __future__ import annotations

import contextlib
import re
import shlex
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qsparse_export.bench.dense_graph import DENSE_GRAPH
from qsparse_export.bench.device_report import measurement_of
from qsparse_export.bench.ssh import Finished, Ssh
from qsparse_export.bundle import MANIFEST
from qsparse_export.errors import BundleError, MeasurementError, QSparseError, TargetError
from qsparse_export.runtimes.ort.library import DEVICE_BENCH_NAME

if TYPE_CHECKING:
    from qsparse_export.bench.measurement import Measurement
    from qsparse_export.bench.plan import Plan
    from qsparse_export.bundle import Bundle

_SHORT_S = 60.0
_CHUNK_BYTES = 1 << 18
_TEMPORARY = ".qsparse-bench."
_STEP = re.compile(r"\[[0-9]+/[0-9]+\] (.*)")
_SIGNAL = 128

# The program ends when this side goes away: its stdin is then at its end, which the second process waits for.
_RUN = """
cd "$HOME" || exit 1
exec 3<&0
{program} {arguments} </dev/null & bench=$!
{{ cat <&3; kill "$bench"; }} >/dev/null 2>&1 & watch=$!
wait "$bench"; code=$?
kill "$watch" 2>/dev/null
exit "$code"
"""


@dataclass(frozen=True)
class Machine:
    """What a device says of itself: ``arch`` and ``system`` as targets spell them, and the cores that it gives us."""

    arch: str
    system: str
    cores: int


@dataclass(frozen=True)
class SshDevice:
    """A device behind ssh. See :class:`qsparse_export.bench.device.Device`.

    ``folder``: where the files stay, relative to the login's home, so that the next run copies only what changed; None: a
    temporary folder there. ``onnxruntime``: path of libonnxruntime.so there, from that home on; None: the system's own.
    ``timeout_s``: for copying, and again for measuring. ``tell`` is told how far the copying is and what must be known
    besides.
    """

    ssh: Ssh
    machine: Machine
    folder: str | None
    onnxruntime: str | None
    unchecked: bool
    timeout_s: float
    tell: Callable[[str], object]

    def cores(self) -> int:
        """See :class:`qsparse_export.bench.device.Device`."""
        return self.machine.cores

    def steps(self, bundle: Bundle, plan: Plan) -> int:
        """See :class:`qsparse_export.bench.device.Device`."""
        runs = len(plan.tests) * len(plan.threads) * (plan.repetitions + 1)
        return len(files_to_copy(bundle, plan)) + len(plan.modes) * (1 + runs)

    def measure(self, bundle: Bundle, plan: Plan, on_step: Callable[[str], object]) -> Measurement:
        """See :class:`qsparse_export.bench.device.Device`.

        BundleError when the bundle was not exported to be measured; TargetError when it is for another machine, when the
        device cannot be reached, or when its program fails, with what it said; MeasurementError for what is no report.
        """
        files = files_to_copy(bundle, plan)
        self._require_architecture(bundle)
        with self._folder() as folder:
            self._copy(bundle, files, folder, on_step)
            finished = self._run(plan, folder, on_step)
        return self._measurement(finished)

    def _require_architecture(self, bundle: Bundle) -> None:
        target = bundle.manifest["target"]
        if not isinstance(target, dict):
            raise BundleError(f"{bundle.path / MANIFEST} does not describe a target; export it again")
        if (target.get("arch"), target.get("system")) != (self.machine.arch, self.machine.system):
            raise TargetError(
                f"{bundle.path} was made for {target.get('name')} ({target.get('arch')} {target.get('system')}), and "
                f"{self.ssh.destination} is {self.machine.arch} {self.machine.system}; export it with a --target of that kind"
            )

    @contextlib.contextmanager
    def _folder(self) -> Iterator[str]:
        """The folder on the device, as an absolute path; a temporary one is removed again, whatever happens."""
        if self.folder is not None:
            yield self._said(f"mkdir -p -- {shlex.quote(self.folder)} && cd -- {shlex.quote(self.folder)} && pwd")
            return
        made = self._said(f'mktemp -d "$HOME/{_TEMPORARY}XXXXXXXX"')
        if not made.startswith("/") or _TEMPORARY not in made:
            raise TargetError(f"{self.ssh.destination} made the folder {made!r:.200}; expected one in its home")
        try:
            yield made
        finally:
            try:
                self._said(f"rm -rf -- {shlex.quote(made)}")
            except QSparseError as error:  # it must not hide why the measurement failed
                self.tell(f"note: {made} could not be removed from {self.ssh.destination}: {error}")

    def _said(self, script: str) -> str:
        """The last line that ``script`` prints; TargetError when it fails."""
        return _line(_out(self.ssh, script), -1)

    def _copy(self, bundle: Bundle, files: tuple[str, ...], folder: str, on_step: Callable[[str], object]) -> None:
        """All files as one tar stream: a connection for each would take a slow device longer than the files do."""
        there = self._checksums(folder, files) if self.folder is not None else {}
        recorded = bundle.manifest["files"]
        missing = [name for name in files if name not in recorded or recorded[name]["sha256"] != there.get(name)]
        script = f"cd -- {shlex.quote(folder)} && tar -xf -"
        finished = self.ssh.run(
            script, timeout_s=self.timeout_s, source=_archive(bundle.path, missing, on_step, self.tell)
        )
        if finished.code != 0:
            raise TargetError(
                f"{self.ssh.destination} could not take the files: {_line(finished.said, 0)}; free some space there, or choose "
                "another folder with --remote-folder"
            )

    def _checksums(self, folder: str, files: tuple[str, ...]) -> dict[str, str]:
        """File to SHA-256 of what is there already; empty where the device cannot tell."""
        names = " ".join(map(shlex.quote, files))
        finished = self.ssh.run(
            f"cd -- {shlex.quote(folder)} && sha256sum -- {names} 2>/dev/null", timeout_s=self.timeout_s
        )
        pairs = [line.split(maxsplit=1) for line in finished.out.splitlines()]
        return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}

    def _run(self, plan: Plan, folder: str, on_step: Callable[[str], object]) -> Finished:
        def listen(line: str) -> None:
            if step := _STEP.fullmatch(line):
                on_step(step[1])

        words = ["-p", _list(plan.prompts), "-n", _list(plan.generations), "-r", str(plan.repetitions)]
        words += ["-t", _list(plan.threads), "--modes", ",".join(plan.modes), "--unchecked" if self.unchecked else ""]
        words += ["--onnxruntime", self.onnxruntime] if self.onnxruntime else []
        arguments = " ".join(shlex.quote(word) for word in (*words, folder) if word)
        script = _RUN.format(program=shlex.quote(f"{folder}/{DEVICE_BENCH_NAME}"), arguments=arguments)
        return self.ssh.run(script, timeout_s=self.timeout_s, on_line=listen)

    def _measurement(self, finished: Finished) -> Measurement:
        """The report; TargetError with what the program said when it printed none."""
        where, printed = self.ssh.destination, _line(finished.out, -1)
        if printed.startswith("{") and finished.code in (0, 1):
            try:
                return measurement_of(printed)
            except MeasurementError as error:
                raise MeasurementError(f"{where}: {error}") from error
        said = [line for line in finished.said.splitlines() if not _STEP.fullmatch(line)]
        reason = _line("\n".join(said), -1).removeprefix(f"{DEVICE_BENCH_NAME}: ")
        if finished.code in (126, 127):
            raise TargetError(
                f"{where} cannot start {DEVICE_BENCH_NAME}: {reason}; where programs may not run in the home folder, choose "
                "another one with --remote-folder"
            )
        if finished.code > _SIGNAL:
            raise TargetError(f"{DEVICE_BENCH_NAME} was ended on {where} by signal {finished.code - _SIGNAL}: {reason}")
        raise TargetError(f"{where}: {reason}" if finished.code else f"{where} printed no report: {reason}")


def connect(ssh: Ssh) -> Machine:
    """Asks a device what it is. TargetError when it cannot be reached or does not answer as a Unix does."""
    # Of what is printed the last words: a login may be greeted.
    words = _out(ssh, "uname -m; uname -s; nproc 2>/dev/null || getconf _NPROCESSORS_ONLN").split()[-3:]
    if len(words) != 3 or not words[2].isdigit() or int(words[2]) < 1:
        raise TargetError(f"{ssh.destination} does not answer as Linux does: {' '.join(words)!r:.200}")
    return Machine({"arm64": "aarch64"}.get(words[0], words[0]), words[1].lower(), int(words[2]))


def files_to_copy(bundle: Bundle, plan: Plan) -> tuple[str, ...]:
    """What ``plan`` needs of the bundle, the manifest included. BundleError when it was not exported to be measured."""
    names = bundle.manifest["files"]
    needed = [name for name in names if name.startswith("model.onnx") or name == DEVICE_BENCH_NAME]
    if set(plan.modes) != {"bodies"}:
        needed += [name for name in names if name.endswith(".so")]
    if "dense" in plan.modes:
        needed.append(DENSE_GRAPH)
    for name in (DEVICE_BENCH_NAME, *needed):
        if name not in names:
            raise BundleError(
                f"{bundle.path} has no {name}, which measuring it on a device needs; export it again with --with-bench"
            )
    return (MANIFEST, *needed)


def _out(ssh: Ssh, script: str) -> str:
    finished = ssh.run(script, timeout_s=_SHORT_S)
    if finished.code != 0:
        raise TargetError(f"{ssh.destination} failed at {script!r:.100}: {_line(finished.said, -1)}")
    return finished.out


def _archive(
    folder: Path, names: list[str], on_step: Callable[[str], object], tell: Callable[[str], object]
) -> Iterator[bytes]:
    """A tar file of ``names``, bit by bit. BundleError for a file that becomes shorter meanwhile."""
    for name in names:
        on_step(f"copy {name}")
        entry = tarfile.TarInfo(name)
        found = (folder / name).stat()
        entry.size, entry.mtime = found.st_size, int(found.st_mtime)
        entry.mode = 0o700 if name == DEVICE_BENCH_NAME else 0o600
        yield entry.tobuf(tarfile.GNU_FORMAT)
        size, sent, told = found.st_size, 0, 0
        with (folder / name).open("rb") as file:
            while sent < size:
                chunk = file.read(min(_CHUNK_BYTES, size - sent))
                if not chunk:
                    raise BundleError(f"{folder / name} changed while it was copied; measure again")
                yield chunk
                sent += len(chunk)
                if (percent := sent * 100 // size) > told:
                    told = percent
                    tell(f"{sent / 1e6:.1f} of {size / 1e6:.1f} MB")
        yield bytes(-size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _line(said: str, position: int) -> str:
    """One line of what a program said: the first one, or with -1 the last."""
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[position] if lines else "it said nothing"


def _list(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values)) or "0"
