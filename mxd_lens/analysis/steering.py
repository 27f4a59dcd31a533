"""Steering: edit the activations of single experts while the language model runs.

And what that makes it write, judged by how coherent samples are among each other and how fluent to
the original model (Oldfield et al. 2025, arXiv 2505.21364)::

    amounts = calibrate_strength(sae, experts, 1.0, x, y_norm)
    generate_steered(model, sae, experts, amounts)
    evaluate_steering(model, sae, experts, [0.5, 1, 2], x, y_norm)
    evaluate_steering(model, sae, experts, [100.0], **PAPER)

What an MxD's expert then writes depends on the token: it scales what the hidden units say there.
With ``directions=steering_directions(sae, experts, x)`` it writes, on any text, what its activation
tells of the MLP's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.saes.sae import SAE
from sae_lens.util import extract_layer_from_tlens_hook_name, temporary_seed
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformers import Cache

from mxd_lens.analysis.judge import Judge, Scores
from mxd_lens.fields import Count, EachOnce, Finite, Index, NotNegative, Probability, check
from mxd_lens.layers import layer_of
from mxd_lens.models.site import hooks_of, special_tokens
from mxd_lens.models.splice import get_mlp

Amount = float | Float[Tensor, "n_experts"] | Float[Tensor, "batch n_experts"]

PAPER: dict[str, Any] = {
    "paper": True,
    "prompt": "Let's talk about ",
    "n_samples": 10,
    "n_tokens": 32,
    "temperature": 1.0,
    "top_p": 0.1,
}
"""How Oldfield et al. 2025 steer, by an amount of 100; what ``paper`` does is in
`generate_steered`. From their code, ``transcoders/feature-eval/steering.ipynb``."""

_N_UNSTEERED = 16  # sets of unsteered samples, over which their scores are averaged


@contextmanager
def steer(
    model: Any,
    sae: SAE[Any],
    experts: Sequence[int],
    *,
    add: Amount | None = None,
    scale: Amount | None = None,
    clamp: Amount | None = None,
    ablate: bool = False,
    directions: Float[Tensor, "n_experts d_out"] | None = None,
    positions: Sequence[int] | None = None,
) -> Iterator[None]:
    """Edit the activations of some experts in whatever the model computes within the block::

        with splice(model, {6: mxd}), steer(model, mxd, [1234], add=5.0):
            model.generate("I think that")
        with model.saes([mxd], use_error_term=True), steer(model, mxd, [1234], ablate=True):
            logits = model(tokens)      # the original's, plus what the edit changes

    Blocks nest: the inner one edits what the outer one has left. Caches show the edited values.

    Args:
        sae: a layer in place in the model, by `splice`, assignment or ``add_sae``, with or without
            its error term.
        experts: which units, each once.
        add, scale, clamp, ablate: one of these: what is added to an activation, what it is
            multiplied by, what it is set to, or whether it is set to zero. Amounts are one for
            all, [n_experts], or [batch, n_experts]: each row of the batch its own.
        directions: for ``add``: what an activation of 1 is to write to the layer's output at
            every token, such as `steering_directions`, instead of what it would write there.
        positions: which tokens of the sequence, padding and what a key-value cache holds counted
            in; all by default. Negative ones count from the end of what the current forward pass
            reads: during cached generation, -1 is the prompt's last token, then each new one.

    Raises:
        ValueError: not exactly one of the edits, ``directions`` without ``add``, an expert that
            does not exist or is there twice, another shape, or a layer that is not in place.
    """
    edits = {"add": add, "scale": scale, "clamp": clamp, "ablate": 0.0 if ablate else None}
    chosen = {name: amount for name, amount in edits.items() if amount is not None}
    if len(chosen) != 1:
        raise ValueError(
            f"say one of add, scale, clamp and ablate, got {' and '.join(chosen) or 'none'}"
        )
    ((edit, amount),) = chosen.items()
    units = _check_experts(sae, experts)
    if directions is not None and (add is None or len(directions) != len(units)):
        raise ValueError(
            f"directions has one row for each of the {len(units)} experts, and goes with add: got "
            f"{len(directions)} rows, with {edit}"
        )
    amounts = torch.as_tensor(amount)
    if amounts.ndim > 2 or (amounts.ndim and amounts.shape[-1] != len(units)):
        raise ValueError(
            f"{edit} has shape {tuple(amounts.shape)}: for {len(units)} experts give one number, "
            f"[{len(units)}] or [batch, {len(units)}]"
        )
    if not amounts.isfinite().all():
        raise ValueError(f"{edit}={amount}: must be finite")
    layer = _layer_of(model, sae)
    n_past = 0  # tokens before those of the current forward pass

    def read_n_past(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal n_past
        n_past = _n_cached((*args, *kwargs.values()), layer)

    def apply(hook: Any, args: Any, acts: Float[Tensor, "batch pos d"]) -> Tensor:
        if amounts.ndim == 2 and len(amounts) != len(acts):
            raise ValueError(
                f"{edit} has {len(amounts)} rows, the batch that the model reads {len(acts)}"
            )
        by = amounts.to(acts)
        by = by[:, None] if by.ndim == 2 else by
        columns: Any = units.to(acts.device)
        if directions is not None:
            by, columns = by.expand(*by.shape[:-1], len(units)) @ directions.to(acts), slice(None)
        where: tuple[Any, ...] = (..., columns)
        if positions is not None:
            n = acts.shape[-2]
            here = [n + p if p < 0 else p - n_past for p in positions]
            rows = torch.tensor([p for p in here if 0 <= p < n], dtype=torch.long).to(acts.device)
            where = (..., rows if directions is not None else rows[:, None], columns)
        acts = acts.clone()
        if edit == "add":
            acts[where] = acts[where] + by
        elif edit == "scale":
            acts[where] = acts[where] * by
        else:
            acts[where] = by.expand_as(acts[where])
        return acts

    # PyTorch's own hooks: model.reset_hooks() leaves them alone.
    with ExitStack() as hooks:
        if positions is not None:
            before = model.blocks[layer].register_forward_pre_hook(read_n_past, with_kwargs=True)
            hooks.callback(before.remove)
        edited = sae.hook_sae_acts_post if directions is None else sae.hook_sae_recons
        hooks.callback(edited.register_forward_hook(apply).remove)
        yield


def _check_experts(sae: SAE[Any], experts: Sequence[int]) -> Tensor:
    d_sae = sae.cfg.d_sae
    for expert in experts:
        if not 0 <= expert < d_sae:
            raise ValueError(f"no expert {expert}: this layer has experts 0 to {d_sae - 1}")
    if len(set(experts)) < len(experts):
        raise ValueError(f"the same expert twice in {list(experts)}")
    return torch.tensor(list(experts), dtype=torch.long)


def _layer_of(model: Any, sae: SAE[Any]) -> int:
    """The block in which a layer is in place."""
    for i, block in enumerate(model.blocks):
        if any(module is sae for module in block.modules()):
            return i
    for hook_name, attached in getattr(model, "acts_to_saes", {}).items():
        if attached is sae:
            return extract_layer_from_tlens_hook_name(hook_name) or 0
    raise ValueError(
        "this layer is not in place in the model: put it there with mxd_lens.splice(model, "
        "{layer: sae}), or attach it with model.add_sae(sae)"
    )


def _n_cached(inputs: Sequence[Any], layer: int) -> int:
    """Tokens in the key-value cache among a block's inputs, at the start of its forward pass."""
    for value in inputs:
        if isinstance(value, TransformerLensKeyValueCacheEntry):
            return value.past_keys.shape[1]
        if isinstance(value, Cache):
            return value.get_seq_length(layer)
    return 0


