"""mlx-lm's own functions and commands run our model and choose the tokens that plain greedy decoding chooses."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import mlx_lm.chat
import mlx_lm.perplexity
import numpy as np
import pytest
from known import CALL, SUM, TALK, answers_to
from mlx_lm import utils
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models import llama
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from nano.chats import CALCULATOR

from mlx_v4flash import nano_folder
from mlx_v4flash.cache import LayerCache
from mlx_v4flash.config import ModelConfig
from mlx_v4flash.encoding import Encoding
from mlx_v4flash.errors import ConfigError, RequestError
from mlx_v4flash.markup import ASSISTANT, BOS, END_THINK, EOS, THINK, USER, write_calls
from mlx_v4flash.mlx_lm_bridge import COMMANDS, register, run_mlx_lm
from mlx_v4flash.model import Model
from mlx_v4flash.tiny import write_tiny

TEXT = "The model answers with random bytes, but always with the same ones."
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bridge") / "tiny"
    write_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Model, TokenizerWrapper]:
    register()
    return mlx_lm.load(str(folder))


@pytest.fixture(scope="module")
def with_template(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("bridge") / "with-template"
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    return copy


@pytest.fixture(scope="module")
def foreign(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer that lacks the tokens for calls."""
    copy = tmp_path_factory.mktemp("bridge") / "foreign"
    shutil.copytree(folder, copy)
    text = (copy / "tokenizer.json").read_text(encoding="utf-8")
    (copy / "tokenizer.json").write_text(text.replace("｜DSML｜", "｜TOOLS｜"), encoding="utf-8")
    return copy


def greedy(model: Model, *prompts: list[int], n: int) -> list[int]:
    """The likeliest tokens, without mlx-lm; each prompt but its last token is one chunk, as mlx-lm has it."""
    cache = model.make_cache()
    for ids in prompts:
        if ids[:-1]:
            model(mx.array(ids[:-1])[None], cache=cache)
        token = mx.argmax(model(mx.array(ids[-1:])[None], cache=cache)[0, -1]).item()
    found = [token]
    while len(found) < n:
        found.append(mx.argmax(model(mx.array(found[-1:])[None], cache=cache)[0, -1]).item())
    return found


def as_text(tokenizer: TokenizerWrapper, tokens: list[int]) -> str:
    detokenizer = tokenizer.detokenizer
    for token in tokens:
        detokenizer.add_token(token)
    detokenizer.finalize()
    return detokenizer.text


def test_load(folder: Path, loaded: tuple[Model, TokenizerWrapper]) -> None:
    model, tokenizer = loaded
    assert type(model) is Model
    assert tokenizer.eos_token_ids == {ModelConfig.from_folder(folder).eos_token_id}
    assert tokenizer.has_chat_template and tokenizer.has_tool_calling
    assert model.numerics.dtype == mx.bfloat16 and not model.numerics.quantize_activations


def test_load_returns_the_config_and_honours_options(folder: Path) -> None:
    register()
    options = {"quantize_activations": True, "dtype": "float32", "simulate_cache_quant": False}
    model, _, config = mlx_lm.load(str(folder), model_config=options, return_config=True)
    assert config == json.loads((folder / "config.json").read_text()) | options
    assert model.numerics.quantize_activations and not model.numerics.simulate_cache_quant
    assert model.numerics.dtype == mx.float32


def test_generate(loaded: tuple[Model, TokenizerWrapper]) -> None:
    model, tokenizer = loaded
    ids = tokenizer.encode(TEXT)
    want = greedy(model, ids, n=12)
    responses = list(mlx_lm.stream_generate(model, tokenizer, TEXT, max_tokens=12))
    assert [r.token for r in responses] == want[: len(responses)]
    assert responses[-1].finish_reason == ("length" if len(responses) == 12 else "stop")
    assert mlx_lm.generate(model, tokenizer, TEXT, max_tokens=12) == "".join(r.text for r in responses)


