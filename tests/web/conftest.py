"""Makes ``javascript`` importable from the tests of this folder; bundles of small models for Node and the browser."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from counting_models import MODELS, trained
from web_cases import CASES

import qsparse_export as qs
from qsparse_export.bundle import Bundle
from qsparse_export.nn.decoder import Decoder


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Small models have hundreds of small operations, which more threads on a busy machine only slow down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def decoder() -> Callable[[str], Decoder]:
    """The model of a case, trained for some steps; once a session."""
    made: dict[str, Decoder] = {}

    def make(case: str) -> Decoder:
        name, _ = CASES[case]
        if name not in made:
            made[name] = trained(MODELS[name])
        return made[name]

    return make


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which :func:`bundle` puts them."""
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="session")
def bundle(bundles: Path, decoder: Callable[[str], Decoder]) -> Callable[[str, str], Bundle]:
    """The bundle of a case for a target, in CASE-TARGET; that for ``web`` is verified and records its tokens."""

    def make(case: str, target: str) -> Bundle:
        folder = bundles / f"{case}-{target}"
        if not folder.exists():
            verify = "quick" if target == "web" else "none"
            qs.export(decoder(case), target=target, verify=verify, out=folder, name=case, **CASES[case][1])
        return Bundle.load(folder)

    return make
