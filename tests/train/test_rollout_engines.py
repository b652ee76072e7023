"""Rollout engines without vLLM: refusals, conversion of its answers, weights by name, the trainer's own sampler."""

from __future__ import annotations

import json
import re
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import load_file

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
from mopd_train.rollout_engines.colocate import prompt_seed, to_rollouts
from mopd_train.rollout_engines.server import Server, ServerRollouts, choices_to_rollouts
from mopd_train.sampler import Sampling, sample

SAMPLING = Sampling(3, 6, 0.9, 0.95, 64)


@pytest.fixture(scope="module")
def prompts():
    return [Prompt([{"role": "user", "content": str(ids)}], ids, {}) for ids in ([1, 5, 6], [1, 9])]


@pytest.fixture
def model(tiny_model):
    return load_model(str(tiny_model))


def test_transformers_engine_is_the_sampler_bit_for_bit(model, tokenizer, prompts):
    engine = build_rollout_engine(Config(), model, tokenizer)
    assert isinstance(engine, TransformersRollouts)
    groups = engine.generate(prompts, SAMPLING, [2], 7)
    assert [[r.token_ids for r in g.rollouts] for g in groups] == sample(
        model, [p.token_ids for p in prompts], SAMPLING, [2], int(tokenizer.pad_token_id), 7
    )
    assert [g.prompt for g in groups] == prompts
    assert all(r.logprobs is None and r.text == tokenizer.decode(r.token_ids, skip_special_tokens=True)
               for g in groups for r in g.rollouts)  # fmt: skip


def test_transformers_engine_samples_from_the_model_it_was_given_last(model, tiny_model, tokenizer, prompts):
    engine = build_rollout_engine(Config(), load_model(str(tiny_model)), tokenizer)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    before = engine.generate(prompts, SAMPLING, [2], 7)
    engine.update_weights(model)
    assert engine.generate(prompts, SAMPLING, [2], 7) != before
    assert engine.generate(prompts, SAMPLING, [2], 7) == TransformersRollouts(model, tokenizer).generate(
        prompts, SAMPLING, [2], 7
    )


def test_sampling_is_wrapped_in_what_the_run_asks_for(model, tokenizer, prompts):
    seen = []

    @contextmanager
    def around():
        seen.append("in")
        yield
        seen.append("out")

    rollouts = build_rollout_engine(Config(), model, tokenizer, around)
    hook = model.register_forward_pre_hook(lambda *_: seen.append("forward"))
    whole = rollouts.generate(prompts, SAMPLING, [2], 7)
    hook.remove()
    assert (seen[0], seen[-1]) == ("in", "out")
    assert set(seen[1:-1]) == {"forward"}
    assert rollouts.generate(prompts[1:], SAMPLING, [2], 8) == whole[1:], "cut over processes"
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


class Recorded(ThreadingHTTPServer):
    """Answers by path from a dict of (status, value); remembers what was asked."""

    daemon_threads = True

    def __init__(self, answers: dict[str, tuple[int, object]]) -> None:
        self.answers, self.asked = answers, []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def rollout_config(self, **more: object) -> Config:
        return vllm_config("server", vllm_server_port=self.server_address[1], vllm_server_timeout=5.0, **more)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        path = urlsplit(self.path).path
        self.server.asked.append((path, body))
        status, value = self.server.answers.get(path, (404, {"detail": "Not Found"}))
        if callable(value):
            value = value(body)
        answer = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def answering():
    servers = []

    def start(**answers: tuple[int, object]) -> Recorded:
        paths = {"health": "/health", "info": "/server_info", "models": "/v1/models", "rpc": "/collective_rpc"}
        paths |= {"reset": "/reset_prefix_cache", "completions": "/v1/completions"}
        servers.append(Recorded({paths[name]: answer for name, answer in answers.items()}))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def info(mode):
    return (200, {"vllm_config": {"model_config": {"logprobs_mode": mode}}})


MODELS = (200, {"data": [{"id": "student"}]})


def test_a_server_without_the_weight_routes_is_refused(answering):
    with pytest.raises(ValueError, match=r"no route to replace weights.*VLLM_SERVER_DEV_MODE=1"):
        check_rollout_engine(answering(health=(200, None)).rollout_config())


