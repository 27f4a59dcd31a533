"""The local replacement model of a prompt: what a language model does there, made linear.

Attention patterns and the scales of norms are held at the prompt's, and so is the choice of
active units (Ameisen et al. 2025, "Circuit Tracing", transformer-circuits.pub/2025/
attribution-graphs/methods.html). With the codes ``a`` of a layer on the MLP's input x, an MLP's
output is then a sum of what each active unit writes, a dense path, and the error that is left::

    y = sum_n a_n w_n(x) + d(x) + error,    layer(x) = f(x, a),  w_n = df/da_n,  d = f(x, 0)

Every layer here is affine in its codes, so the writes with ``w_n`` frozen and ``d`` are all of its
output. A transcoder writes ``w_n = W_dec[n]``, and ``d`` is its bias and its skip. An MxD writes
``w_n = W_dec[n] * s`` with ``s = z W_shared``, and ``d`` is its bias alone: what its dense part
does is how s moves with x. To first order around the prompt's input ``x0``::

    y = sum_n a_n w_n(x0) + d(x0) + J (x - x0) + error,    J = df/dx at x0, codes held

so the dense path is ``J (x - x0)``: for a skip, ``W_skip (x - x0)``; for an MxD,
``(a W_dec) * ((x - x0) dz/dx W_shared)``. It is zero at the prompt, for the writes have all of s
there already, and moves as the layer does. Its constant ``-J x0`` is part of the biases.

Special tokens pass through the original MLP, and MLPs without a layer are as they are: both are
error from end to end, and nothing is traced through them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from jaxtyping import Bool, Float, Int
from sae_lens.saes.sae import SAE
from torch import Tensor, nn

from mxd_lens.analysis.joint import Hook, sites_of
from mxd_lens.layers import layer_of
from mxd_lens.layers.codes import Codes
from mxd_lens.layers.layer import Layer
from mxd_lens.models.site import Site

UNEMBED = "unembed.hook_in"
"""Where the last norm's output is read, in both classes of models."""

Stream = Float[Tensor, "batch pos d_model"]


@dataclass
class StandIn:
    """One MLP at a prompt: the layer in its place, and what is left to the error."""

    site: Site
    layer: Layer | None
    kept: Bool[Tensor, "pos"]
    """Tokens at which the layer is in place."""
    x: Float[Tensor, "kept d_in"]
    """Its inputs there, in the layer's dtype."""
    codes: Codes | None
    """Of these inputs."""
    position: Int[Tensor, "n"]
    unit: Int[Tensor, "n"]
    activation: Float[Tensor, "n"]
    """Of each active unit, in order of position."""
    reads: Float[Tensor, "n d_model"]
    read_bias: Float[Tensor, "n"]
    """``x . reads[i] + read_bias[i]`` is its activation."""
    writes: Float[Tensor, "n d_model"]
    """What it adds to the MLP's output, its activation included."""
    constant: Float[Tensor, "pos d_model"]
    """What of the layer's output no unit writes: d(x0)."""
    error: Float[Tensor, "pos d_model"]

    def held(self, x: Stream) -> Stream:
        """The layer's output with its codes held; zero where it is not in place."""
        y = torch.zeros_like(x)
        if self.layer is None or self.codes is None:
            return y
        here = x[:, self.kept].to(self.x)
        of_layer = self.layer.at_codes(here, self.codes).to(x)
        y[:, self.kept] = of_layer.expand_as(y[:, self.kept])
        return y

    @torch.no_grad()
    def tangent(self, x: Stream) -> Stream:
        """The dense path, ``J (x - x0)``, by forward differentiation."""
        y = torch.zeros_like(x)
        if self.layer is None or self.codes is None:
            return y
        step = x[:, self.kept].to(self.x) - self.x
        with forward_ad.dual_level():
            at = forward_ad.make_dual(self.x.expand_as(step).clone(), step)
            moved = forward_ad.unpack_dual(self.layer.at_codes(at, self.codes)).tangent
            if moved is not None:
                y[:, self.kept] = moved.to(x)
        return y


