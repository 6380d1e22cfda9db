"""A target as a value: what one kind of device has and can run. Data only; adding a device is adding a TOML file."""

from __future__ import annotations

import re
import tomllib
from dataclasses import MISSING, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from qsparse_export.errors import TargetError, near_names
from qsparse_export.targets.features import FEATURES_OF, IMPLIED

HOST = "host"
ANY = "any"
LIBRARY = ("built", "impossible", "missing")
DTYPES = ("float32", "float16")
_OP_SETS = {"native_ops": "native_op_sets.toml", "provider_ops": "provider_op_sets.toml"}
"""Fields that may hold a name instead of a list, and the file of such names."""
_ADVICE = "choose smaller weights (--weights), a smaller model, or a target with more"


@dataclass(frozen=True)
class Target:
    """One kind of device.

    ``triple`` is the compiler's name for its programs; ``any`` for what runs everywhere. ``features`` are the
    instruction-set extensions that it has (Linux names: avx2, avx512_vnni, asimddp). ``native_ops`` are the custom ops that
    run natively there. ``library`` says where they come from: "built" for it by this package, "impossible" where the
    runtime can load none, "missing" where it could but this version builds none. ``runtimes`` run there, best first;
    ``dtypes`` are the number formats that they compute, first the one for whoever asks for none. ``provider_ops`` are the ops
    that ONNX Runtime itself runs on a device that is no CPU (``domain::Name``, or ``Name`` of the standard domain); what is
    in neither runs on the CPU beside it. ``lacking_ops`` are standard ops that nothing runs there: a pass must lower them.
    ``threads`` is how many to use (0: all cores).

    Sizes are in bytes, 0 where they differ from device to device: ``memory_bytes`` of the whole device or, with the
    feature cuda, of the GPU; ``largest_file_bytes`` that it can load; caches as one core sees them.
    """

    name: str
    description: str
    triple: str
    features: frozenset[str]
    native_ops: frozenset[str]
    library: str
    runtimes: tuple[str, ...]
    dtypes: tuple[str, ...]
    provider_ops: frozenset[str] = frozenset()
    lacking_ops: frozenset[str] = frozenset()
    cores: int = 0
    threads: int = 0
    memory_bytes: int = 0
    largest_file_bytes: int = 0
    l1d_cache_bytes: int = 0
    l2_cache_bytes: int = 0
    l3_cache_bytes: int = 0

    @property
    def arch(self) -> str:
        """The machine's name as ``uname -m`` prints it; "any" where it does not matter."""
        return self.triple.partition("-")[0]

    @property
    def system(self) -> str:
        """linux, android, darwin, emscripten or any: ``uname -s`` in small letters, and Android told from Linux."""
        for system in ("android", "linux", "darwin", "emscripten"):
            if system in self.triple:
                return system
        return ANY

    def require_runtime(self, runtime: str) -> None:
        """Raises TargetError unless this target lists ``runtime``."""
        if runtime not in self.runtimes:
            raise TargetError(f"target {self.name} runs {', '.join(self.runtimes)}, not {runtime}")

    def require_dtype(self, dtype: str) -> None:
        """Raises TargetError unless the target computes in ``dtype`` (a NumPy name)."""
        if dtype not in self.dtypes:
            raise TargetError(
                f"target {self.name} computes in {', '.join(self.dtypes)}, not in {dtype}: "
                f"{'--weights keep exports in float32' if 'float32' in self.dtypes else 'choose another target'}"
            )

    def runs_native(self, portable: bool) -> bool:
        """Whether a bundle for this target holds a kernel library; with ``portable`` never.

        Raises TargetError where native kernels could run but this version builds none, unless ``portable`` accepts that.
        """
        if portable or self.library == "impossible":
            return False
        if self.library == "missing":
            raise TargetError(
                f"target {self.name} wants a kernel library for {self._kernels_for()}, which this version does not build; "
                "export with --portable: ONNX Runtime's own provider then runs the function bodies"
            )
        return True

    def require_room(self, files: dict[str, int]) -> None:
        """Raises TargetError when files (name to bytes) exceed what this target can load or hold in memory."""
        for name, size in files.items():
            if self.largest_file_bytes and size > self.largest_file_bytes:
                raise TargetError(
                    f"{name} has {size:,} bytes, and target {self.name} loads files of at most "
                    f"{self.largest_file_bytes:,}; {_ADVICE}"
                )
        self.require_memory("the bundle has", sum(files.values()))

    def require_memory(self, what: str, size: int) -> None:
        """Raises TargetError when ``size`` bytes exceed this target's memory; ``what`` begins the message."""
        if self.memory_bytes and size > self.memory_bytes:
            raise TargetError(
                f"{what} {size:,} bytes, and target {self.name} has a memory of {self.memory_bytes:,}; {_ADVICE}"
            )

    def _kernels_for(self) -> str:
        return "NVIDIA GPUs" if "cuda" in self.features else self.triple


