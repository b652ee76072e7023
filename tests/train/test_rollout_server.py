"""Rollouts by a vLLM server, against one that answers from a table: refusals, requests, weights as files."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import load_file

from mopd_train.config import Config
from mopd_train.models import load_model
from mopd_train.rollout_engines import check_rollout_engine, weights
from mopd_train.rollout_engines.colocate import prompt_seed
from mopd_train.rollout_engines.server import Server, ServerRollouts
from tests.train.test_rollout_engines import PROMPTS, SAMPLING, vllm_config


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


def test_requests_say_everything_and_answers_keep_the_prompts_order(answering, tokenizer):
    """Whatever a request leaves out, the server takes from the model's generation_config.json."""

    def completions(body):
        start = body["prompt"][1]  # 5 or 9: which prompt it was
        choices = [(1, [start, 8], [-0.5, -0.25]), (0, [start, 2], [-1.0, -2.0])]
        return {
            "choices": [{"index": i, "token_ids": ids, "logprobs": {"token_logprobs": lp}} for i, ids, lp in choices]
        }

    server = answering(models=MODELS, completions=(200, completions))
    engine = ServerRollouts(server.rollout_config().rollout, tokenizer)
    groups = engine.generate(PROMPTS, SAMPLING, [2], 11)
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
    engine.generate(PROMPTS[1:], SAMPLING, [2], 12)
    assert server.asked[count][1]["seed"] == prompt_seed(12), "cut over processes"
    assert engine.generate([], SAMPLING, [2], 13) == []
    assert len(server.asked) == count + 1


def test_weights_reach_the_server_as_files_and_leave_nothing(answering, tokenizer, tiny_model, tmp_path, monkeypatch):
    model = load_model(str(tiny_model))
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
