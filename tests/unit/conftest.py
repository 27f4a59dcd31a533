"""Fixtures of the unit tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset

from mxd_lens.analysis import chat
from tests.fake_chat import KEY, Server
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


@pytest.fixture
def x() -> torch.Tensor:
    """Inputs of such a layer."""
    return torch.randn(6, 5, dtype=torch.float64)


@pytest.fixture
def labelled(tmp_path) -> str:
    """A file of labelled texts."""
    animals = [{"text": f"the cat saw {'the ' * i}dog", "label": "animal"} for i in range(20)]
    things = [{"text": f"one mat on {'a ' * i}mat", "label": "thing"} for i in range(20)]
    Dataset.from_list(animals + things).to_json(tmp_path / "labelled.jsonl")
    return str(tmp_path / "labelled.jsonl")


@pytest.fixture
def waits(monkeypatch):
    """What the model would have waited, in seconds."""
    waits = []
    monkeypatch.setattr(chat.time, "sleep", waits.append)
    return waits


@pytest.fixture
def server(monkeypatch, waits):
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_MODEL", "tiny")
        yield server
        server.shutdown()
