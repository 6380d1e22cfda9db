"""A target as a value: what one kind of device has and can run. Data only; adding a device is adding a TOML file."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path

from qsparse_export.errors import TargetError, near_names

HOST = "host"


@dataclass(frozen=True)
class Target:
    """One kind of device.

    ``arch`` is the machine name as ``uname -m`` prints it, ``features`` the instruction-set extensions that its kernels
    may use (Linux names: avx2, avx512_vnni, asimddp), ``native_ops`` the custom ops that its kernel library implements,
    ``runtimes`` the runtimes that run there, best first.
    """

    name: str
    description: str
    arch: str
    system: str
    features: frozenset[str]
    native_ops: frozenset[str]
    runtimes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.runtimes:
            raise TargetError(f"target {self.name}: runtimes is empty; expected at least one of ort")

    def require_runtime(self, runtime: str) -> None:
        """Raises TargetError unless this target lists ``runtime``."""
        if runtime not in self.runtimes:
            raise TargetError(f"target {self.name} runs {', '.join(self.runtimes)}, not {runtime}")


def target_names() -> list[str]:
    """Names of the targets that come with the package."""
    return sorted(p.name.removesuffix(".toml") for p in _folder().iterdir() if p.name.endswith(".toml"))


def load_target(name: str) -> Target:
    """A target by name or by the path of a TOML file; ``host`` values are filled in from this machine.

    Raises TargetError for an unknown name (near names offered) and for a file that does not describe a target.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise TargetError(f"target file {name} does not exist")
        return _parse(path.read_text("utf-8"), name)
    if name not in target_names():
        raise TargetError(f"unknown target {name!r}; {near_names(name, target_names())}, or the path of a .toml file")
    return _parse((_folder() / f"{name}.toml").read_text("utf-8"), name)


def _folder() -> resources.abc.Traversable:
    return resources.files("qsparse_export.targets")


def _parse(text: str, origin: str) -> Target:
    try:
        plain = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TargetError(f"target {origin} is not TOML: {error}") from error
    known = {field.name for field in fields(Target)}
    if set(plain) != known:
        wrong = sorted(set(plain) ^ known)
        raise TargetError(f"target {origin}: missing or unknown fields {', '.join(wrong)}; expected {sorted(known)}")
    target = Target(
        name=plain["name"],
        description=plain["description"],
        arch=plain["arch"],
        system=plain["system"],
        features=frozenset(plain["features"]),
        native_ops=frozenset(plain["native_ops"]),
        runtimes=tuple(plain["runtimes"]),
    )
    if target.arch != HOST:
        return target
    from qsparse_export.targets.detect import host

    found = host()
    return replace(target, arch=found.arch, system=found.system, features=found.features)
