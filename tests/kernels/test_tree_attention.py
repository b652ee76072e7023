"""A forward over the tree against one forward per sequence, for tiny models of every family."""

import functools
import logging

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from mopd_kernels import tree_attention, tree_forward
from mopd_kernels.prefix_tree import PrefixTree
from mopd_kernels.tree_attention import KERNELS
from mopd_kernels.tree_attention_cuda import varlen_reference, varlen_reference_backward

VOCAB = 50
SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
FULL = "full_attention"
WINDOW = 6  # shorter than most paths below
FAMILIES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2_sliding": ("Qwen2", dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=8)),
    "mistral": ("Mistral", dict(sliding_window=WINDOW, head_dim=6)),
    "gemma2": ("Gemma2", dict(sliding_window=WINDOW, head_dim=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=5)),
    "gemma3": ("Gemma3Text", dict(sliding_window=WINDOW, head_dim=8, layer_types=["sliding_attention"] * 2 + [FULL])),
    "phi": ("Phi", dict(hidden_size=32, partial_rotary_factor=0.5, resid_pdrop=0.0)),
    "phi3": ("Phi3", dict(sliding_window=WINDOW, resid_pdrop=0.0)),
    "gpt_oss": (
        "GptOss",
        dict(
            sliding_window=WINDOW,
            head_dim=8,
            num_local_experts=2,
            num_experts_per_tok=1,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    ),
}


def tiny(family, **changes):
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SMALL | options | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")._from_config(config)
    with torch.no_grad():  # norms and sinks start at constants, and attention too flat to notice a wrong key
        for name, weight in model.named_parameters():
            weight.add_(torch.randn_like(weight) * (0.3 if "norm" in name or "sink" in name else 0.15))
    return model.train()


