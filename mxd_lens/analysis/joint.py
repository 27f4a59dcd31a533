"""Many layers in place of their MLPs at once: what the model loses, and how errors grow with depth.

Each layer reads what the layers before it have made of the residual stream. Special tokens pass
through the original MLPs, as in `evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sae_lens.saes.sae import SAE
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.analysis.alone import Alone
from mxd_lens.analysis.in_model import ablated, cross_entropies, divergences
from mxd_lens.analysis.intervals import interval
from mxd_lens.analysis.jacobian import Function, jacobians
from mxd_lens.layers import layer_of
from mxd_lens.models.site import Site
from mxd_lens.models.splice import get_mlp

Hook = tuple[str, Callable[..., Any]]

PROMPTS = ("The capital of France is", "Once upon a time there was a", "The opposite of hot is")
"""That a model with and without its layers goes on from."""


def sites_of(model: Any, layers: Mapping[int, SAE[Any]]) -> dict[int, Site]:
    """Where layers belong; ValueError for one whose metadata is not of its MLP, see `Site.of`."""
    sites = {number: Site.of(model, sae) for number, sae in sorted(layers.items())}
    for number, site in sites.items():
        if site.layer != number:
            raise ValueError(f"the layer given for MLP {number} was trained at MLP {site.layer}")
    return sites


def hooks_in_place(
    site: Site, sae: SAE[Any], kept: Bool[Tensor, "batch pos"], function: Function | None = None
) -> Iterator[Hook]:
    """Of a pass of the model with the layer in place of its MLP at these tokens.

    Args:
        function: of the layer's inputs, where it is not the layer itself.
    """
    read: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        read["x"] = x

    def replace(y: Tensor, hook: Any) -> Tensor:
        x, here = read.pop("x", y), kept.to(y.device)
        y = y.clone()
        y[here] = (function or sae)(x[here].to(sae.device).float()).to(y)
        return y

    if site.hook_in != site.hook_out:  # an SAE reads the output
        yield site.hook_in, keep
    yield site.hook_out, replace


def spread_evenly(layers: Sequence[int]) -> list[list[int]]:
    """1, 2, 4, ... and all of these layers, evenly spaced over the depth."""
    sizes = [2**i for i in range(len(layers).bit_length()) if 2**i < len(layers)]
    chosen = [[layers[(2 * i + 1) * len(layers) // (2 * n)] for i in range(n)] for n in sizes]
    return [*chosen, list(layers)]


@torch.no_grad()
def evaluate_jointly(
    model: Any,
    layers: Mapping[int, SAE[Any]],
    tokens: Sequence[Int[Tensor, "batch pos"]],
    subsets: Sequence[Sequence[int]] | None = None,
    *,
    each: bool = False,
    controls: Mapping[int, SAE[Any]] | None = None,
    n_jacobian_tokens: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure layers in place of their MLPs at once.

    Args:
        layers: by MLP; metadata as for `evaluate`.
        tokens: held-out sequences, as `Heldout.in_model`.
        subsets: which of the layers, each time; by default `spread_evenly`'s. The last is what all
            but ``replaced`` is of.
        each: measure each layer within the model that all others are in place in, too: 4 passes
            over the tokens for a layer, 5 with a control.
        controls: dense controls by MLP, for what a layer's experts are worth there.
        n_jacobian_tokens: tokens at which Jacobians are compared.

    Returns:
        ``ce_original`` and ``ce_tokens``; ``replaced``: for each number of layers, ``layers``,
        ``ce_increase`` and ``kl``, nats per token in float32, with their 95% intervals over
        sequences. With the last of them in place:

        - ``error``: for each block of the model, squared distance of the residual stream after it
          to the original's over its squared norm, mean over tokens;
        - ``ce_mean_gates``, ``ce_zero_ablation``: CE increase with the sparse terms of all held at
          their means at once, and with these MLPs removed; ``share``: (gates at their means - in
          place) / (removed - original). None of dense controls, but for the removal;
        - ``in_place``: for each ``layer`` its `Alone.row` on what the layers before it make the
          MLP read, against that MLP's own output there. With ``each`` also what it costs beside
          the others, ``ce_increase``; ``share`` and ``shuffled`` (by another token's sparse term,
          norms kept) over what removing its MLP there costs; ``jacobian_cosine`` at those inputs;
          with ``controls`` the layer's ``worth``: CE with the control there - CE with the layer.

    Raises:
        ValueError: no layers, or see `sites_of`.
    """
    if not layers:
        raise ValueError("there are no layers to put in place")
    subsets = [list(of_n) for of_n in subsets or spread_evenly(sorted(layers))]
    together = _Together(
        model,
        layers,
        tokens,
        subsets,
        each=each,
        controls=controls or {},
        n_jacobian_tokens=n_jacobian_tokens,
        seed=seed,
    )
    with together.progress:
        together.put_in_place()
        together.ablate()
    return together.row()


