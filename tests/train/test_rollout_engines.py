"""Rollout engines without vLLM: refusals, conversion of its answers, weights by name, the trainer's own sampler."""

from __future__ import annotations

import re
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from mopd_kernels import LMHead
from mopd_train import adapters
from mopd_train.config import Config, ModelConfig, validate
from mopd_train.distributed import Ranks
from mopd_train.learn import Totals
from mopd_train.models import load_model
from mopd_train.objectives import Example, Loss, TokenBatch
from mopd_train.objectives.batch import engine_gap
from mopd_train.rollout import Prompt, Rollout
from mopd_train.rollout_engines import (
    TransformersRollouts,
    build_rollout_engine,
    check_rollout_engine,
    colocate,
    serve,
    weights,
)
from mopd_train.rollout_engines.colocate import to_rollouts
from mopd_train.rollout_engines.server import choices_to_rollouts
from mopd_train.sampler import Sampling, sample

SAMPLING = Sampling(3, 6, 0.9, 0.95, 64)
PROMPTS = [Prompt([{"role": "user", "content": str(ids)}], ids, {}) for ids in ([1, 5, 6], [1, 9])]


@pytest.fixture
def model(tiny_model):
    return load_model(str(tiny_model))


def test_transformers_engine_is_the_sampler_bit_for_bit(model, tokenizer):
    engine = build_rollout_engine(Config(), model, tokenizer)
    assert isinstance(engine, TransformersRollouts)
    groups = engine.generate(PROMPTS, SAMPLING, [2], 7)
    assert [[r.token_ids for r in g.rollouts] for g in groups] == sample(
        model, [p.token_ids for p in PROMPTS], SAMPLING, [2], int(tokenizer.pad_token_id), 7
    )
    assert [g.prompt for g in groups] == PROMPTS
    assert all(r.logprobs is None and r.text == tokenizer.decode(r.token_ids, skip_special_tokens=True)
               for g in groups for r in g.rollouts)  # fmt: skip


def test_transformers_engine_samples_from_the_model_it_was_given_last(model, tiny_model, tokenizer):
    engine = build_rollout_engine(Config(), load_model(str(tiny_model)), tokenizer)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    before = engine.generate(PROMPTS, SAMPLING, [2], 7)
    engine.update_weights(model)
    assert engine.generate(PROMPTS, SAMPLING, [2], 7) != before
    assert engine.generate(PROMPTS, SAMPLING, [2], 7) == TransformersRollouts(model, tokenizer).generate(
        PROMPTS, SAMPLING, [2], 7
    )