def _contradictions(target: Target) -> list[str]:
    """What cannot be true of any device, each with the reason."""
    wrong = []
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", target.name):
        wrong.append(f"the name {target.name!r} becomes a folder's; use letters, digits, dots, dashes and underscores")
    if not target.runtimes:
        wrong.append("runtimes is empty; expected at least one of ort")
    if target.triple != HOST:
        wrong += _feature_contradictions(target)
    if target.library not in LIBRARY:
        wrong.append(f"library is {target.library!r}; expected one of {', '.join(LIBRARY)}")
    elif bool(target.native_ops) != (target.library == "built"):
        wrong.append(
            f"library is {target.library!r} and native_ops {'lists' if target.native_ops else 'lists no'} ops: "
            "an op runs natively exactly where a library with it is built"
        )
    if target.library == "built" and "ort" not in target.runtimes:
        wrong.append("library is 'built', but the library is one for the runtime ort, which runtimes does not list")
    if not target.dtypes or set(target.dtypes) - set(DTYPES):
        wrong.append(f"dtypes is {list(target.dtypes)}; expected some of {', '.join(DTYPES)}")
    for size in (field.name for field in fields(Target) if field.type == "int"):
        if getattr(target, size) < 0:
            wrong.append(f"{size} is {getattr(target, size)}; expected 0 (unknown) or more")
    if bool(target.provider_ops) != ("cuda" in target.features):
        wrong.append(
            f"provider_ops {'lists' if target.provider_ops else 'lists no'} ops {'without' if target.provider_ops else 'with'} "
            "the feature cuda: they are what ONNX Runtime runs on the GPU"
        )
    if both := sorted(target.provider_ops & target.lacking_ops):
        wrong.append(f"provider_ops and lacking_ops both list {', '.join(both)}: what is run there is not lacking")
    if target.cores and target.threads > target.cores:
        wrong.append(
            f"threads is {target.threads} on {target.cores} cores: more threads than cores wait for each other"
        )
    caches = [size for size in (target.l1d_cache_bytes, target.l2_cache_bytes, target.l3_cache_bytes) if size]
    if caches != sorted(caches):
        wrong.append(f"caches of {', '.join(map(str, caches))} bytes: one closer to the core is never the larger one")
    if target.memory_bytes and target.largest_file_bytes > target.memory_bytes:
        wrong.append("largest_file_bytes exceeds memory_bytes: a file that is loaded must fit into memory")
    return wrong


def _feature_contradictions(target: Target) -> list[str]:
    if target.arch not in FEATURES_OF or (target.triple != ANY and target.triple.count("-") < 2):
        known = f"an architecture of {', '.join(FEATURES_OF)}, such as aarch64-unknown-linux-gnu"
        return [f"triple is {target.triple!r}; expected {known}, or host"]
    wrong = []
    for feature in sorted(target.features):
        if feature not in FEATURES_OF[target.arch]:
            wrong.append(
                f"feature {feature!r} is none of {target.arch}; {near_names(feature, FEATURES_OF[target.arch])}"
            )
        elif feature in IMPLIED and IMPLIED[feature] not in target.features:
            wrong.append(f"feature {feature} without {IMPLIED[feature]}: every device with the first has the second")
    if target.library == "built" and target.triple == ANY:
        wrong.append("library is 'built' for the triple any: a library is machine code, name the machine")
    return wrong