class _Together:
    """Losses of each sequence, in nats, by what is in place."""

    def __init__(
        self,
        model: Any,
        layers: Mapping[int, SAE[Any]],
        tokens: Sequence[Int[Tensor, "batch pos"]],
        subsets: list[list[int]],
        *,
        each: bool,
        controls: Mapping[int, SAE[Any]],
        n_jacobian_tokens: int,
        seed: int,
    ):
        self.model, self.tokens, self.subsets = model, tokens, subsets
        self.n_jacobian_tokens = n_jacobian_tokens
        self.generator: torch.Generator = torch.Generator().manual_seed(seed)
        self.all = subsets[-1]
        self.sites: dict[int, Site] = sites_of(model, layers)
        self.layers = layers
        self.controls = {i: controls[i] for i in self.all if i in controls}
        sites_of(model, self.controls)
        self.each = each
        self.alone = {i: Alone(layer_of(layers[i])) for i in self.all}
        self.sample: dict[int, Tensor] = {}
        self.error = torch.zeros(model.cfg.n_layers, dtype=torch.float64)
        self.losses: dict[Any, list[Tensor]] = {}
        self.kl: list[list[Tensor]] = [[] for _ in subsets]
        self.predicted: list[Tensor] = []
        self.n_read = 0
        gates = sum(alone.layer.has_experts for alone in self.alone.values())
        passes = 1 + len(subsets) + 1 + (gates > 0)
        passes += each * (2 * len(self.all) + 2 * gates + len(self.controls))
        self.progress = tqdm(total=len(tokens) * passes, desc="Measuring together")

    def _run(
        self, batch: Tensor, kept: Tensor, functions: Mapping[int, Function], watch: list[Hook]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """With these in place of MLPs."""
        hooks = watch + [
            hook
            for i, function in functions.items()
            for hook in hooks_in_place(self.sites[i], self.layers[i], kept, function)
        ]
        logits = self.model.run_with_hooks(batch, fwd_hooks=hooks)
        self.progress.update()
        return logits

    def put_in_place(self) -> None:
        """The original, and each subset's layers."""
        stream = _stream(self.model)
        for batch in self.tokens:
            kept = self.sites[self.all[0]].non_special(batch)
            predicted = kept[:, 1:].cpu()
            self.predicted.append(predicted.sum(1))
            self.n_read += int(kept.sum())
            original, cache = self.model.run_with_cache(
                batch, names_filter=stream, prepend_bos=False
            )
            self.progress.update()
            self._keep("original", original, batch, predicted)
            for n, subset in enumerate(self.subsets):
                hooks: list[Hook] = []
                if n + 1 == len(self.subsets):
                    hooks += [hook for i in subset for hook in self._watch(i, kept)]
                    hooks += [
                        (name, _distance(cache[name], kept, self.error[block : block + 1]))
                        for block, name in enumerate(stream)
                    ]
                logits = self._run(batch, kept, {i: self.layers[i] for i in subset}, hooks)
                self._keep(n, logits, batch, predicted)
                self.kl[n].append((divergences(original, logits) * predicted).double().sum(1))

    def ablate(self) -> None:
        """All in place, with gates ablated, or layers gone: all at once, and each."""
        ablations: dict[int, dict[str, Function]] = {}
        for i, alone in self.alone.items():
            mean = alone.mean_sparse
            ablations[i] = {} if mean is None else {**ablated(alone.layer, mean, self.generator)}
        everything = {i: self.layers[i] for i in self.all}
        changes: dict[Any, dict[int, Function]] = {"removed": dict.fromkeys(self.all, _nothing)}
        means = {i: of_i["ce_mean_gate"] for i, of_i in ablations.items() if of_i}
        changes |= {"means": everything | means} if means else {}
        for i in self.all if self.each else ():
            others = {n: f for n, f in everything.items() if n != i}
            changes[i, "without"] = others
            changes[i, "removed"] = others | {i: _nothing}
            for name in ("ce_mean_gate", "ce_shuffled_gate_matched") if ablations[i] else ():
                changes[i, name] = others | {i: ablations[i][name]}
            if i in self.controls:
                changes[i, "control"] = others | {i: self.controls[i]}
        for batch in self.tokens:
            kept = self.sites[self.all[0]].non_special(batch)
            predicted = kept[:, 1:].cpu()
            for name, functions in changes.items():
                self._keep(name, self._run(batch, kept, functions, []), batch, predicted)

    def _keep(self, name: Any, logits: Tensor, batch: Tensor, predicted: Tensor) -> None:
        losses = (cross_entropies(logits, batch) * predicted).double().sum(1)
        self.losses.setdefault(name, []).append(losses)

    def _watch(self, number: int, kept: Bool[Tensor, "batch pos"]) -> list[Hook]:
        """Have `Alone` see what the MLP reads and writes with the layers before it in place."""
        site, alone = self.sites[number], self.alone[number]
        read: dict[str, Tensor] = {}

        def see(y: Tensor, hook: Any) -> None:
            sae = alone.layer.sae
            x, y = (
                of_token[kept.to(of_token.device)].to(sae.device).float()
                for of_token in (read.pop("x", y), y)
            )
            alone.add(x, y)
            if self.each and number not in self.sample:
                chosen = torch.randperm(len(x), generator=self.generator)
                self.sample[number] = x[chosen[: self.n_jacobian_tokens].to(x.device)]

        def keep(x: Tensor, hook: Any) -> None:
            read["x"] = x

        first = [] if site.hook_in == site.hook_out else [(site.hook_in, keep)]
        return [*first, (site.hook_out, see)]

    def row(self) -> dict[str, Any]:
        """See `evaluate_jointly`."""
        n = torch.cat(self.predicted).double().numpy()
        ce = {name: torch.cat(parts).numpy() for name, parts in self.losses.items()}

        def mean(of_sequence: Any) -> float:
            return float(of_sequence.sum() / n.sum())

        def lost(name: str, of_sequence: Any) -> dict[str, Any]:
            return {
                name: mean(of_sequence),
                f"{name}_interval": interval(np.divide, of_sequence, n),
            }

        here, original = ce[len(self.subsets) - 1], ce["original"]
        replaced: list[dict[str, Any]] = [
            {"layers": subset}
            | lost("ce_increase", ce[i] - original)
            | lost("kl", torch.cat(self.kl[i]).numpy())
            for i, subset in enumerate(self.subsets)
        ]
        gates = mean(ce["means"] - original) if "means" in ce else None
        removed = mean(ce["removed"] - original)
        in_place = []
        for i, alone in self.alone.items():
            row = {"layer": i} | alone.row()
            if self.each:
                row |= lost("ce_increase", here - ce[i, "without"])
                cost = mean(ce[i, "removed"] - ce[i, "without"])
                for name, of_gate in _SHARES.items():
                    row[name] = mean(ce[i, of_gate] - here) / cost if (i, of_gate) in ce else None
                row |= lost("worth", ce[i, "control"] - here) if i in self.controls else {}
                row |= self._jacobian(i)
            in_place.append(row)
        return {
            "ce_original": mean(original),
            "ce_tokens": int(n.sum()),
            "replaced": replaced,
            "error": (self.error / self.n_read).tolist(),
            "ce_mean_gates": gates,
            "ce_zero_ablation": removed,
            "share": None if gates is None else (gates - replaced[-1]["ce_increase"]) / removed,
            "in_place": in_place,
        }

    def _jacobian(self, number: int) -> dict[str, Any]:
        """At random tokens of the first batch; None of a layer that reads the output."""
        layer, cosine = self.alone[number].layer, None
        if layer.reads_input:
            mlp = get_mlp(self.model, number)
            cosine = jacobians(layer, mlp, self.sample[number])["jacobian_cosine"]
        return {"jacobian_cosine": cosine}


_SHARES = {"share": "ce_mean_gate", "shuffled": "ce_shuffled_gate_matched"}


def _nothing(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


@torch.no_grad()
def continuations(
    model: Any,
    layers: Mapping[int, SAE[Any]],
    prompts: Sequence[str] = PROMPTS,
    n_tokens: int = 24,
) -> list[str]:
    """What the model writes after each prompt with layers in place of their MLPs, the likeliest
    token each time; without layers, what the original does. ValueError: see `sites_of`."""
    sites = sites_of(model, layers)
    written = []
    for prompt in prompts:
        tokens = model.to_tokens(prompt)
        n_prompt = tokens.shape[1]
        for _ in range(n_tokens):
            hooks = [
                hook
                for number, site in sites.items()
                for hook in hooks_in_place(site, layers[number], site.non_special(tokens))
            ]
            logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1).to(tokens)], dim=1)
        written.append(model.tokenizer.decode(tokens[0, n_prompt:]))
    return written


def _stream(model: Any) -> list[str]:
    """Hooks of the residual stream after each block."""
    for end in ("hook_out", "hook_resid_post"):  # of a bridge, of a HookedTransformer
        names = [f"blocks.{n}.{end}" for n in range(int(model.cfg.n_layers))]
        if all(name in model.hook_dict for name in names):
            return names
    raise ValueError("the model has no hooks of the residual stream after its blocks")


def _distance(
    original: Float[Tensor, "batch pos d"],
    kept: Bool[Tensor, "batch pos"],
    total: Float[Tensor, "1"],
) -> Callable[..., None]:
    """A hook that adds up the squared distance to the original, over its squared norm."""

    def measure(stream: Tensor, hook: Any) -> None:
        here = kept.to(stream.device)
        before = original.to(stream.device)[here].float()
        error = (stream[here].float() - before).square().sum(-1) / before.square().sum(-1)
        total.add_(error.sum().cpu())

    return measure