def test_generate_in_chunks(loaded: tuple[Model, TokenizerWrapper]) -> None:
    model, tokenizer = loaded
    ids = tokenizer.encode(TEXT)
    responses = mlx_lm.stream_generate(model, tokenizer, TEXT, max_tokens=5, prefill_step_size=13)
    whole = [r.token for r in responses]
    assert whole == greedy(model, ids, n=5)[: len(whole)]


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 7, 8, 9, 127, 128, 129])
def test_cache_file_continues_bit_for_bit(n: int, loaded: tuple[Model, TokenizerWrapper], tmp_path: Path) -> None:
    model, _ = loaded
    ids = [i % 250 for i in range(3, 3 + n + 6)]
    kept = model.make_cache()
    if n:
        model(mx.array(ids[:n])[None], cache=kept)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), kept, {"model": "tiny"})
    restored, metadata = load_prompt_cache(str(tmp_path / "cache.safetensors"), return_metadata=True)
    assert metadata == {"model": "tiny"}
    assert [type(c) for c in restored] == [LayerCache] * len(kept)
    assert [c.position for c in restored] == [n] * len(kept)
    for i in ids[n:]:
        a, b = (model(mx.array([[i]]), cache=cache) for cache in (kept, restored))
        assert mx.array_equal(a, b).item(), f"logits differ {i - 3 - n} tokens after the file"


def test_cache_file_of_many_layers(tmp_path: Path) -> None:
    register()
    ratios = [0, 0, *[4, 128] * 20, 4]  # as many layers as V4-Flash: names in the file have two digits
    save_prompt_cache(str(tmp_path / "cache.safetensors"), [LayerCache(128, r) for r in ratios])
    assert [c.ratio for c in load_prompt_cache(str(tmp_path / "cache.safetensors"))] == ratios


def test_command_cache_prompt_then_generate(
    folder: Path, loaded: tuple[Model, TokenizerWrapper], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = loaded
    file = str(tmp_path / "prompt.safetensors")
    run_mlx_lm("cache_prompt", ["--model", str(folder), "--prompt", TEXT[:40], "--prompt-cache-file", file])
    assert "note:" not in capsys.readouterr().err
    run_mlx_lm("generate", ["--prompt-cache-file", file, "--prompt", TEXT[40:], "--max-tokens=10", "--verbose=F"])
    marks = Encoding.from_folder(folder).vocabulary
    start = marks.encode([BOS, USER, TEXT[:40]])
    want = greedy(model, start, marks.encode([TEXT[40:], ASSISTANT, THINK]), n=10)
    assert capsys.readouterr().out == as_text(tokenizer, want) + "\n"


def test_command_cache_prompt_without_template(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "prompt.safetensors")
    run_mlx_lm("cache_prompt", ["--model", str(foreign), "--prompt", TEXT, "--prompt-cache-file", file])
    assert "no chat template, so the prompt is taken as raw text" in capsys.readouterr().err
    assert load_prompt_cache(file)[0].position == len(TEXT)


def test_command_generate_uses_a_chat_template(
    with_template: Path, loaded: tuple[Model, TokenizerWrapper], capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = loaded
    argv = sys.argv
    run_mlx_lm("generate", ["--model", str(with_template), "--prompt", "Hi", "--max-tokens=10", "--verbose=F"])
    assert sys.argv is argv
    out, err = capsys.readouterr()
    assert "note:" not in err
    assert out == as_text(tokenizer, greedy(model, rendered(tokenizer, "Hi"), n=10)) + "\n"


def test_command_chat_without_a_template_file(
    folder: Path,
    loaded: tuple[Model, TokenizerWrapper],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, tokenizer = loaded
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nq\n"))
    run_mlx_lm("chat", ["--model", str(folder), "--max-tokens", "7", "--system-prompt", "Be terse."])
    messages = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Hi"}]
    ids = Encoding.from_folder(folder).prompt(messages)
    assert as_text(tokenizer, greedy(model, ids, n=7)) in capsys.readouterr().out


def rendered(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    return tokenizer.encode(f"{tokenizer.bos_token}user: {text}\nassistant: ", add_special_tokens=False)


def test_command_chat(
    with_template: Path,
    loaded: tuple[Model, TokenizerWrapper],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, tokenizer = loaded
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nAnd now?\nr\nHi\nq\n"))
    run_mlx_lm("chat", ["--model", str(with_template), "--max-tokens", "7"])
    screen = capsys.readouterr().out
    first = greedy(model, rendered(tokenizer, "Hi"), n=7)
    # mlx-lm feeds the last token it shows to the model before it stops, so the second turn follows all seven.
    second = greedy(model, rendered(tokenizer, "Hi"), *([t] for t in first), rendered(tokenizer, "And now?"), n=7)
    answers = [as_text(tokenizer, first), as_text(tokenizer, second), as_text(tokenizer, first)]
    position = 0
    for answer in answers:
        position = screen.index(answer, position) + len(answer)


def test_command_perplexity(
    folder: Path,
    loaded: tuple[Model, TokenizerWrapper],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # mlx-lm reads its text with the package `datasets`. This one stands in for it and reads a file; what is done
    # with the text is mlx-lm's.
    datasets = types.ModuleType("datasets")
    datasets.load_dataset = lambda path, split: [  # type: ignore[attr-defined]
        json.loads(line) for line in Path(path).read_text().splitlines()
    ]
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"{i}. {TEXT}"}) + "\n" for i in range(9)))
    sizes = {"sequence_length": 37, "num_samples": 5}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    run_mlx_lm("perplexity", ["--model", str(folder), "--data-path", str(file), "--batch-size=2", *options])
    printed = capsys.readouterr().out

    model, tokenizer = loaded
    np.random.seed(123)  # mlx-lm's default, for the order of the texts
    rows = mlx_lm.perplexity.load_data(tokenizer, str(file), **sizes)
    logits = np.array(model(rows[:, :-1])).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, np.array(rows)[:, 1:, None], -1)[..., 0]
    want = np.exp((np.log(np.exp(logits).sum(-1)) - chosen).mean())
    found = float(printed.split("Perplexity: ")[1].split()[0])
    assert found == pytest.approx(want, rel=1e-4)


def test_command_benchmark(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_mlx_lm("benchmark", ["--model", str(folder), "-p", "9", "-g", "3", "-n", "1"])
    assert "Averages: prompt_tps=" in capsys.readouterr().out


class Server:
    """`mlx_lm.server` in a process of its own."""

    def __init__(self, folder: Path, log: Path, setup: str = "") -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        start = "import sys; from mlx_v4flash.mlx_lm_bridge import run_mlx_lm; run_mlx_lm('server', sys.argv[1:])"
        code = f"{setup}\n{start}"
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, "--model", str(folder), "--port", str(self.port)],
                stdout=out,
                stderr=out,
            )
        for _ in range(600):
            try:
                self._open("/health").close()
                return
            except urllib.error.URLError:
                assert self.process.poll() is None, log.read_text()
                time.sleep(0.1)
        raise AssertionError(f"the server did not answer within a minute:\n{log.read_text()}")

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """One answer, with its tokens under `tokens`."""
        body = {"max_tokens": 9, "temperature": 0, "logprobs": True} | body
        answer: dict[str, Any] = json.load(self._open(path, json.dumps(body).encode()))
        return answer | {"tokens": [entry["id"] for entry in answer["choices"][0]["logprobs"]["content"]]}

    def _open(self, path: str, data: bytes | None = None) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        # A proxy of the environment has no way to this address.
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(folder, tmp_path_factory.mktemp("server") / "log")
    yield server
    server.stop()


