"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.helpers import KINDS, letters, make_layer


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and on a busy machine wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def offline() -> Iterator[None]:
    """Sentence embeddings without a model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mxd_lens.runs.analyse.embed", letters)
        patch.setattr("mxd_lens.analysis.judge.embed", letters)
        yield


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def layer(kind) -> Any:
    return make_layer(kind)
