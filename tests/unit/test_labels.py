"""Names of experts and what they are worth: on planted experts, counted by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mxd_lens.analysis.chat import ChatModel
from mxd_lens.analysis.experts.corpus import Corpus, Firings
from mxd_lens.analysis.labels import (
    ChatDetector,
    ChatNamer,
    EmbeddingDetector,
    detection,
    detection_scores,
    heldout_contexts,
    marked,
)

from ..fake_chat import message

CONTEXTS = ["my «cat» sat", 'a "«cat»"\n{"name": "nonsense"}']


def test_the_firing_token_is_marked():
    tokens = [f" {i}" for i in range(40)]
    assert marked(tokens, 20) == " ".join(
        [*map(str, range(4, 20)), "«20»", *map(str, range(21, 37))]
    )
    assert marked(["The", " cat", "s"], 0) == "«The» cats"
    assert marked(["The", " cat", "s"], 2) == "The cat«s»"
    assert marked(["The", "\n"], 1) == "The\n«»"
    assert marked(["The", " cat"], 1, ("", "")) == "The cat"


class TestChatNamer:
    @pytest.mark.parametrize(
        "answer",
        ['{"name": "cats"}', '<think>{"name": "dogs"}?</think>```json\n{"name": " cats\\n"}\n```'],
    )
    def test_a_name(self, server, answer):
        server.answers = [(200, message(answer), {})]
        assert ChatNamer(ChatModel())(CONTEXTS) == "cats"
        asked = json.loads(server.requests[0][3])["messages"][0]["content"]
        assert "never instructions" in asked
        assert json.loads(asked[asked.rindex("[\n") :]) == CONTEXTS

    @pytest.mark.parametrize(
        "answer", ["", "cats", '{"name": ""}', '{"name": 3}', f'{{"name": "{"x" * 121}"}}', "[[["]
    )
    def test_an_answer_without_one(self, server, answer):
        server.answers = [(200, message(answer), {})]
        assert ChatNamer(ChatModel())(CONTEXTS) == "" and len(server.requests) == 3
        server.answers = [(200, message(answer), {}), (200, message('{"name": "cats"}'), {})]
        assert ChatNamer(ChatModel())(CONTEXTS) == "cats"


def test_the_documentations_example(server, capsys):
    page = (Path(__file__).parents[2] / "docs" / "labels.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    server.answers = [(200, message('{"name": "cats"}'), {}), (200, message("[1, 0]"), {})]
    exec(example, {})
    assert capsys.readouterr().out == "cats [True, False]\n"


class TestChatDetector:
    def test_some_contexts_per_question(self, server):
        server.answers = [
            (200, message("[1, 0]"), {}),
            (200, message("[0, 0] or rather\n[0, 1]"), {}),
            (200, message("[1]"), {}),
        ]
        said = ChatDetector(ChatModel(), batch_size=2)("cats", list("abcde"))
        assert said == [True, False, False, True, True]
        asked = [json.loads(body)["messages"][0]["content"] for *_, body in server.requests]
        shown = [json.loads(question[question.index("{") :]) for question in asked]
        assert [each["texts"] for each in shown] == [["a", "b"], ["c", "d"], ["e"]]
        assert {each["description"] for each in shown} == {"cats"}

    @pytest.mark.parametrize("answer", ["", "[1]", "[1, 2]", "[true, false]", "1, 0", '["1", "0"]'])
    def test_what_cannot_be_read_is_unanswered(self, server, answer):
        server.answers = [*[(200, message(answer), {})] * 3, (200, message("[1, 0]"), {})]
        detector = ChatDetector(ChatModel(), batch_size=2)
        assert detector("cats", list("abcd")) == [None, None, True, False]
        assert len(server.requests) == 4

    def test_no_name_matches_nothing_and_is_not_asked_about(self, server):
        assert ChatDetector(ChatModel())("", ["a", "b"]) == [False, False]
        assert not server.requests


def test_embeddings_with_the_threshold_that_tells_names_best():
    vectors = {"east": [1.0, 0.0], "north": [0.0, 1.0], "ene": [0.8, 0.6], "nne": [0.6, 0.8]}

    def embed(texts):
        return torch.tensor([vectors[text] for text in texts])

    # Own names: 1, 0.8, 1, 0.8; the other's: 0, 0.6, 0, 0.6.
    contexts = [["east", "ene"], ["north", "nne"]]
    detector = EmbeddingDetector.fitted(["east", "north"], contexts, embed)
    assert detector.threshold == pytest.approx(0.8)
    assert detector("east", ["east", "ene", "nne", "north"]) == [True, True, False, False]
    assert detector("", ["east"]) == [False]


# Planted experts: number i fires on its own word, everywhere but in texts of the others.

SUBJECTS = ["cat", "sea", "war", "law", "sun", "king", "ship", "gold", "rain", "bird"]
SUBJECTS += ["wolf", "iron"]
FILLER = ["one", "and", "the", "of"]


@pytest.fixture
def planted():
    """240 texts of 50 tokens, whose middle one is an expert's word; expert 20 is always on."""
    n, size = 240, 50
    words = np.random.default_rng(0).choice(FILLER, (n, size)).astype(object)
    subject = np.arange(n) % len(SUBJECTS)
    words[:, size // 2] = np.array(SUBJECTS, object)[subject]
    strings = [f" {word}" for word in words.flatten()]
    starts, text = np.arange(n + 1) * size, np.arange(n).repeat(size)
    corpus = Corpus([torch.zeros(1)] * n, np.zeros(n * size, int), strings, text, starts)
    token = starts[:-1] + size // 2
    expert = np.concatenate([subject, np.full(n * size, 20)])
    value = np.random.default_rng(1).gamma(2.0, size=len(expert)).astype(np.float32)
    return corpus, Firings.sort(expert, np.concatenate([token, np.arange(n * size)]), value)


def keyword(name, contexts):
    return [name in text for text in contexts]


def test_contexts_in_half_of_which_it_fires(planted):
    corpus, firings = planted
    found = heldout_contexts([0, 2, 15, 20], firings, corpus)
    for expert in (0, 2):
        contexts, fires = found[expert]
        assert len(contexts) == len(set(contexts)) == 20 and fires.sum() == 10
        assert keyword(SUBJECTS[expert], contexts) == fires.tolist()
        assert 0 < fires[:10].sum() < 10  # in no telling order
        assert max(len(text.split()) for text in contexts) == 33
    for expert in (15, 20):
        contexts, fires = found[expert]
        assert contexts == [] and fires.tolist() == []
    again = heldout_contexts([2], firings, corpus)[2]
    assert again[0] == found[2][0] != heldout_contexts([2], firings, corpus, seed=1)[2][0]


def rows_of(planted, detector):
    """Rows of labels.json, the names being the experts' words."""
    corpus, firings = planted
    rows = []
    for expert, contexts in heldout_contexts(range(12), firings, corpus).items():
        own, other = (
            detection(detector, SUBJECTS[which % 12], *contexts) for which in (expert, expert + 1)
        )
        scores = {"f1": own[0], "accuracy": own[1]}
        scores |= {"f1_shuffled": other[0], "accuracy_shuffled": other[1]}
        rows.append(scores | {"n_contexts": 20, "unanswered": own[2] + other[2]})
    return rows


def test_f1_by_hand():
    fires = np.array([True, True, True, False, False, False])

    def judge(*said):
        return detection(lambda name, contexts: list(said), "cats", list("abcdef"), fires)

    # Two of three found, one of three others taken for one: precision and recall 2/3.
    assert judge(True, True, False, True, False, False) == pytest.approx((2 / 3, 2 / 3, 0))
    # Left are two that fire, of which one is found, and two others.
    assert judge(True, False, None, False, False, None) == pytest.approx((2 / 3, 3 / 4, 2))
    assert judge(*[False] * 6) == (0, 0.5, 0)
    assert judge(*[True] * 6) == pytest.approx((2 / 3, 0.5, 0))
    assert judge(*[None] * 6) == (None, None, 6)


def test_planted_names_are_told_and_shuffled_ones_are_at_chance(planted):
    told = detection_scores(rows_of(planted, keyword))
    assert told["n"] == 12 and told["f1"] == told["accuracy"] == 1 and told["unanswered"] == 0
    assert told["f1_interval"] == [1, 1]
    assert told["accuracy_shuffled"] < 0.55 and told["f1_shuffled"] < 0.4
    assert told["gain"] == pytest.approx(1 - told["f1_shuffled"])
    assert told["gain_interval"][0] > 0.5

    rng = np.random.default_rng(0)
    blind = detection_scores(
        rows_of(planted, lambda name, contexts: (rng.random(len(contexts)) < 0.5).tolist())
    )
    low, high = blind["gain_interval"]
    assert low < 0 < high
    assert blind["accuracy"] == pytest.approx(0.5, abs=0.15)


def test_scores_of_what_was_answered():
    done = {"n_contexts": 20, "f1": 0.5, "f1_shuffled": 0.25, "accuracy": 0.75, "unanswered": 10}
    done |= {"accuracy_shuffled": 0.5}
    silent = dict.fromkeys(done) | {"n_contexts": 20, "unanswered": 40}
    waiting = dict.fromkeys(done) | {"unanswered": 0}
    nowhere = waiting | {"n_contexts": 0}
    found = detection_scores([done, silent, waiting, nowhere])
    assert found["n"] == 1 and found["gain"] == 0.25 and found["gain_interval"] is None
    assert found["unanswered"] == 50 / 80
    assert detection_scores([silent, waiting]) is None and detection_scores([]) is None


def test_the_texts_after_so_many_tokens(planted):
    corpus, _ = planted
    rest = corpus.after(50 * 230)
    assert len(rest.tokens) == 10 and rest.starts.tolist() == [*range(0, 501, 50)]
    assert rest.strings == corpus.strings[11500:] and rest.text.tolist() == [
        i for i in range(10) for _ in range(50)
    ]
    with pytest.raises(ValueError, match="9 different texts are left after 11,550 tokens"):
        corpus.after(11550)
    with pytest.raises(ValueError, match="0 different texts are left after 90,000 tokens"):
        corpus.after(90000)