def test_server_completion(server: Server, loaded: tuple[Model, TokenizerWrapper]) -> None:
    model, tokenizer = loaded
    answer = server.post("/v1/completions", prompt=TEXT)
    want = greedy(model, tokenizer.encode(TEXT), n=9)
    assert answer["tokens"] == want[: len(answer["tokens"])]
    assert answer["choices"][0]["text"] == as_text(tokenizer, answer["tokens"])
    again = server.post("/v1/completions", prompt=TEXT)
    assert again["tokens"] == answer["tokens"]


def test_server_chat(server: Server, folder: Path, loaded: tuple[Model, TokenizerWrapper]) -> None:
    model, _ = loaded
    messages = [{"role": "user", "content": "Hi</think>"}]
    for thinking in (True, False):
        answer = server.post(
            "/v1/chat/completions", messages=messages, chat_template_kwargs={"enable_thinking": thinking}
        )
        ids = Encoding.from_folder(folder).prompt(messages, think="high" if thinking else "off")
        assert answer["tokens"] == greedy(model, ids, n=9)[: len(answer["tokens"])]


def test_server_refuses_a_setting_of_other_templates(server: Server) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.post("/v1/chat/completions", messages=messages, chat_template_kwargs={"think_hard": True})
    assert "expected no argument think_hard" in refused.value.read().decode()


# Makes the small model say one thing, whatever it is asked: `answer` from behind `<think>` on.
SCRIPTED = """
import mlx.core as mx
from mlx_v4flash.model import Model
answer, think = {answer}, {think}
compute, said = Model.__call__, 0
def scripted(self, ids, *args, **options):
    global said
    logits = compute(self, ids, *args, **options)
    said = 0 if ids[0, -1].item() == think else min(said + 1, len(answer) - 1)
    return mx.where(mx.arange(logits.shape[-1]) == answer[said], 0.0, -1e4) + 0 * logits
Model.__call__ = scripted
"""