def target_names() -> list[str]:
    """Names of the targets that come with the package."""
    files = (p.name for p in _folder().iterdir())
    sets = _OP_SETS.values()
    return sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml") and name not in sets)


def load_target(name: str) -> Target:
    """A target by name or by the path of a TOML file; the triple ``host`` is filled in from this machine.

    Raises TargetError for an unknown name (near names offered) and for a file that does not describe a target.
    """
    if name.endswith(".toml"):
        path = Path(name)
        try:
            return _parse(path.read_text("utf-8"), name)
        except FileNotFoundError:
            raise TargetError(f"target file {name} does not exist") from None
        except (OSError, UnicodeDecodeError) as error:
            raise TargetError(f"target file {name} cannot be read as UTF-8 text: {error}") from error
    if name not in target_names():
        raise TargetError(f"unknown target {name!r}; {near_names(name, target_names())}, or the path of a .toml file")
    return _parse((_folder() / f"{name}.toml").read_text("utf-8"), name)


def op_sets(field: str = "native_ops") -> dict[str, frozenset[str]]:
    """Names that ``field`` (or ``provider_ops``) may hold instead of a list, and the ops that each stands for."""
    plain = tomllib.loads((_folder() / _OP_SETS[field]).read_text("utf-8"))
    return {name: frozenset(ops) for name, ops in plain.items()}


def _folder() -> resources.abc.Traversable:
    return resources.files("qsparse_export.targets")


def _parse(text: str, origin: str) -> Target:
    try:
        plain = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TargetError(f"target {origin} is not TOML: {error}") from error
    known = {field.name: str(field.type) for field in fields(Target)}
    for name in sorted(set(plain) - set(known)):
        raise TargetError(f"target {origin}: unknown field {name!r}; {near_names(name, known)}")
    needed = {field.name for field in fields(Target) if field.default is MISSING}
    if missing := sorted(needed - set(plain)):
        raise TargetError(f"target {origin} lacks {', '.join(missing)}; every target says {', '.join(sorted(needed))}")
    for field in _OP_SETS:
        given = plain.get(field)
        if isinstance(given, str):
            sets = op_sets(field)
            if given not in sets:
                raise TargetError(f"target {origin}: {field} is {given!r}; {near_names(given, sets)}, or a list")
            plain[field] = sorted(sets[given])
    target = Target(**{name: _value(origin, name, known[name], plain[name]) for name in plain})
    if wrong := _contradictions(target):
        raise TargetError(f"target {origin}: {'; '.join(wrong)}")
    return _detected(target) if target.triple == HOST else target


def _value(origin: str, name: str, kind: str, value: Any) -> Any:
    """``value`` as the field's type; lists become sets and tuples."""
    if kind in ("str", "int"):
        if type(value).__name__ == kind:
            return value
        raise TargetError(f"target {origin}: {name} is {value!r}; expected {'text' if kind == 'str' else 'an integer'}")
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TargetError(f"target {origin}: {name} is {value!r}; expected a list of texts")
    return frozenset(value) if kind.startswith("frozenset") else tuple(value)


def _detected(target: Target) -> Target:
    """``target`` with this machine's triple, features and every size that the file leaves 0.

    What a machine says of itself is not checked: virtual machines report caches that no processor has.
    """
    from qsparse_export.targets.detect import host

    found = host()
    sizes = ("cores", "memory_bytes", "l1d_cache_bytes", "l2_cache_bytes", "l3_cache_bytes")
    known = {size: getattr(target, size) or getattr(found, size) for size in sizes}
    return replace(target, triple=found.triple, features=target.features or found.features, **known)