def steering_directions(
    sae: SAE[Any], experts: Sequence[int], x: Float[Tensor, "tokens d_in"]
) -> Float[Tensor, "n_experts d_out"]:
    """Output per unit activation: rows of W_dec, or an MxD's W_write, or what activations tell of
    the output on x, non-special tokens, see `Layer.steering_directions`; ValueError if an expert
    does not exist."""
    units = _check_experts(sae, experts).to(sae.device)
    return layer_of(sae).steering_directions(units, x)


def calibrate_strength(
    sae: SAE[Any],
    experts: Sequence[int],
    strength: float,
    x: Float[Tensor, "tokens d_in"],
    y_norm: float,
    *,
    directions: Float[Tensor, "n_experts d_out"] | None = None,
) -> Float[Tensor, "n_experts"]:
    """What to add to each expert's activation for an effect of this strength.

    Args:
        strength: mean norm of the change at the layer's output, over y_norm.
        x: a sample of the layer's inputs, of non-special tokens.
        y_norm: mean norm of the MLP's output.
        directions: see `steer`.

    Raises:
        ValueError: an expert that does not exist or has no effect, a number that is not finite.
    """
    check(Finite, strength=strength, y_norm=y_norm)
    units = _check_experts(sae, experts).to(sae.device)
    known = directions is not None
    norms = directions.norm(dim=-1) if known else layer_of(sae).effect_norms(units, x)
    for expert, norm in zip(experts, norms.tolist(), strict=True):
        if not norm > 0:
            raise ValueError(f"expert {expert} has no effect on the output: its norm is {norm}")
    return strength * y_norm / norms