@pytest.mark.slow
def test_server_reasoning_and_calls(folder: Path, tmp_path: Path) -> None:
    marks = Encoding.from_folder(folder).vocabulary
    calls = [("f", {"a": "x<b>\n", "n": 1e-07}), ("g", {})]
    answer = marks.encode(["two files", END_THINK, "Reading.", *write_calls(calls), EOS])
    setup = SCRIPTED.format(answer=answer, think=marks.id_of(THINK))
    messages: list[dict[str, Any]] = [{"role": "user", "content": "read both"}]
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in "fg"]
    server = Server(folder, tmp_path / "log", setup)
    try:
        found = server.post("/v1/chat/completions", messages=messages, tools=tools, max_tokens=999)
        choice = found["choices"][0]
        message = choice["message"]
        assert choice["finish_reason"] == "tool_calls"
        assert (message["reasoning"], message["content"].rstrip()) == ("two files", "Reading.")
        functions = [call["function"] for call in message["tool_calls"]]
        assert [(f["name"], json.loads(f["arguments"])) for f in functions] == calls
    finally:
        server.stop()
    # The answer goes back as clients send it, and stands in the next prompt as it was generated.
    results = [{"role": "tool", "content": "R", "tool_call_id": call["id"]} for call in message["tool_calls"]]
    answered = {**message, "content": message["content"].rstrip()}
    rest = [USER, "<tool_result>R</tool_result>\n\n<tool_result>R</tool_result>", ASSISTANT, THINK]
    first, again = (
        Encoding.from_folder(folder).prompt(m, tools=tools) for m in (messages, [*messages, answered, *results])
    )
    assert again == [*first, *answer, *marks.encode(rest)]


def test_server_answers_right(tmp_path: Path) -> None:
    """The small model that has learned something: an answer, one with reasoning, a call."""
    server = Server(nano_folder(), tmp_path / "log")

    def ask(text: str, thinking: bool = False, **options: Any) -> dict[str, Any]:
        template = {"enable_thinking": thinking}
        body = {"messages": [{"role": "user", "content": text}], "chat_template_kwargs": template, "max_tokens": 120}
        message: dict[str, Any] = server.post("/v1/chat/completions", **body, **options)["choices"][0]["message"]
        return message

    try:
        assert ask(TALK[1])["content"] in answers_to(TALK[1])
        question, expression, total = SUM
        thought = ask(question, thinking=True)
        assert thought["content"] == f"{expression} = {total}." and f"So {total}." in thought["reasoning"]
        question, expression, _ = CALL
        (call,) = ask(question, tools=[{"type": "function", "function": CALCULATOR}])["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"expression": expression}
    finally:
        server.stop()


def test_server_prompt_cache_continues(loaded: tuple[Model, TokenizerWrapper]) -> None:
    """The server keeps caches by their tokens, and works on a copy when a prompt goes on where one ended."""
    model, tokenizer = loaded
    ids = tokenizer.encode(TEXT)
    cache = model.make_cache()
    model(mx.array(ids[:50])[None], cache=cache)
    store = mlx_lm_cache.LRUPromptCache()
    store.insert_cache("tiny", ids[:50], cache)
    for _ in range(2):
        copy, rest = store.fetch_nearest_cache("tiny", ids)
        assert rest == ids[50:]
        continued = model(mx.array(rest)[None], cache=copy)
        assert cache[0].position == 50
    assert mx.array_equal(continued, model(mx.array(ids[50:])[None], cache=cache)).item()


def test_register_twice_changes_nothing() -> None:
    register()
    before = (utils.load_model, utils.load_adapters, sys.modules["mlx_lm.models.deepseek_v4"])
    register()
    assert (utils.load_model, utils.load_adapters, sys.modules["mlx_lm.models.deepseek_v4"]) == before
    assert utils._get_classes({"model_type": "deepseek_v4"}) == (Model, ModelConfig)


def test_other_models_load_as_before(folder: Path, tmp_path: Path) -> None:
    register()
    config = {
        "model_type": "llama", "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 40,
        "num_attention_heads": 3, "rms_norm_eps": 1e-5, "vocab_size": 300,
    }  # fmt: skip
    model = llama.Model(llama.ModelArgs.from_dict(config))
    utils.save_model(tmp_path, model)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / name)
    found, tokenizer = mlx_lm.load(str(tmp_path), lazy=True, model_config={"rope_theta": 500.0})
    assert type(found) is llama.Model and found.args.rope_theta == 500.0
    assert len(list(mlx_lm.stream_generate(found, tokenizer, "ab", max_tokens=2))) > 0