def test_sampling_is_wrapped_in_what_the_run_asks_for(model, tokenizer):
    seen = []

    @contextmanager
    def around():
        seen.append("in")
        yield
        seen.append("out")

    rollouts = build_rollout_engine(Config(), model, tokenizer, around)
    hook = model.register_forward_pre_hook(lambda *_: seen.append("forward"))
    whole = rollouts.generate(PROMPTS, SAMPLING, [2], 7)
    hook.remove()
    assert (seen[0], seen[-1]) == ("in", "out")
    assert set(seen[1:-1]) == {"forward"}
    assert rollouts.generate(PROMPTS[1:], SAMPLING, [2], 8) == whole[1:], "cut over processes"
    seen.clear()
    assert rollouts.generate([], SAMPLING, [2], 9) == []
    assert seen == ["in", "out"], "a process without prompts keeps in step with the others"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vllm_mode", "remote", "expected rollout.vllm_mode in ['colocate', 'server'], got 'remote'"),
        ("vllm_gpu_memory_utilization", 1.5, "vllm_gpu_memory_utilization in (0, 1], got 1.5"),
        ("vllm_server_port", 70000, "vllm_server_port in 1 ... 65535, got 70000"),
        ("vllm_server_timeout", 0.0, "vllm_server_timeout > 0 s, got 0.0"),
    ],
)
def test_bad_settings_are_refused(field, value, message):
    config = Config()
    setattr(config.rollout, field, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(config)


def vllm_config(mode: str, **rollout: object) -> Config:
    config = Config()
    config.rollout.use_vllm, config.rollout.vllm_mode = True, mode
    for key, value in rollout.items():
        setattr(config.rollout, key, value)
    return config


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(colocate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"vllm_mode=colocate needs vLLM.*pip install 'mopd\[vllm\]'.*vllm_mode server"
    ):
        check_rollout_engine(vllm_config("colocate"))
    with pytest.raises(ImportError, match=r"mopd serve needs vLLM"):
        serve.serve(Config(), [])


def test_an_unreachable_server_is_named_within_the_timeout(caplog):
    with socket.socket() as closed:  # bound, not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        config = vllm_config("server", vllm_server_port=port, vllm_server_timeout=0.3)
        with caplog.at_level("INFO"), pytest.raises(ConnectionError) as error:
            check_rollout_engine(config)
    assert f"no vLLM server answers at 127.0.0.1:{port} within 0.3 s" in str(error.value)
    assert "mopd serve" in str(error.value)
    assert caplog.text.count("waiting for the vLLM server") == 1


@dataclass
class Completion:
    """What is read of vllm.outputs.CompletionOutput."""

    index: int
    token_ids: tuple[int, ...]
    logprobs: list[dict[int, SimpleNamespace]] | None


def lp(**values: float) -> list[dict[int, SimpleNamespace]]:
    return [{int(token[1:]): SimpleNamespace(logprob=value)} for token, value in values.items()]


def test_request_outputs_become_rollouts(tokenizer):
    output = SimpleNamespace(
        outputs=[Completion(1, (70, 90), lp(t70=-0.5, t90=-3.0)), Completion(0, (40, 2), lp(t40=0.0, t2=-1.0))]
    )
    assert to_rollouts(output, tokenizer, [2]) == [
        Rollout([40, 2], tokenizer.decode([40]), True, logprobs=[0.0, -1.0]),
        Rollout([70, 90], tokenizer.decode([70, 90]), False, logprobs=[-0.5, -3.0]),
    ]
    with pytest.raises(ValueError, match="0 log-probs for 1 tokens"):
        to_rollouts(SimpleNamespace(outputs=[Completion(0, (4,), None)]), tokenizer, [2])
    with pytest.raises(ValueError, match="1 token ids and 0 log-probs"):
        choices_to_rollouts([{"index": 0, "token_ids": [4], "logprobs": None}], tokenizer, [2])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft of transformers
def test_lora_weights_are_merged_without_touching_the_base(model):
    """W + (alpha / r) B A for adapted layers, the trained copy for whole modules, the rest as it is."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])
    adapted = peft.get_peft_model(model, lora)
    torch.manual_seed(0)
    trained = {name: torch.nn.init.normal_(p).detach() for name, p in adapted.named_parameters() if p.requires_grad}
    for name in expected:
        stem = "base_model.model." + name.removesuffix("weight")
        if f"{stem}lora_A.default.weight" in trained:
            factors = trained[f"{stem}lora_B.default.weight"], trained[f"{stem}lora_A.default.weight"]
            expected[name] = expected[name] + 3.0 * factors[0] @ factors[1]
        expected[name] = trained.get(f"{stem}modules_to_save.default.weight", expected[name])
    kept = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    assert len(trained) == 2 * 2 * 2 + 5  # factors of two projections in two layers; five norms
    torch.testing.assert_close(dict(weights.named_weights(adapted)), expected)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in adapted.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft of transformers
def test_the_students_adapter_is_merged_and_not_the_teachers(model):
    pytest.importorskip("peft", reason="peft is not installed")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = ModelConfig(lora_r=2, lora_alpha=6, lora_target_modules=["q_proj"])
    adapters.add(model, settings, ema=True, seed=0)
    factors = {name: torch.nn.init.normal_(p.data) for name, p in model.named_parameters() if "lora_" in name}
    assert {name.split(".")[-2] for name in factors} == {adapters.STUDENT, adapters.TEACHER}
    for name in expected:
        stem = name.removesuffix("weight")
        if f"{stem}lora_A.default.weight" in factors:
            added = factors[f"{stem}lora_B.default.weight"] @ factors[f"{stem}lora_A.default.weight"]
            expected[name] = expected[name] + 3.0 * added
    torch.testing.assert_close(dict(weights.named_weights(model)), expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft of transformers
def test_other_adapters_than_plain_lora_are_refused(model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"'default' of .*q_proj.* is not plain LoRA"):
        list(weights.named_weights(adapted))


def test_the_server_command_comes_from_the_runs_configuration(tiny_model):
    config = vllm_config("server", vllm_server_port=8123, max_completion_length=100)
    config.model.model_name_or_path, config.data.max_prompt_length = str(tiny_model), 28
    command, environment = serve.serve_command(config, ["--max-model-len", "64"], on_cpu=True)
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    text = " ".join(command)
    for part in (str(tiny_model), "--port 8123", "--max-model-len 128", "--logprobs-mode processed_logprobs"):
        assert part in text
    assert text.endswith("--max-model-len 64")
    assert "--enforce-eager" in command
    assert "--enforce-eager" not in serve.serve_command(config, [], on_cpu=False)[0]


def test_logprob_gap_is_a_mean_over_tokens_under_the_policy_that_was_to_sample():
    """Over micro-batches of unlike length; later updates on the same rollouts do not count as a gap."""
    given = [[-1.0, -2.0], [-0.5], [-0.25]]
    rollouts = [Rollout([1] * len(values), "", True, logprobs=values) for values in given]
    examples = [Example(0, [1], [1], rollout) for rollout in rollouts]
    head = LMHead(torch.zeros(4, 3))
    ours = [torch.tensor([-1.5, -2.0, -0.25]), torch.tensor([-0.75])]
    totals = Totals()
    for iteration in range(2):
        for batch, logprobs in zip((examples[:2], examples[2:]), ours, strict=True):
            tokens = TokenBatch(batch, torch.zeros(len(logprobs), 3), head, 1.0)
            moved = logprobs - 3.0 * iteration
            totals.add(tokens, Loss(torch.zeros(()), torch.zeros(len(logprobs)), moved, {}), 1, None)
        for example, logprobs in zip(examples, torch.cat(ours).split([2, 1, 1]), strict=True):
            example.old_logprobs = logprobs
    metrics = totals.metrics(Ranks(), 2)
    assert metrics["rollout/logprob_gap"] == pytest.approx((0.5 + 0 + 0.25 + 0.5) / 4)
    rollouts[0].logprobs = None
    assert engine_gap(TokenBatch(examples, torch.zeros(4, 3), head, 1.0), torch.cat(ours)) == {}
