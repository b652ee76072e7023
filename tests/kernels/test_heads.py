"""LMHead.from_model against the models' own logits, and teachers mixed from heads and hidden states."""

from __future__ import annotations

import pytest
import torch
import transformers

from mopd_kernels import LMHead, contrastive_hidden, linear_divergence, linear_logprobs, trust_region_teacher
from mopd_kernels.losses import LOSSES
from tests.kernels import rank_worker

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 1.5},
    "recurrent_gemma": {"logits_soft_cap": 1.5, "lru_width": 16, "num_hidden_layers": 3},
    "xlstm": {
        **{"output_logit_soft_cap": 1.5, "hidden_size": 64, "embedding_dim": 64, "num_heads": 2, "num_blocks": 1},
        **{"chunkwise_kernel": "chunkwise--native_autograd", "sequence_kernel": "native_sequence__native"},
        "step_kernel": "native",
    },
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "phi": {},  # lm_head with a bias
}


def tiny(kind, **options):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SIZES | options))
    model = transformers.AutoModelForCausalLM.from_config(config)
    if model.lm_head.bias is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    return model.eval()


@pytest.mark.parametrize("kind", MODELS)
def test_from_model_gives_the_models_own_logits(kind):
    model = tiny(kind, **MODELS[kind])
    ids = torch.randint(3, 50, (2, 7))
    labels = torch.randint(0, 50, (2, 7))
    hidden = model.base_model(ids, use_cache=False).last_hidden_state
    ours = linear_logprobs(hidden, LMHead.from_model(model), labels).logprobs
    expected = model(ids, use_cache=False).logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    weight = model.get_output_embeddings().weight
    grads = [torch.autograd.grad(value.sum(), weight, retain_graph=True)[0] for value in (ours, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_a_wrapped_model_is_unwrapped():
    model = tiny("llama")
    wrapper = torch.nn.Module()
    wrapper.module = model
    assert LMHead.from_model(wrapper).weight is model.lm_head.weight


def test_models_without_a_linear_head_are_refused():
    with pytest.raises(ValueError, match="LlamaModel has no Linear lm_head"):
        LMHead.from_model(tiny("llama").model)
    model = tiny("llama")
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(16, 50))
    with pytest.raises(ValueError, match="gave Sequential"):
        LMHead.from_model(model)


def with_peft_warnings(test):
    """peft warns of tied weights and calls what transformers is about to rename; neither is ours to change."""
    for category in ("UserWarning", "FutureWarning"):
        test = pytest.mark.filterwarnings(f"ignore::{category}")(test)
    return test


def lora(**options):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["lm_head"], init_lora_weights=False, **options)
    return peft.get_peft_model(tiny("llama"), config)


@with_peft_warnings
def test_lora_on_lm_head_is_trained():
    model = lora()
    ids, labels = torch.randint(3, 50, (1, 6)), torch.randint(0, 50, (1, 6))
    hidden = model.base_model.model.model(ids).last_hidden_state
    ours = linear_logprobs(hidden, LMHead.from_model(model), labels).logprobs
    expected = model(ids).logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert len(adapters) == 2
    for mine, theirs in zip(*(torch.autograd.grad(v.sum(), adapters) for v in (ours, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@with_peft_warnings
@pytest.mark.parametrize(
    ("options", "message"), [({"lora_dropout": 0.1}, "lora_dropout=0"), ({"use_dora": True}, "plain LoRA")]
)
def test_lora_that_is_not_one_matrix_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LMHead.from_model(lora(**options).train())


def test_a_split_weight_becomes_a_shard(tmp_path):
    model, hidden = rank_worker.split_model()
    labels = torch.arange(6) % 37
    whole = linear_logprobs(hidden, LMHead.from_model(model), labels).logprobs
    (expected,) = torch.autograd.grad(whole.sum(), model.lm_head.weight)
    results = rank_worker.start(2, rank_worker.from_split_model, [None], tmp_path)
    for rank, (result,) in enumerate(results):
        if isinstance(result, Exception):
            raise result
        logprobs, start, grad = result
        assert start == (0, 19)[rank]
        torch.testing.assert_close(logprobs, whole.detach())
        torch.testing.assert_close(grad, expected[(0, 19)[rank] : (19, 37)[rank]])


def test_a_fully_sharded_head_is_refused_and_the_ways_out_are_right(tmp_path):
    model = rank_worker.SmallModel()
    x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))
    (sum(model(part, loss=True) for part in x) / 2).backward()
    for (outcome,) in rank_worker.start(2, rank_worker.fully_sharded, [None], tmp_path):
        if isinstance(outcome, Exception):
            raise outcome
        refusal, *ways = outcome
        assert "model.unshard()" in refusal
        for grads in ways:
            for grad, parameter in zip(grads, model.parameters(), strict=True):
                torch.testing.assert_close(grad, parameter.grad)


def distribution(head, hidden):
    z = hidden @ head.weight.T if head.bias is None else hidden @ head.weight.T + head.bias
    return head.scale * z


def test_contrastive_hidden_mixes_logits():
    head = LMHead(torch.randn(20, 5, dtype=torch.float64), torch.randn(20, dtype=torch.float64), scale=0.7)
    success, failure = torch.randn(2, 4, 5, dtype=torch.float64)
    mixed = distribution(head, contrastive_hidden(head, success, failure, 0.3))
    torch.testing.assert_close(mixed, 1.3 * distribution(head, success) - 0.3 * distribution(head, failure))
    with pytest.raises(ValueError, match=r"without a softcap.*30"):
        contrastive_hidden(LMHead(head.weight, softcap=30.0), success, failure, 0.3)


@pytest.mark.parametrize("shared", [False, True])
def test_trust_region_teacher_mixes_logits(shared):
    make = {"dtype": torch.float64}
    reference = LMHead(torch.randn(20, 5, **make), torch.randn(20, **make), scale=0.5)
    student = LMHead(reference.weight if shared else torch.randn(22, 5, **make), scale=2.0, vocab_size=20)
    student_hidden, reference_hidden = torch.randn(2, 4, 5, **make)
    head, hidden = trust_region_teacher(reference, reference_hidden, student, student_hidden, 0.25)
    z_s = distribution(student, student_hidden)[:, :20]
    z_t = 0.75 * distribution(reference, reference_hidden) + 0.25 * z_s
    out = linear_divergence(student_hidden, student, hidden, head, alpha=1.0)
    torch.testing.assert_close(out.per_token, LOSSES["divergence"](z_s, z_t, 1.0))
    assert head.weight.size(1) == (5 if shared else 10)