def test_own_classes_are_left_to_mlx_lm(folder: Path, tmp_path: Path) -> None:
    """A caller who brings classes wants those, also for a checkpoint of our type."""
    register()
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": None, "num_hidden_layers": 1}))
    classes = (llama.Model, llama.ModelArgs)
    values = {"intermediate_size": 40, "num_key_value_heads": config["num_attention_heads"]}
    model, _ = utils.load_model(
        tmp_path, lazy=True, strict=False, model_config=values, get_model_classes=lambda config: classes
    )
    assert type(model) is llama.Model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lazy": True}, "lazy: expected False"),
        ({"model_config": {"sliding_window": 4, "num_hidden_layers": 1}}, "found num_hidden_layers, sliding_window"),
        ({"adapter_path": "adapters"}, "adapter_path: adapters are not supported"),
    ],
)
def test_load_refuses(folder: Path, arguments: dict[str, Any], message: str) -> None:
    register()
    with pytest.raises(RequestError, match=message):
        mlx_lm.load(str(folder), **arguments)


def test_load_model_refuses_strict(folder: Path) -> None:
    register()
    with pytest.raises(RequestError, match="strict: expected True"):
        utils.load_model(folder, strict=False)


def test_load_names_what_is_wrong_in_the_config(folder: Path, tmp_path: Path) -> None:
    register()
    values = json.loads((folder / "config.json").read_text()) | {"hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="hidden_act"):
        utils.load_model(tmp_path)


def test_convert_and_sharding_are_refused_before_loading(folder: Path, tmp_path: Path) -> None:
    register()
    with pytest.raises(RequestError, match="convert, quantise or split"):
        mlx_lm.convert(str(folder), str(tmp_path / "out"), quantize=True)
    with pytest.raises(RequestError, match="convert, quantise or split"):
        utils.sharded_load(str(folder))


def test_batches_and_speculation_are_refused_by_mlx_lm(loaded: tuple[Model, TokenizerWrapper]) -> None:
    model, tokenizer = loaded
    with pytest.raises(ValueError, match=r"LayerCache.* does not yet support batching"):
        mlx_lm.batch_generate(model, tokenizer, [[1, 2, 3], [4, 5]], max_tokens=2)
    with pytest.raises(ValueError, match=r"requires a trimmable prompt cache .*LayerCache"):
        mlx_lm.generate(model, tokenizer, "ab", draft_model=model)


@pytest.mark.parametrize(
    ("command", "args", "message"),
    [
        ("generat", [], "expected benchmark, cache_prompt, chat, .* found 'generat'"),
        ("convert", ["-q"], "convert: expected a command that runs the model as it is"),
        ("generate", ["--kv-bits=4"], "--kv-bits: .*\nhint: leave --kv-bits out"),
        ("server", ["--draft-model", "x"], "--draft-model: speculative decoding"),
        ("chat", ["--adapter-path", "x"], "--adapter-path: adapters are not supported"),
        ("benchmark", ["--pipeline"], "--pipeline: the model runs on one machine"),
    ],
)
def test_command_refuses(command: str, args: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run_mlx_lm(command, args)


def test_chat_without_template_is_refused_before_loading(foreign: Path, tmp_path: Path) -> None:
    for file in foreign.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path / file.name)
    with pytest.raises(RequestError, match=r"chat: expected the tokens of DeepSeek-V4 .*\nhint: take tokenizer\.json"):
        run_mlx_lm("chat", ["--model", str(tmp_path)])


@pytest.mark.parametrize(("command", "package"), [("evaluate", "lm_eval"), ("perplexity", "datasets")])
def test_command_names_a_missing_package(command: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RequestError, match=rf"expected the package {package}.*\nhint: pip install 'mlx-lm\["):
        run_mlx_lm(command, [])


def test_every_command_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for command in set(COMMANDS) - {"evaluate", "perplexity"}:
        with pytest.raises(SystemExit) as exit:
            run_mlx_lm(command, ["--help"])
        assert exit.value.code == 0
        assert f"usage: mlx-v4flash lm {command}" in capsys.readouterr().out