@torch.no_grad()
def generate_steered(
    model: Any,
    sae: SAE[Any],
    experts: Sequence[int],
    amounts: Float[Tensor, "n_experts"],
    *,
    directions: Float[Tensor, "n_experts d_out"] | None = None,
    prompt: str = "I think that",
    n_samples: int = 1,
    n_tokens: int = 32,
    temperature: float = 1.0,
    top_p: float | None = None,
    paper: bool = False,
    seed: int = 0,
    batch_size: int = 128,
) -> list[list[str]]:
    """What the original model writes while each expert in turn is steered.

    The layer's error term is on: what is changed is the original model, of whatever kind the
    layer is. Special tokens are left as they are, and are never sampled.

    Args:
        model: a HookedSAETransformer or SAETransformerBridge, the layer not in place.
        amounts: added to the expert's activation at every other token of prompt and samples.
        directions: what that writes to the layer's output, see `steer`.
        n_samples, n_tokens: of each expert, of a sample.
        temperature: 0 takes the best token.
        top_p: of the best tokens, the fewest that have more than this probability together are
            sampled from (Holtzman et al. 2020, arXiv 1904.09751); all of them by default.
        paper: as in Oldfield et al. 2025, the layer stands in for the MLP, without its error
            term; the amounts are added at every token, special ones too; and a token's logit
            falls by 1 each time the text has it.
        seed: PyTorch's own random state is left alone.
        batch_size: samples that are generated at the same time, of one expert or of many.

    Returns:
        n_samples texts for each expert, without the prompt.

    Raises:
        ValueError: an expert that does not exist or is there twice, more tokens than the model
            reads, or a setting out of range.
    """
    check(Count, n_samples=n_samples, n_tokens=n_tokens, batch_size=batch_size)
    check(NotNegative, temperature=temperature)
    check(Probability | None, top_p=top_p)
    prompted = model.to_tokens(prompt)  # [1, pos]
    special = special_tokens(model).to(prompted.device)
    ordinary = (~torch.isin(prompted[0], special)).nonzero()[:, 0].tolist()
    n_prompt = prompted.shape[1]
    start = len(model.tokenizer.decode(prompted[0]))
    if n_prompt + n_tokens > model.cfg.n_ctx:
        raise ValueError(
            f"n_tokens={n_tokens} after the prompt's {n_prompt}: this model reads {model.cfg.n_ctx}"
        )
    positions = None if paper else [*ordinary, *range(n_prompt, n_prompt + n_tokens)]
    ids = _check_experts(sae, experts)
    of_row = torch.arange(len(ids)).repeat_interleave(n_samples)
    by_row = amounts.cpu().repeat_interleave(n_samples)

    def forbid_special(unembed: Any, args: Any, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, special.to(logits.device), -torch.inf)

    texts: list[str] = []
    with ExitStack() as context:
        context.enter_context(attached(model, sae, error_term=not paper))
        context.enter_context(temporary_seed(seed))
        context.callback(model.unembed.register_forward_hook(forbid_special).remove)
        progress = context.enter_context(tqdm(total=len(of_row), desc="Generating"))
        for of_batch, by in zip(of_row.split(batch_size), by_row.split(batch_size), strict=True):
            places, place = of_batch.unique(return_inverse=True)
            add = by.new_zeros(len(of_batch), len(places))
            add[torch.arange(len(of_batch)), place] = by
            written = None if directions is None else directions[places.to(directions.device)]
            units = ids[places].tolist()
            with steer(model, sae, units, add=add, directions=written, positions=positions):
                tokens = model.generate(
                    prompted.expand(len(of_batch), -1),
                    max_new_tokens=n_tokens,
                    stop_at_eos=False,
                    temperature=temperature,
                    top_p=top_p,
                    freq_penalty=1.0 if paper else 0.0,
                    verbose=False,
                    return_type="tokens",
                )
            # With the prompt: by itself, some tokenizers' text would lose its first space.
            texts += [text[start:] for text in model.tokenizer.batch_decode(tokens)]
            progress.update(len(of_batch))
    return [texts[i : i + n_samples] for i in range(0, len(texts), n_samples)]


@contextmanager
def attached(model: Any, sae: SAE[Any], error_term: bool = True) -> Iterator[None]:
    """The layer on top of the original model, which its error term makes up for, or in the MLP's
    stead, and on its device; everything restored afterwards."""
    name, before = hooks_of(sae)[1], sae.device
    mlp = get_mlp(model, extract_layer_from_tlens_hook_name(name) or 0)
    bridged = isinstance(model, TransformerBridge)
    if bridged:
        name = model._resolve_hook_name(name)
    parent, _, last = name.rpartition(".")
    hook = attrgetter(name)(model)
    try:
        sae.to(next(mlp.parameters()).device)
        with model.saes([sae], use_error_term=error_term):
            # What a float32 layer gives is float32, whatever the model is.
            in_place: Any = attrgetter(name)(model)
            in_place.register_forward_hook(lambda module, args, out: out.to(args[0].dtype))
            yield
    finally:
        sae.to(before)
        sae.setup()  # its hook points have the model's names
        if isinstance(hook, HookPoint):  # SAELens has put another, which a bridge does not find
            setattr(attrgetter(parent)(model), last, hook)
            if bridged:
                hook.name = name
                model._hook_registry[name] = hook
            else:
                model.setup()


