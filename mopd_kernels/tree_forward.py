"""Running a transformers decoder over a prefix tree, and telling when it cannot be.

For one forward the model's attention implementation is `tree_attention`; afterwards its config is as it was, so
`generate` and plain forwards are unaffected. Models whose layers cannot follow a tree run one sequence at a time.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .model_heads import unwrapped
from .prefix_tree import PrefixTree
from .tree_attention import KERNELS, NAME, TreePlan, tree_attention, tree_mask

logger = logging.getLogger(__name__)

# Rows an MLP sees at a time: activations of a few MB, still long enough for full-speed matrix products.
MLP_ROWS = 512


def decoder_of(model: nn.Module) -> nn.Module:
    """The trunk that turns token ids into hidden states, without the lm_head; adapters stay inside it, wrappers such
    as DDP do not."""
    model = unwrapped(model, "get_decoder")
    get_decoder: Any = getattr(model, "get_decoder", None)
    return model if get_decoder is None else get_decoder()


def forward_tree(model: nn.Module, tree: PrefixTree, *, kernel: str = "auto") -> Tensor:  # (T, hidden size)
    """Final hidden states of every row of `tree`. See `PrefixTree.forward`."""
    trunk = decoder_of(model)
    device = next(trunk.parameters()).device
    if kernel == "auto":
        kernel = "flex" if device.type == "cuda" else "sdpa"
    if kernel not in KERNELS:
        raise ValueError(f"expected kernel to be 'auto' or one of {sorted(KERNELS)}, got {kernel!r}")
    reason = why_not(trunk, tree)
    if reason is None:
        plan = TreePlan(tree, kernel)
        with _tree_implementation(trunk), _sliced_mlps(trunk, device):
            hidden = trunk(
                input_ids=tree.ids[None].to(device),
                position_ids=tree.positions[None].to(device),
                use_cache=False,
                tree_plan=plan,
            ).last_hidden_state[0]
        config: Any = trunk.config
        layers = config.num_hidden_layers
        if plan.calls >= layers:
            return hidden
        reason = f"only {plan.calls} of its {layers} layers go through transformers' attention interface"
    _log_once(type(trunk).__name__, reason)
    return _one_by_one(trunk, tree)


def why_not(trunk: nn.Module, tree: PrefixTree) -> str | None:
    """Why `trunk` cannot follow this tree, or None if nothing speaks against it."""
    config = getattr(trunk, "config", None)
    if getattr(trunk, "_is_stateful", False):
        return "it is recurrent"
    if config is None or not getattr(trunk, "_supports_attention_backend", False):
        return "its attention does not go through transformers' attention interface"
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        return f"it has layers of type {', '.join(sorted(others))}"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    dropout = max(getattr(config, name, None) or 0.0 for name in names)
    if trunk.training and dropout:
        return f"it trains with attention dropout {dropout}"
    _check_rope(config, tree)
    return None


def _check_rope(config: Any, tree: PrefixTree) -> None:
    """ValueError where the length of a whole sequence changes the rotary embedding of its prefix.

    Then sequences have no common hidden states, packed or not: "dynamic" scales with the length past a limit, and
    "longrope" switches frequencies at it.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):
        kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
        if kind not in ("dynamic", "longrope"):
            continue
        limit = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        lengths = [tree.length(i) for i in range(len(tree.spans))]
        shortest, longest = min(lengths), max(lengths)
        if longest > limit and (shortest <= limit if kind == "longrope" else shortest != longest):
            raise ValueError(
                f"{kind} rotary embeddings make prefixes depend on the sequence length past {limit} "
                f"tokens, got lengths from {shortest} to {longest}: run without a tree"
            )


@functools.cache
def _log_once(model: str, reason: str) -> None:
    logger.warning("%s cannot follow a prefix tree (%s): running one sequence at a time", model, reason)


def _one_by_one(trunk: nn.Module, tree: PrefixTree) -> Tensor:  # (T, hidden size)
    """Each sequence on its own; a shared row is taken from the first sequence that has it."""
    device = next(trunk.parameters()).device
    done, parts, order = torch.zeros(tree.unique_tokens, dtype=torch.bool), [], []
    for i in range(len(tree.spans)):
        rows = tree.rows(i).cpu()
        new = ~done[rows]
        if not new.any():
            continue
        ids = tree.ids[rows.to(tree.ids.device)].to(device)
        output = trunk(input_ids=ids[None], use_cache=False)
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
        parts.append(hidden[0][int(new.nonzero()[0]) :])  # what is new is a suffix
        order.append(rows[new])
        done[rows] = True
    return torch.cat(parts).index_select(0, torch.cat(order).argsort().to(device))


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, tree_attention)
    AttentionMaskInterface.register(NAME, tree_mask)


@contextmanager
def _sliced_mlps(trunk: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, on CPU and without gradients, modules named `mlp` see MLP_ROWS rows at a time.

    One long packed sequence would otherwise stream activations of T x intermediate size through memory, where
    batches of a few short sequences stay in cache; this also lowers peak memory. MLPs act on each row alone.
    """
    mlps = []
    if device.type == "cpu" and not torch.is_grad_enabled():
        mlps = [m for name, m in trunk.named_modules() if name.endswith(".mlp") and "forward" not in vars(m)]

    def sliced(forward: Callable) -> Callable:
        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if hidden.dim() != 3 or hidden.shape[1] <= MLP_ROWS or args or kwargs:
                return forward(hidden, *args, **kwargs)
            first, *rest = hidden.split(MLP_ROWS, dim=1)
            part = forward(first)
            if not isinstance(part, Tensor):  # experts that also return their routing: whole, as they expect
                return forward(hidden)
            return torch.cat([part, *(forward(rows) for rows in rest)], dim=1)

        return run

    for module in mlps:
        module.forward = sliced(module.forward)
    try:
        yield
    finally:
        for module in mlps:
            del module.forward


@contextmanager
def _tree_implementation(trunk: nn.Module) -> Iterator[None]:
    """Within, every config of `trunk` selects the tree's attention; afterwards all is as it was.

    A checkpointed layer runs again in backward, after this context has ended, so checkpoint functions get a layer
    that enters it again. `checkpoint_fn` is the one of torch's CheckpointWrapper.
    """
    _register()
    found: list[Any] = [module.config for module in trunk.modules() if hasattr(module, "config")]
    configs = list({id(config): config for config in found}.values())

    @contextmanager
    def selected() -> Iterator[None]:
        before = [config._attn_implementation_internal for config in configs]
        for config in configs:
            config._attn_implementation_internal = NAME
        try:
            yield
        finally:
            for config, name in zip(configs, before, strict=True):
                config._attn_implementation_internal = name

    def reentering(checkpoint: Callable) -> Callable:
        return lambda function, *args, **kwargs: checkpoint(selected()(function), *args, **kwargs)

    names = ("_gradient_checkpointing_func", "checkpoint_fn")
    patched = [(m, name, vars(m)[name]) for m in trunk.modules() for name in names if name in vars(m)]
    for module, name, checkpoint in patched:
        setattr(module, name, reentering(checkpoint))
    try:
        with selected():
            yield
    finally:
        for module, name, checkpoint in patched:
            setattr(module, name, checkpoint)