class LocalModel:
    """The local replacement model of one prompt.

    Its sources, things that write to the residual stream, are numbered as circuit-tracer numbers
    them: active units, layer by layer; then the errors, layer by layer, of each position; then
    what enters the first block at each position, token and position embeddings together.

    Args:
        layers: by MLP; metadata as for `evaluate`.
        tokens: the prompt, special tokens included.

    Raises:
        ValueError: no layers, one that has no experts or reads another activation than the MLP's
            input, or whose activations are not linear in it; a prompt that is empty, too long, or
            of special tokens only; see also `sites_of`.
    """

    @torch.no_grad()
    def __init__(self, model: Any, layers: Mapping[int, SAE[Any]], tokens: Int[Tensor, "pos"]):
        if not layers:
            raise ValueError("a graph needs at least one layer")
        if not len(tokens) or len(tokens) > model.cfg.n_ctx:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens: this model reads 1 to {model.cfg.n_ctx}"
            )
        sites = sites_of(model, layers)
        numbers = [
            i for i in range(len(model.blocks)) if model.blocks[i]._modules.get("mlp") is not None
        ]
        sites |= {i: Site.at(model, i) for i in numbers if i not in sites}
        self.model = model
        site = next(iter(sites.values()))
        self.tokens: Int[Tensor, "pos"] = site.on_model(tokens)
        if not site.non_special(self.tokens).any():
            raise ValueError("this prompt holds special tokens only")
        hooks = model.hook_dict
        entries = ("blocks.0.hook_in", "blocks.0.hook_resid_pre")
        self._entry = next(name for name in entries if name in hooks)
        frozen = [name for name in hooks if name.endswith((".hook_pattern", ".hook_scale"))]
        logits, cache = model.run_with_cache(
            self.tokens[None], names_filter=[*frozen, self._entry], prepend_bos=False
        )
        self.logits: Float[Tensor, "d_vocab"] = logits[0, -1]
        self.embedded: Float[Tensor, "pos d_model"] = cache[self._entry][0]
        # A norm of queries and keys acts on the pattern only; TransformerLens flattens its batch.
        self._frozen = {n: cache[n] for n in frozen if n in cache and len(cache[n]) == 1}
        self.sites: dict[int, Site] = {number: sites[number] for number in numbers}
        outputs: dict[int, Stream] = {}

        def output(number: int, x: Stream, y: Stream) -> Stream:
            outputs[number] = y
            return y

        # Again, for a bridge computes a norm otherwise where its scale is held: in float32.
        reads, final = self.run(self.freezing(1), output, 1)
        self.final: Float[Tensor, "d_model"] = final[0, -1]
        self.standins: dict[int, StandIn] = {
            number: _stand_in(
                site, layers.get(number), self.tokens, reads[number][0], outputs[number][0]
            )
            for number, site in self.sites.items()
        }

    @property
    def n_units(self) -> int:
        """Active units of all layers and positions."""
        return len(self.unit)

    @property
    def n_sources(self) -> int:
        """Units, errors and embeddings."""
        return self.n_units + (len(self.standins) + 1) * len(self.tokens)

    @cached_property
    def layer(self) -> Int[Tensor, "n_units"]:
        """The MLP of each active unit."""
        numbers = [torch.full_like(s.unit, number) for number, s in self.standins.items()]
        return torch.cat(numbers).cpu()

    @cached_property
    def position(self) -> Int[Tensor, "n_units"]:
        return torch.cat([s.position for s in self.standins.values()]).cpu()

    @cached_property
    def unit(self) -> Int[Tensor, "n_units"]:
        return torch.cat([s.unit for s in self.standins.values()]).cpu()

    @cached_property
    def activation(self) -> Float[Tensor, "n_units"]:
        return torch.cat([s.activation.cpu() for s in self.standins.values()])

    def writes(self, factors: Float[Tensor, "batch n_sources"]) -> tuple[Stream, dict[int, Stream]]:
        """What sources write to the stream, each times its factor: before the first block, and as
        part of each MLP's output."""
        n_pos = len(self.tokens)
        units, errors, embeddings = factors.to(self.embedded).split(
            [self.n_units, len(self.standins) * n_pos, n_pos], dim=1
        )
        written: dict[int, Stream] = {}
        of_layers = units.split([len(s.unit) for s in self.standins.values()], dim=1)
        of_errors = errors.split(n_pos, dim=1)
        for (number, s), of_units, of_error in zip(
            self.standins.items(), of_layers, of_errors, strict=True
        ):
            y = of_error[..., None].to(s.error) * s.error
            of_each = of_units[..., None].to(s.writes) * s.writes
            written[number] = y.index_add(1, s.position, of_each)
        return embeddings[..., None] * self.embedded, written

    def run(
        self, hooks: list[Hook], outputs: Callable[[int, Stream, Stream], Stream], batch: int
    ) -> tuple[dict[int, Stream], Stream]:
        """One pass of the model.

        Args:
            hooks: others that are to act.
            outputs: of (number, input, output) of each MLP, what is to be its output.

        Returns:
            Each MLP's input, and what the unembedding reads.
        """
        reads: dict[int, Stream] = {}
        last: list[Stream] = []

        def at(number: int) -> Iterator[Hook]:
            def read(x: Tensor, hook: Any) -> None:
                reads[number] = x

            def write(y: Tensor, hook: Any) -> Tensor:
                return outputs(number, reads[number], y)

            hook_in, hook_out = self.sites[number].hooks
            yield hook_in, read
            yield hook_out, write

        def end(x: Tensor, hook: Any) -> Tensor:
            last.append(x)
            return x[:1, -1:]  # no logits are needed, and they would be large

        own = [hook for number in self.sites for hook in at(number)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="A forward hook edited hook_scale")
            self.model.run_with_hooks(
                self.tokens.expand(batch, -1),
                fwd_hooks=[*hooks, *own, (UNEMBED, end)],
                prepend_bos=False,
            )
        return reads, last[0]

    def entering(self, stream: Stream) -> Hook:
        """A hook that has this enter the first block."""
        return self._entry, lambda x, hook: stream.to(x)

    def freezing(self, batch: int) -> list[Hook]:
        """Hooks that hold attention patterns and norms' scales at the prompt's."""

        def hold(name: str) -> Callable[..., Tensor]:
            value = self._frozen[name]
            return lambda x, hook: value.expand(batch, *value.shape[1:])

        return [(name, hold(name)) for name in self._frozen]

    @torch.no_grad()
    def affine(
        self, factors: Float[Tensor, "batch n_sources"], *, responding: bool = False
    ) -> tuple[dict[int, Stream], Stream]:
        """Values in the linear model: each MLP's input, and what the unembedding reads.

        Args:
            factors: of what each source writes: 1 as at the prompt, 0 for the biases alone.
            responding: active units write in proportion to their pre-activations, whatever sign
                those have, times their factor; else they write as at the prompt, times it.
        """
        batch = len(factors)
        stream, written = self.writes(factors)

        def output(number: int, x: Stream, y: Stream) -> Stream:
            s = self.standins[number]
            total = written[number] + s.constant + s.tangent(x)
            if responding and len(s.unit):
                pre = torch.einsum("bnd,nd->bn", x[:, s.position], s.reads) + s.read_bias
                change = pre / s.activation - 1
                total = total.index_add(1, s.position, change[..., None] * s.writes)
            return total

        return self.run([self.entering(stream), *self.freezing(batch)], output, batch)


