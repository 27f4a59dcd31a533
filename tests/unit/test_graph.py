"""Attribution graphs: complete, and equal to the linear model written out."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
import torch
from pydantic import BaseModel, ConfigDict
from torch.func import jvp
from transformers import AutoTokenizer

from mxd_lens.analysis.graphs.export import circuit_tracer_json
from mxd_lens.analysis.graphs.graph import Graph, attribute, influence, normalised, targets_of
from mxd_lens.analysis.graphs.interventions import (
    WHERE,
    measure,
    predict,
    rank_correlation,
    total_effects,
)
from mxd_lens.analysis.graphs.local import LocalModel
from mxd_lens.analysis.graphs.prune import prune
from mxd_lens.models.site import Site

from ..helpers import MODEL_SHAPE, close, make_layer, placed, random_layer, same

N_LAYERS = 3
PROMPT = "the cat sat on a dog"
MODELS = ["tiny_bridge", "tiny_bridge_gpt2", "tiny_hooked", "tiny_hooked_mlp"]
LAYERS = [
    *("mxd", "training_mxd", "training_mxd_paper", "jumprelu_mxd", "molt"),
    *("topk_transcoder", "topk_skip_transcoder", "transcoder", "skip_transcoder"),
]


def of_precision(model: Any, tokenizer_folder: Any) -> Any:
    if model.tokenizer is None:
        model.set_tokenizer(AutoTokenizer.from_pretrained(tokenizer_folder))
    model.to(torch.float64)
    model.cfg.dtype = torch.float64
    return model


@pytest.fixture(params=MODELS)
def any_lm(request, llama_folder):
    """Of both classes, with GLUs and MLPs, RMS norms and layer norms, in float64."""
    return of_precision(request.getfixturevalue(request.param), llama_folder)


@pytest.fixture(params=["tiny_bridge", "tiny_hooked"])
def lm(request, llama_folder):
    return of_precision(request.getfixturevalue(request.param), llama_folder)


def layers_of(model: Any, name: str, numbers: Any = range(N_LAYERS), size: float = 0.2) -> Any:
    def make() -> Any:
        if name.startswith("training"):
            return make_layer(name, size, **MODEL_SHAPE | {"dtype": "float64"})
        return random_layer(name, model, size, dtype="float64")

    return {i: placed(make(), model, i) for i in numbers}


def prompt_of(model: Any, text: str = PROMPT) -> torch.Tensor:
    return model.to_tokens(text)[0]


def summed(graph: Graph) -> torch.Tensor:
    return graph.edges.sum(1) + graph.bias + graph.unlisted


@pytest.mark.parametrize("name", LAYERS)
def test_edges_and_biases_add_up_to_every_node(any_lm, name):
    layers, tokens = layers_of(any_lm, name), prompt_of(any_lm)
    graph, _ = attribute(any_lm, layers, tokens)
    assert len(graph.targets) > 1 and graph.n_units == graph.n_active > 0
    close(summed(graph), graph.value)
    logits = any_lm(tokens[None])[0, -1]
    expected = logits[graph.targets.tokens] - logits.mean()
    torch.testing.assert_close(graph.value[graph.n_units :], expected, rtol=0, atol=1e-5)
    hooks = [site.hook_in for site in (Site.at(any_lm, i) for i in layers)]
    _, cache = any_lm.run_with_cache(tokens[None], names_filter=hooks)
    for number, hook in zip(layers, hooks, strict=True):
        codes = layers[number].encode(cache[hook][0, 1:])
        of_layer = graph.layer == number
        assert of_layer.sum() == (codes > 0).sum()
        found = codes[graph.position[of_layer] - 1, graph.unit[of_layer]]
        torch.testing.assert_close(
            graph.value[: graph.n_units][of_layer], found, rtol=1e-5, atol=1e-6
        )


def test_a_difference_of_two_logits(lm):
    tokens = prompt_of(lm)
    graph, _ = attribute(lm, layers_of(lm, "mxd"), tokens, "mat", "fish")
    close(summed(graph), graph.value)
    logits = lm(tokens[None])[0, -1]
    mat, fish = (int(lm.to_tokens(word, prepend_bos=False)) for word in ("mat", "fish"))
    torch.testing.assert_close(graph.value[-1], logits[mat] - logits[fish], rtol=0, atol=1e-5)
    assert graph.targets.names == ["mat - fish"] and graph.targets.tokens == [mat]
    same(graph.targets.probability, logits.float().softmax(-1)[[mat]])


class WrittenOut:
    """The linear model of a HookedTransformer with GLUs, by its weights and the prompt's patterns,
    scales, codes and errors alone."""

    def __init__(self, model: Any, layers: Any, tokens: torch.Tensor):
        self.model, self.layers = model, layers
        _, self.cache = model.run_with_cache(tokens[None])
        self.x, self.codes, self.error = {}, {}, {}
        for i, layer in layers.items():
            x = self.cache[f"blocks.{i}.mlp.hook_in"][0]
            self.x[i], self.codes[i] = x, layer.encode(x)
            self.codes[i][0] = 0
            y = layer(x)
            y[0] = 0
            self.error[i] = self.cache[f"blocks.{i}.hook_mlp_out"][0] - y

    def norm(self, x: torch.Tensor, name: str, weight: torch.Tensor) -> torch.Tensor:
        return x / self.cache[f"{name}.hook_scale"][0] * weight

    def response(self, i: int, x: torch.Tensor, unit_factors: torch.Tensor) -> torch.Tensor:
        """The layer's tangent in its input, and its value in its codes."""
        layer, codes = self.layers[i], self.codes[i]

        def of_input(x: torch.Tensor) -> torch.Tensor:
            if not hasattr(layer, "W_shared"):
                return x @ layer.W_skip.T
            gate = torch.nn.functional.silu(x @ layer.W_hidden_gate + layer.b_hidden_gate)
            z = gate * (x @ layer.W_hidden + layer.b_hidden)
            return (codes @ layer.W_dec) * (z @ layer.W_shared)

        held, moved = jvp(of_input, (self.x[i],), (x - self.x[i],))
        if hasattr(layer, "W_shared"):
            gate = torch.nn.functional.silu(self.x[i] @ layer.W_hidden_gate + layer.b_hidden_gate)
            z = gate * (self.x[i] @ layer.W_hidden + layer.b_hidden)
            written = (codes * unit_factors) @ layer.W_dec * (z @ layer.W_shared)
            y = written + layer.b_dec + moved
        else:
            y = (codes * unit_factors) @ layer.W_dec + layer.b_dec + held + moved
        y[0] = 0
        return y

    def __call__(self, units: Any, errors: Any, embeddings: torch.Tensor) -> Any:
        """Pre-activations by layer, and what the unembedding reads."""
        model = self.model
        stream = self.cache["blocks.0.hook_resid_pre"][0] * embeddings[:, None]
        pre = {}
        for i, block in enumerate(model.blocks):
            x = self.norm(stream, f"blocks.{i}.ln1", block.ln1.w)
            values = torch.einsum("pd,hde->phe", x, block.attn.W_V) + block.attn.b_V
            pattern = self.cache[f"blocks.{i}.attn.hook_pattern"][0]
            mixed = torch.einsum("hqk,khe->qhe", pattern, values)
            stream = stream + torch.einsum("qhe,hed->qd", mixed, block.attn.W_O) + block.attn.b_O
            x = self.norm(stream, f"blocks.{i}.ln2", block.ln2.w)
            pre[i] = x @ self.layers[i].W_enc + self.layers[i].b_enc
            stream = stream + self.error[i] * errors[i][:, None] + self.response(i, x, units[i])
        return pre, self.norm(stream, "ln_final", model.ln_final.w)