def evaluate_steering(
    model: Any,
    sae: SAE[Any],
    experts: Sequence[int],
    strengths: Sequence[float],
    x: Float[Tensor, "tokens d_in"] | None = None,
    y_norm: float | None = None,
    *,
    directions: Float[Tensor, "n_experts d_out"] | None = None,
    name: str | None = None,
    prompt: str = "I think that",
    n_samples: int = 8,
    n_tokens: int = 32,
    temperature: float = 1.0,
    top_p: float | None = None,
    paper: bool = False,
    seed: int = 0,
    batch_size: int = 128,
    judge: Callable[[list[str]], Scores] | None = None,
    done: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Steer each expert at each strength, and judge what the model writes.

    Args:
        strengths, x, y_norm: see `calibrate_strength`; what is not named: see `generate_steered`.
        paper: strengths are the amounts, too, and x and y_norm are not needed.
        name: the layer's, in the rows; its architecture by default.
        judge: what scores the samples of one expert, anything from texts to numbers by name; a
            `Judge` by default.
        done: what an earlier call has returned or saved: those rows are kept, not made again.
        save: is handed the result so far whenever a strength is finished.

    Returns:
        ``edit`` (``"activation"``, ``"direction"`` with ``directions``, or ``"paper"``) and the
        settings; ``unsteered``: the scores of samples with nothing added; ``rows``, one per expert
        and strength: ``name``, ``expert``, ``strength``, ``amount`` (what was added to the
        activation), the judge's scores, and ``samples``.

    Raises:
        ValueError: an expert that does not exist or has no effect, fewer than two samples for
            a `Judge`, a setting out of range, x and y_norm are missing, ``directions`` with
            ``paper``, or ``done`` has been made with other settings.
    """
    check(EachOnce[Finite], strengths=strengths)
    check(EachOnce[Index], experts=experts)
    if judge is None and n_samples < 2:
        raise ValueError(f"n_samples={n_samples}: coherence needs at least 2 of each expert")
    if paper and directions is not None:
        raise ValueError("the paper raises activations: paper=True goes without directions")
    sampling = {"n_samples": n_samples, "n_tokens": n_tokens, "temperature": temperature}
    settings: dict[str, Any] = {"prompt": prompt, **sampling, "top_p": top_p, "seed": seed}
    edit = "paper" if paper else "activation" if directions is None else "direction"
    said = {"edit": edit, **settings}
    different = [key for key in said if done and done.get(key) != said[key]]
    if different:
        raise ValueError(f"the rows there are were made with other {', '.join(different)}")
    judge = judge or Judge(model, prompt)
    name = name or sae.cfg.architecture()
    experts = list(experts)
    if paper:
        unit_amounts = torch.ones(len(experts))
    elif x is None or y_norm is None:
        raise ValueError("strengths are calibrated by x and y_norm: give both, or paper=True")
    else:
        unit_amounts = calibrate_strength(sae, experts, 1.0, x, y_norm, directions=directions).cpu()

    def generate(places: list[int], amounts: Tensor) -> list[list[str]]:
        return generate_steered(
            model,
            sae,
            [experts[i] for i in places],
            amounts,
            directions=None if directions is None else directions[places],
            **settings,
            paper=paper,
            batch_size=batch_size,
        )

    if done:
        result = {**done, "rows": list(done["rows"])}
    else:
        some = range(min(len(experts), _N_UNSTEERED))
        scores = [judge(samples) for samples in generate([*some], torch.zeros(len(some)))]
        means = {key: sum(score[key] for score in scores) / len(scores) for key in scores[0]}
        result = {**said, "unsteered": means, "rows": []}
    made = {(row["name"], row["expert"], row["strength"]) for row in result["rows"]}
    for strength in strengths:
        missing = [i for i, e in enumerate(experts) if (name, e, strength) not in made]
        if not missing:
            continue
        amounts = strength * unit_amounts[missing]
        texts = generate(missing, amounts)
        made_now = zip(tqdm(missing, desc="Judging"), amounts.tolist(), texts, strict=True)
        for i, amount, samples in made_now:
            row = {"name": name, "expert": experts[i], "strength": strength, "amount": amount}
            result["rows"].append({**row, **judge(samples), "samples": samples})
        if save is not None:
            save(result)
    return result