class Backward:
    """Edges into any targets by passes backward through the linear model, many at a time.

    One pass forward, of as many copies of the prompt as targets at a time, is kept: each copy has
    the gradient of one target.
    """

    def __init__(self, local: LocalModel, batch: int):
        self.local: LocalModel = local
        self.batch: int = batch

        def leaf(value: Float[Tensor, "pos d_model"]) -> Stream:
            return value.repeat(batch, 1, 1).requires_grad_()

        with torch.enable_grad(), without_gradients(local):
            stream = leaf(local.embedded)
            written = {}
            for number, s in local.standins.items():
                total = (s.error + s.constant).index_add(0, s.position, s.writes)
                written[number] = leaf(total)

            def output(number: int, x: Stream, y: Stream) -> Stream:
                # Evaluated at the prompt itself, the layer has the gradient of its tangent there.
                held = local.standins[number].held(x)
                return written[number] + held - held.detach()

            hooks = [local.entering(stream), *local.freezing(batch)]
            self._reads, self._final = local.run(hooks, output, batch)
            self._leaves = [*written.values(), stream]

    def __call__(
        self,
        layers: Int[Tensor, "n"],
        positions: Int[Tensor, "n"],
        vectors: Float[Tensor, "n d_model"],
    ) -> Float[Tensor, "n n_sources"]:
        """How much each source adds to ``x[layers, positions] . vectors``.

        Args:
            layers: whose MLP's input it is; -1: what the unembedding reads. At most as many targets
                as copies of the prompt.
        """
        outputs, gradients = [], []
        for number in layers.unique().tolist():
            output = self._final if number < 0 else self._reads[number]
            rows = (layers == number).nonzero()[:, 0].to(output.device)
            gradient = torch.zeros_like(output)
            gradient[rows, positions.to(rows)[rows]] = vectors[rows].to(output)
            outputs.append(output)
            gradients.append(gradient)
        found = torch.autograd.grad(
            outputs, self._leaves, gradients, retain_graph=True, allow_unused=True
        )
        n, local = len(layers), self.local
        *of_layers, of_stream = [
            _precise(torch.zeros_like(leaf) if g is None else g)[:n]
            for leaf, g in zip(self._leaves, found, strict=True)
        ]
        standins = local.standins.values()
        units = [
            torch.einsum("bnd,nd->bn", g[:, s.position], s.writes.to(g)).cpu()
            for g, s in zip(of_layers, standins, strict=True)
        ]
        errors = [(g * s.error).sum(-1).cpu() for g, s in zip(of_layers, standins, strict=True)]
        return torch.cat([*units, *errors, (of_stream * local.embedded).sum(-1).cpu()], dim=1)