@pytest.mark.parametrize("name", ["mxd", "topk_skip_transcoder"])
@torch.no_grad()
def test_edges_are_those_of_the_linear_model_written_out(tiny_hooked, llama_folder, name):
    lm = of_precision(tiny_hooked, llama_folder)
    layers, tokens = layers_of(lm, name), prompt_of(lm)
    graph, _ = attribute(lm, layers, tokens)
    n, n_pos = graph.n_units, len(tokens)
    written_out = WrittenOut(lm, layers, tokens)

    def rows(off: int | None = None) -> torch.Tensor:
        """Values of all targets with one source switched off."""
        on = torch.ones(graph.edges.shape[1], dtype=torch.float64)
        if off is not None:
            on[off] = 0
        units = {i: torch.ones_like(written_out.codes[i]) for i in layers}
        for i in layers:
            at = graph.layer == i
            units[i][graph.position[at], graph.unit[at]] = on[:n][at]
        errors = on[n : n + 3 * n_pos].view(3, n_pos)
        pre, final = written_out(units, errors, on[-n_pos:])
        reached = [
            pre[i][p, u]
            for i, p, u in zip(
                graph.layer.tolist(), graph.position.tolist(), graph.unit.tolist(), strict=True
            )
        ]
        W_U = lm.W_U - lm.W_U.mean(1, keepdim=True)
        last = (
            final[-1] @ W_U[:, graph.targets.tokens]
            + (lm.b_U - lm.b_U.mean())[graph.targets.tokens]
        )
        return torch.stack([*reached, *last])

    everything = rows()
    close(everything, graph.value)
    expected = torch.stack([everything - rows(i) for i in range(graph.edges.shape[1])], dim=1)
    torch.testing.assert_close(graph.edges, expected, rtol=1e-8, atol=1e-9)
    assert (graph.edges[:n, :n] != 0).any() and (graph.edges[n:, :n] != 0).all(0).any()