def test_a_server_with_raw_logprobs_is_refused(answering):
    with pytest.raises(ValueError, match=r"--logprobs-mode processed_logprobs.*got raw_logprobs; `mopd serve`"):
        check_rollout_engine(answering(health=(200, None), info=info("raw_logprobs")).rollout_config())
    check_rollout_engine(answering(health=(200, None), info=info("processed_logprobs")).rollout_config())


def test_answers_of_a_failing_server_are_errors(answering):
    server = answering(rpc=(500, {"error": "out of memory"}))
    with pytest.raises(RuntimeError, match=r"127.0.0.1:\d+ answered 500 to /collective_rpc: .*out of memory"):
        Server(server.rollout_config().rollout).call("/collective_rpc", {})
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match=r"lost the vLLM server at 127.0.0.1:\d+ during /v1/completions.*resume"):
        Server(server.rollout_config().rollout).call("/v1/completions", {})


def test_requests_say_everything_and_answers_keep_the_prompts_order(answering, tokenizer, prompts):
    """Whatever a request leaves out, the server takes from the model's generation_config.json."""

    def completions(body):
        start = body["prompt"][1]  # 5 or 9: which prompt it was
        choices = [(1, [start, 8], [-0.5, -0.25]), (0, [start, 2], [-1.0, -2.0])]
        return {
            "choices": [{"index": i, "token_ids": ids, "logprobs": {"token_logprobs": lp}} for i, ids, lp in choices]
        }

    server = answering(models=MODELS, completions=(200, completions))
    engine = ServerRollouts(server.rollout_config().rollout, tokenizer)
    groups = engine.generate(prompts, SAMPLING, [2], 11)
    assert [[(r.token_ids, r.logprobs, r.finished) for r in g.rollouts] for g in groups] == [
        [([start, 2], [-1.0, -2.0], True), ([start, 8], [-0.5, -0.25], False)] for start in (5, 9)
    ]
    asked = sorted((body for path, body in server.asked if path == "/v1/completions"), key=lambda b: b["prompt"])
    assert [body.pop("prompt") for body in asked] == [[1, 5, 6], [1, 9]]
    assert [body.pop("seed") for body in asked] == [prompt_seed(11), prompt_seed(12)]
    assert asked[0] == asked[1] == {
        "model": "student", "n": 3, "temperature": 0.9, "top_p": 0.95, "max_tokens": 6, "stop_token_ids": [2],
        "logprobs": 0, "return_token_ids": True,
        "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip
    assert abs(prompt_seed(11) - prompt_seed(12)) > SAMPLING.num_generations, "vLLM counts on from each"
    count = len(server.asked)
    engine.generate(prompts[1:], SAMPLING, [2], 12)
    assert server.asked[count][1]["seed"] == prompt_seed(12), "cut over processes"
    assert engine.generate([], SAMPLING, [2], 13) == []
    assert len(server.asked) == count + 1


def test_weights_reach_the_server_as_files_and_leave_nothing(answering, tokenizer, model, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "FILE_BYTES", 2_000)
    read = {}

    def load(body):
        files = sorted(Path(body["kwargs"]["weights_path"]).iterdir())
        assert len(files) > 2
        for file in files:
            read.update(load_file(file))
        return {"results": [None]}

    server = answering(models=MODELS, rpc=(200, load), reset=(200, {"success": True}))
    engine = ServerRollouts(server.rollout_config(vllm_weights_dir=str(tmp_path)).rollout, tokenizer)
    engine.update_weights(model)
    assert [path for path, _ in server.asked] == ["/v1/models", "/collective_rpc", "/reset_prefix_cache"]
    assert server.asked[1][1]["method"] == "reload_weights"
    expected = model.state_dict()
    assert read.keys() == expected.keys()
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= read.keys()
    assert all(torch.equal(read[name], expected[name]) for name in read)
    assert list(tmp_path.iterdir()) == []
    server.answers["/reset_prefix_cache"] = (200, {"success": False})
    with pytest.raises(RuntimeError, match="kept its prefix cache"):
        engine.update_weights(model)
    assert list(tmp_path.iterdir()) == []


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