def _precise(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


@contextmanager
def without_gradients(local: LocalModel) -> Iterator[None]:
    """No parameter, of the model or a layer, takes part in gradients within."""
    layers = [s.layer.sae for s in local.standins.values() if s.layer is not None]
    modules: list[nn.Module] = [local.model, *layers]
    wanted = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _stand_in(
    site: Site,
    sae: SAE[Any] | None,
    tokens: Int[Tensor, "pos"],
    x: Float[Tensor, "pos d_model"],
    y: Float[Tensor, "pos d_model"],
) -> StandIn:
    kept = site.non_special(tokens).to(x.device)
    none = torch.zeros(0, dtype=torch.long, device=x.device)
    if sae is None:
        kept = torch.zeros_like(kept)
        rows, values = x[:0], x.new_zeros(0)
        where = none, none, values, rows, values, rows
        return StandIn(site, None, kept, x[:0], None, *where, torch.zeros_like(y), y)
    layer = layer_of(sae)
    if not layer.has_experts or not layer.reads_input:
        raise ValueError(
            f"layer {site.layer} is {layer.label}: a graph needs layers with experts that read "
            "their MLP's input"
        )
    inputs = x[kept].to(sae.W_enc)
    codes = layer.codes(inputs)
    token, unit, activation = codes.firings()
    order = (token * sae.cfg.d_sae + unit).argsort()
    token, unit, activation = token[order], unit[order], activation[order]
    reads, bias = layer.read_rows(unit)
    pre = torch.einsum("nd,nd->n", inputs[token], reads) + bias
    if not torch.allclose(pre, activation, rtol=1e-2, atol=1e-3):
        raise ValueError(
            f"activations of layer {site.layer} ({type(sae).__name__}) are no linear function of "
            "the MLP's input, so its units have no edges"
        )
    writes = activation[:, None] * layer.write_rows(unit, inputs[token])
    output = layer.at_codes(inputs, codes)
    silent = replace(codes, values=torch.zeros_like(codes.values))
    constant = layer.at_codes(inputs, silent).expand_as(output)
    added = constant.index_add(0, token, writes)
    if not torch.allclose(added, output, rtol=1e-3, atol=1e-3 * float(output.abs().max())):
        raise ValueError(
            f"what the units of layer {site.layer} ({type(sae).__name__}) write does not add up to "
            "its output"
        )
    of_all, error = torch.zeros_like(y), y.clone()
    of_all[kept] = constant.to(y)
    error[kept] -= output.to(y)
    return StandIn(
        site,
        layer,
        kept,
        inputs,
        codes,
        kept.nonzero()[:, 0][token.to(kept.device)],
        unit.to(x.device),
        activation.to(x),
        reads.to(x),
        bias.to(x),
        writes.to(x),
        of_all,
        error,
    )