@pytest.mark.parametrize("name", ["mxd", "topk_skip_transcoder"])
def test_mlps_without_a_layer_are_errors(lm, name):
    tokens = prompt_of(lm)
    graph, _ = attribute(lm, layers_of(lm, name, [1]), tokens)
    close(summed(graph), graph.value)
    assert set(graph.layer.tolist()) == {1} and graph.layers == [0, 1, 2]
    assert (graph.position > 0).all()  # BOS passes through the MLP
    n, n_pos = graph.n_units, len(tokens)
    errors = graph.edges[n:, n : n + 3 * n_pos]
    assert (errors[:, n_pos - 1] != 0).all() and (errors[:, -1] != 0).all()
    assert not graph.edges[:n, :n].any()


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_the_most_influential_units_are_found_as_the_graph_grows(lm, batch):
    layers, tokens = layers_of(lm, "mxd"), prompt_of(lm)
    full, _ = attribute(lm, layers, tokens, batch=7)
    part, _ = attribute(lm, layers, tokens, max_nodes=30, batch=batch)
    close(summed(part), part.value)
    assert part.n_units == 30 and part.n_active == full.n_units == full.n_active
    assert part.unlisted.any() and not full.unlisted.any()
    rows = torch.cat([part.source, torch.arange(full.n_units, len(full.value))])
    columns = torch.cat([part.source, torch.arange(full.n_units, full.edges.shape[1])])
    close(part.edges, full.edges[rows][:, columns])
    first = normalised(full.edges[full.n_units :]).T @ full.targets.weight.double()
    assert first[: full.n_units].argmax() in part.source


def square(graph: Graph) -> torch.Tensor:
    """All edges between all nodes, as circuit-tracer has them."""
    A = torch.zeros(graph.n_nodes, graph.n_nodes, dtype=torch.float64)
    A[: graph.n_units, : graph.edges.shape[1]] = graph.edges[: graph.n_units]
    A[graph.edges.shape[1] :, : graph.edges.shape[1]] = graph.edges[graph.n_units :]
    return A