def group(seed=0):
    """Two prompts; branches at several depths, a duplicate, a prefix of another sequence, an odd one out."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(3, VOCAB, (n,), generator=generator)

    prompt, peer, other = draw(9), draw(5), draw(4)
    sequences = [torch.cat([prompt, peer, draw(n)]) for n in (7, 3, 5)]
    sequences += [torch.cat([prompt, draw(6)]), torch.cat([prompt, peer]), sequences[0].clone()]
    return sequences + [torch.cat([other, draw(n)]) for n in (2, 8)] + [draw(1)]


def loss_of(hidden_states):
    """Weighs every element of every sequence differently."""
    total = 0.0
    for i, hidden in enumerate(hidden_states):
        generator = torch.Generator().manual_seed(100 + i)
        total = total + (hidden * torch.randn(hidden.shape, generator=generator, dtype=hidden.dtype)).sum()
    return total


def plain(model, sequences):
    return [model.get_decoder()(input_ids=tokens[None], use_cache=False).last_hidden_state[0] for tokens in sequences]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def close(actual, expected, tolerance):
    scale = expected.abs().max().item()
    assert (actual - expected).abs().max().item() <= tolerance * scale, (actual - expected).abs().max().item() / scale


def check(model, sequences, kernel="auto", tolerance=1e-5, backward=True):
    expected = plain(model, sequences)
    tree = PrefixTree.pack(sequences)
    tree.forward(model, kernel=kernel)
    actual = [tree.hidden_of(i) for i in range(len(sequences))]
    for one, other in zip(actual, expected, strict=True):
        close(one, other, tolerance)
    if backward:
        of_plain, of_tree = gradients(model, loss_of(expected)), gradients(model, loss_of(actual))
        assert of_tree.keys() == of_plain.keys()
        for name, gradient in of_plain.items():
            close(of_tree[name], gradient, 10 * tolerance)


@pytest.fixture(autouse=True)
def no_fallback(request, monkeypatch):
    """Equality must not come from running one sequence at a time."""
    if "fallback" not in request.node.name:
        monkeypatch.setattr(tree_forward, "_one_by_one", lambda *_: pytest.fail("fell back"))


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_equal_one_forward_per_sequence(family):
    model = tiny(family)
    check(model, group())
    assert model.config._attn_implementation != tree_attention.NAME


def test_float64_agrees_to_its_own_precision():
    check(tiny("phi").double(), group(), tolerance=1e-13)  # the others have norms in float32


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_chunks_of_queries_change_nothing(family, chunk, monkeypatch):
    monkeypatch.setattr(tree_attention, "CHUNK", chunk)
    check(tiny(family), group())


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_oss"])
@torch.no_grad()
def test_slices_of_mlp_rows_change_nothing(family, monkeypatch):
    monkeypatch.setattr(tree_forward, "MLP_ROWS", 4)
    model, seen = tiny(family), []
    mlp = model.model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    linear = next((m for m in mlp.modules() if isinstance(m, torch.nn.Linear)), None)
    if linear is not None:
        linear.register_forward_pre_hook(lambda module, inputs: seen.append(-inputs[0].shape[1]))
    check(model, group(), backward=False)
    rows = PrefixTree.pack(group()).unique_tokens
    assert rows in seen
    assert linear is None or seen[seen.index(rows) + 1] == -4
    assert "forward" not in vars(mlp)


token_lists = st.lists(st.lists(st.integers(3, 4), min_size=1, max_size=12), min_size=1, max_size=7)
cached = functools.cache(tiny)
UNCOMPILED = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@UNCOMPILED
@given(token_lists, st.sampled_from(["llama", "gemma2"]), st.sampled_from(["sdpa", "reference", "flex"]))
@settings(max_examples=40, deadline=None)
def test_any_tree_gives_the_hidden_states_of_its_sequences(lists, family, kernel):
    kernel = "sdpa" if family == "gemma2" and kernel == "reference" else kernel  # no sliding windows there
    model = cached(family)
    with torch.no_grad():
        check(model, [torch.tensor(tokens) for tokens in lists], kernel, backward=False)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_levels_merged_by_logsumexp_give_the_same_gradients(family):
    window = {} if family == "llama" else {"sliding_window": 64}
    check(tiny(family, **window), group(), kernel="reference")


@UNCOMPILED
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@torch.no_grad()
def test_flex_mask_and_softcap_give_the_same_hidden_states(family):
    check(tiny(family), group(), kernel="flex", backward=False)  # flex has no backward on CPU


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("causal", [False, True])
def test_varlen_reference_backward_is_the_gradient_of_its_forward(softcap, causal):
    torch.manual_seed(0)
    q, k, v = (torch.randn(7, heads, 4, dtype=torch.double, requires_grad=True) for heads in (4, 2, 2))
    edges = torch.tensor([0, 3, 7], dtype=torch.int32)
    arguments = (edges, edges, 4, 4)
    out, lse, _ = varlen_reference(q, k, v, *arguments, causal=causal, softcap=softcap, return_attn_probs=True)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), grad)
    actual = [torch.empty_like(x) for x in (q, k, v)]
    with torch.no_grad():
        options = (0.0, 0.5, causal, -1, -1, softcap, None, False)
        varlen_reference_backward(grad, q, k, v, out, lse, *actual, *arguments, *options)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
    scores = 0.5 * torch.einsum("nhd,mhd->hnm", q[:3], k[:3].repeat_interleave(2, 1))
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores + (torch.full((3, 3), float("-inf"), dtype=torch.double).triu(1) if causal else 0.0)
    torch.testing.assert_close(lse[:, :3], scores.logsumexp(-1))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_with_the_tree(reentrant):
    model = tiny("llama")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    before = [layer._gradient_checkpointing_func for layer in model.model.layers]
    check(model, group())
    assert [layer._gradient_checkpointing_func for layer in model.model.layers] == before


def test_checkpoint_wrapper_recomputes_with_the_tree():
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    model = tiny("llama")
    reference = tiny("llama")
    model.model.layers = torch.nn.ModuleList([wrapper.checkpoint_wrapper(layer) for layer in model.model.layers])
    tree = PrefixTree.pack(group())
    expected = gradients(reference, loss_of(plain(reference, group())))
    tree.forward(model)
    actual = gradients(model, loss_of([tree.hidden_of(i) for i in range(len(tree.spans))]))
    for name, gradient in actual.items():
        close(gradient, expected[name.replace("_checkpoint_wrapped_module.", "")], 1e-4)


def test_generation_and_nested_configs_are_left_as_they_were():
    model = tiny("llama", attn_implementation="eager").eval()
    prompt = group()[0][None]
    before = model.generate(prompt, max_new_tokens=4, do_sample=False)
    PrefixTree.pack(group()).forward(model)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), before)


def test_all_layers_share_one_plan():
    model, tree = tiny("gemma2"), PrefixTree.pack(group())
    seen = []
    original = KERNELS["sdpa"]

    def spy(query, key, value, plan, *, window, **options):
        out = original(query, key, value, plan, window=window, **options)
        seen.append((window, plan.layout(window, query)[2]))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KERNELS, "sdpa", spy)
        tree.forward(model)
    assert [window for window, _ in seen] == [WINDOW, None, WINDOW]
    assert seen[0][1] is seen[2][1]


def recurrent():
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2, expand=1)
    return transformers.MambaForCausalLM(config), "recurrent"


def convolutional():
    config = transformers.Lfm2Config(**SMALL | {"num_hidden_layers": 2}, layer_types=["conv", "full_attention"])
    return transformers.Lfm2ForCausalLM(config), "layers of type conv"


def with_dropout():
    return tiny("llama", attention_dropout=0.1).train(), "attention dropout 0.1"


def bypassing():
    """One layer computes attention by itself, which no config tells."""
    model = tiny("llama")
    inner = model.model.layers[1].self_attn
    inner.forward = lambda hidden_states, **_: (hidden_states, None)
    return model, "only 2 of its 3 layers"


@pytest.mark.parametrize("make", [recurrent, convolutional, with_dropout, bypassing])
def test_fallback_runs_each_sequence_and_logs_once(make, caplog):
    tree_forward._log_once.cache_clear()
    model, reason = make()
    sequences = group()
    tree = PrefixTree.pack(sequences)
    with caplog.at_level(logging.WARNING, logger="mopd_kernels"):
        for _ in range(2):
            tree.forward(model)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("mopd_kernels")]
    assert len(lines) == 1
    assert reason in lines[0]
    if "dropout" not in reason:
        check(model, sequences)


@pytest.mark.parametrize(
    ("kind", "lengths", "refused"),
    [
        ("dynamic", (9, 14), False),
        ("dynamic", (9, 20), True),
        ("dynamic", (20, 20), False),
        ("longrope", (9, 14), False),
        ("longrope", (9, 20), True),
        ("longrope", (19, 20), False),
    ],
)
def test_rotary_embeddings_that_depend_on_the_length(kind, lengths, refused):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 16}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 2.5, 3.0]}
    model = tiny("llama", hidden_size=32, rope_parameters=rope, max_position_embeddings=16)
    prompt, tail = group()[0][:8], torch.arange(3, 20)
    sequences = [torch.cat([prompt, tail[i : i + n - 8]]) for i, n in enumerate(lengths)]
    if refused:
        message = f"{kind} .* past 16 tokens, got lengths from {min(lengths)} to {max(lengths)}"
        with pytest.raises(ValueError, match=message):
            PrefixTree.pack(sequences).forward(model)
    else:
        check(model, sequences)


def test_a_wrapper_such_as_ddp_is_unwrapped():
    model = tiny("llama")
    wrapper = torch.nn.Module()
    wrapper.module = model
    tree = PrefixTree.pack(group())
    with torch.no_grad():
        assert torch.equal(tree.forward(wrapper), tree.forward(model))


def test_misuse_is_named():
    model, tree = tiny("mistral"), PrefixTree.pack(group())
    with pytest.raises(ValueError, match=r"expected kernel .* got 'fast'"):
        tree.forward(model, kernel="fast")
    with pytest.raises(ValueError, match=r"longest path, 21, .* got window=6"):
        tree.forward(model, kernel="reference")
    with pytest.raises(ImportError, match=r"flash-attn >= 2.7"):
        tree.forward(tiny("llama"), kernel="flash")
    assert model.config._attn_implementation != tree_attention.NAME
    model.config._attn_implementation_internal = tree_attention.NAME
    with pytest.raises(ValueError, match=r"only runs inside PrefixTree.forward"):
        model(group()[0][None])