def test_influence_and_pruning_are_those_of_the_inverse(lm):
    graph, _ = attribute(lm, layers_of(lm, "topk_skip_transcoder"), prompt_of(lm))
    n, n_sources, n_pos = graph.n_units, graph.edges.shape[1], len(graph.tokens)
    A = square(graph).abs()
    A /= A.sum(1, keepdim=True).clamp_min(1e-10)
    weight = torch.zeros(graph.n_nodes, dtype=torch.float64)
    weight[n_sources:] = graph.targets.weight
    eye = torch.eye(graph.n_nodes, dtype=torch.float64)
    expected = weight @ (torch.linalg.inv(eye - A) - eye)
    found = influence(graph.edges[n:], graph.edges[:n], torch.arange(n), graph.targets.weight)
    close(found, expected[:n_sources])

    pruned = prune(graph)
    order = expected[:n_sources].argsort(descending=True)
    cumulative = expected[order].cumsum(0) / expected.sum()
    close(pruned.influence[order], cumulative)
    enough = int((cumulative < 0.8).sum()) + 1
    assert set(pruned.nodes[:-n_pos].nonzero()[:, 0].tolist()) <= set(order[:enough].tolist())
    assert pruned.nodes[-n_pos:].all() and 10 < pruned.nodes.sum() < n_sources
    units, edges = pruned.nodes[:n], pruned.edges
    assert edges[:, :-n_pos].any(0)[pruned.nodes[:-n_pos]].all()
    assert edges[:n].any(1)[units].all() and not edges[:n][~units].any()
    assert not edges[:, ~pruned.nodes].any() and 0 < edges.sum() < (graph.edges != 0).sum()
    everything = prune(graph, 1.0, 1.0)
    assert everything.nodes.sum() > pruned.nodes.sum()
    assert everything.edges.sum() > pruned.edges.sum()
    assert 0 < pruned.through_units < pruned.explained < 1
    same(prune(graph, 0.5).influence, pruned.influence)
    with pytest.raises(ValueError, match=r"edge_threshold must be between 0 and 1, got 1\.5"):
        prune(graph, edge_threshold=1.5)


@pytest.mark.parametrize("name", ["mxd", "molt", "topk_skip_transcoder", "transcoder"])
def test_what_the_graph_predicts_is_what_happens_in_the_linear_model(lm, name):
    graph, local = attribute(lm, layers_of(lm, name), prompt_of(lm), max_nodes=400)
    sources = range(0, graph.edges.shape[1], 3)
    edits = [{i: 0.0} for i in sources] + [{0: 0.5, 7: 2.0, graph.n_units + 3: -1.0}, {}]
    predicted = predict(graph, edits)
    close(measure(graph, local, edits, "linear", batch=9), predicted)
    assert predicted[:-1].any(1).sum() > len(edits) / 2 and not predicted[-1].any()


@pytest.mark.parametrize("name", ["mxd", "molt", "topk_skip_transcoder", "topk_transcoder"])
def test_total_effects_are_derivatives_of_the_layers_in_place(any_lm, name):
    graph, local = attribute(any_lm, layers_of(any_lm, name, size=0.1), prompt_of(any_lm))
    sources, step = range(0, graph.edges.shape[1], 5), 1e-6
    more, less = (
        measure(graph, local, [{i: f} for i in sources], "errors", frozen=True)
        for f in (1 + step, 1 - step)
    )
    found = (more - less) / (2 * step)
    expected = total_effects(graph).T[list(sources)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_edits_of_the_original_model_are_additions_to_its_stream(lm):
    layers, tokens = layers_of(lm, "mxd"), prompt_of(lm)
    graph, local = attribute(lm, layers, tokens, "mat", "fish")
    node = int((graph.layer == 1).nonzero()[0])
    at, unit, site = int(graph.position[node]), int(graph.unit[node]), Site.at(lm, 1)
    _, cache = lm.run_with_cache(tokens[None], names_filter=[site.hook_in])
    x = cache[site.hook_in][0, at]
    shared = layers[1].hidden(x) @ layers[1].W_shared
    written = graph.activation[node] * layers[1].W_dec[unit] * shared

    def without(y: torch.Tensor, hook: Any) -> torch.Tensor:
        y = y.clone()
        y[0, at] -= written
        return y

    def difference(logits: torch.Tensor) -> torch.Tensor:
        mat, fish = (int(lm.to_tokens(word, prepend_bos=False)) for word in ("mat", "fish"))
        return logits[0, -1, mat] - logits[0, -1, fish]

    after = lm.run_with_hooks(tokens[None], fwd_hooks=[(site.hook_out, without)])
    expected = difference(after) - difference(lm(tokens[None]))
    found = measure(graph, local, [{node: 0.0}], "original")[0, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no node 99999 to edit: this graph has 0 to"):
        measure(graph, local, [{99_999: 0.0}], "original")


@pytest.mark.parametrize("where", WHERE)
def test_ranks_of_predicted_and_measured_effects(lm, where):
    graph, local = attribute(lm, layers_of(lm, "mxd", size=0.1), prompt_of(lm), "mat", "fish")
    reached = total_effects(graph)[0, : graph.n_units] != 0  # others would be ties
    edits = [{node: 0.0} for node in reached.nonzero()[:, 0].tolist()]
    predicted, measured = predict(graph, edits)[:, 0], measure(graph, local, edits, where)[:, 0]
    ranks = [values.argsort().argsort().double() for values in (predicted, measured)]
    found = rank_correlation(predicted, measured)
    assert found == pytest.approx(float(torch.corrcoef(torch.stack(ranks))[0, 1]))
    assert rank_correlation(predicted, predicted) == pytest.approx(1)
    assert rank_correlation(predicted[:1], measured[:1]) is None
    assert rank_correlation(predicted, torch.zeros_like(measured)) is None


def test_the_model_is_left_as_it_was(lm):
    layers, tokens = layers_of(lm, "mxd"), prompt_of(lm)
    wanted = [p.requires_grad for module in (lm, *layers.values()) for p in module.parameters()]
    before = lm(tokens[None])
    graph, local = attribute(lm, layers, tokens)
    measure(graph, local, [{0: 0.0}], "replacement")
    same(lm(tokens[None]), before)
    modules = (lm, *layers.values())
    assert wanted == [p.requires_grad for module in modules for p in module.parameters()]
    assert not any(p.grad is not None for module in modules for p in module.parameters())


class TestWhatIsRefused:
    def test_targets(self, lm):
        local = LocalModel(lm, layers_of(lm, "mxd"), prompt_of(lm))
        with pytest.raises(ValueError, match=r"'mat fish' is not one token but 2: \['mat', 'fish'"):
            targets_of(local, "mat fish")
        with pytest.raises(ValueError, match="no token 24: the vocabulary has 24"):
            targets_of(local, 24)
        with pytest.raises(ValueError, match="the same token, 'mat'"):
            targets_of(local, "mat", "mat")
        with pytest.raises(ValueError, match="against='mat' needs a target"):
            targets_of(local, against="mat")
        assert targets_of(local, 5, 6).tokens == [5]

    def test_prompts(self, lm):
        layers = layers_of(lm, "mxd")
        with pytest.raises(ValueError, match="a prompt of 33 tokens: this model reads 1 to 32"):
            LocalModel(lm, layers, torch.full((33,), 5))
        with pytest.raises(ValueError, match="a prompt of 0 tokens"):
            LocalModel(lm, layers, torch.zeros(0, dtype=torch.long))
        with pytest.raises(ValueError, match="special tokens only"):
            LocalModel(lm, layers, torch.tensor([1, 2]))

    def test_layers(self, lm):
        tokens = prompt_of(lm)
        with pytest.raises(ValueError, match="at least one layer"):
            LocalModel(lm, {}, tokens)
        for name in ("dense", "topk"):
            with pytest.raises(ValueError, match="a graph needs layers with experts that read"):
                LocalModel(lm, layers_of(lm, name, [1]), tokens)
        layers = layers_of(lm, "mxd", [1])
        layers[1].read_rows = lambda units: (torch.zeros(len(units), 16).double(), 0.0)
        with pytest.raises(ValueError, match=r"of layer 1 \(MxD\) are no linear function"):
            LocalModel(lm, layers, tokens)
        layers = layers_of(lm, "mxd", [1])
        layers[1].write_rows = lambda units, x: layers[1].W_dec[units]
        with pytest.raises(ValueError, match=r"of layer 1 \(MxD\) write does not add up to its"):
            LocalModel(lm, layers, tokens)

    def test_a_model_that_is_not_linear(self, lm, monkeypatch):
        monkeypatch.setattr(LocalModel, "freezing", lambda self, batch: [])
        with pytest.raises(ValueError, match="this model is not linear"):
            attribute(lm, layers_of(lm, "mxd"), prompt_of(lm))


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    slug: str
    scan: str
    transcoder_list: list[str]
    prompt_tokens: list[str]
    prompt: str
    node_threshold: float | None
    schema_version: int | None


class QParams(Strict):
    pinnedIds: list[str]
    supernodes: list[list[str]]
    linkType: Literal["both"]
    clickedId: str
    sg_pos: str


class Node(Strict):
    node_id: str
    jsNodeId: str
    feature: int
    layer: str
    ctx_idx: int
    feature_type: Literal[
        "cross layer transcoder", "mlp reconstruction error", "embedding", "logit"
    ]
    token_prob: float
    is_target_logit: bool
    run_idx: int
    reverse_ctx_idx: int
    clerp: str
    influence: float | None
    activation: float | None


class Link(Strict):
    source: str
    target: str
    weight: float


class CircuitTracer(Strict):
    """What circuit-tracer 0.5 writes, whose models ignore other fields and convert these."""

    metadata: Metadata
    qParams: QParams
    nodes: list[Node]
    links: list[Link]


@pytest.mark.parametrize("against", [None, "fish"])
def test_the_json_is_circuit_tracers(lm, against):
    target = "mat" if against else None
    graph, _ = attribute(lm, layers_of(lm, "mxd"), prompt_of(lm), target, against)
    pruned = prune(graph)
    first = int(pruned.nodes.int().argmax())
    layer, unit, at = (int(of[first]) for of in (graph.layer, graph.unit, graph.position))
    options = {"slug": "a", "scan": "tiny", "prompt": PROMPT, "n_vocab": 24, "node_threshold": 0.8}
    value = circuit_tracer_json(graph, pruned, names={(layer, unit): "a name"}, **options)
    found = CircuitTracer.model_validate_json(json.dumps(value))
    nodes = {node.node_id: node for node in found.nodes}
    assert len(nodes) == len(found.nodes) == int(pruned.nodes.sum()) + len(graph.targets)
    assert len(found.links) == int(pruned.edges.sum())
    assert {link.source for link in found.links} | {link.target for link in found.links} <= {*nodes}
    named = nodes[f"{layer}_{unit}_{at}"]
    assert named.clerp == "a name" and named.activation == pytest.approx(
        float(graph.activation[first])
    )
    assert named.feature == (layer + unit) * (layer + unit + 1) // 2 + unit
    assert [n.ctx_idx for n in found.nodes if n.feature_type == "embedding"] == list(
        range(len(graph.tokens))
    )
    logits = [node for node in found.nodes if node.feature_type == "logit"]
    assert [node.layer for node in logits] == [str(N_LAYERS + 1)] * len(graph.targets)
    assert [node.is_target_logit for node in logits] == [True] + [False] * (len(logits) - 1)
    if against:
        assert logits[0].feature == 24 and logits[0].clerp.startswith('Output "mat - fish" (p=0.')
    assert all(node.influence is not None for node in found.nodes if node.feature_type != "logit")
    weights = {(link.source, link.target): link.weight for link in found.links}
    total = sum(w for (_, target), w in weights.items() if target == logits[0].node_id)
    kept = graph.edges[graph.n_units][pruned.edges[graph.n_units]]
    assert total == pytest.approx(float(kept.sum()))
