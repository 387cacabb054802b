"""Commands as a user types them."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from known import CALL, SUM, TALK, answers_to
from nano.chats import CALCULATOR

import mlx_v4flash
from mlx_v4flash import Chat, SamplingParams, generate, load
from mlx_v4flash.answer import Printer
from mlx_v4flash.checkpoint import Checkpoint
from mlx_v4flash.cli import main
from mlx_v4flash.events import Reasoning, Text, ToolCall
from mlx_v4flash.hub import nano_folder
from mlx_v4flash.tiny import TINY, write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "m")


def run(*args: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args], input=stdin, catch_exceptions=False)


def test_answer_on_stdout_alone(folder: Path) -> None:
    result = run("generate", "Hello", "--model", folder, "--max-tokens", 9, "--raw")
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout == generate(*load(folder), "Hello", 9) + "\n"


CHAT = ("--think-budget", 3, "--max-tokens", 9, "--temp", 0)


def test_chat_answer_on_stdout_alone(folder: Path) -> None:
    chat = Chat(*load(folder), think_budget=3, max_tokens=9, sampling=SamplingParams(), system="S")
    events = list(chat.send("Hello"))
    reasoning = "".join(e.text for e in events if isinstance(e, Reasoning))
    text = "".join(e.text for e in events if isinstance(e, Text))
    assert text and reasoning
    result = run("generate", "Hello", "--model", folder, "--system", "S", *CHAT)
    assert result.stdout == text + "\n" and result.stderr == ""
    result = run("generate", "Hello", "--model", folder, "--system", "S", *CHAT, "--show-thinking")
    assert result.stdout == text + "\n" and result.stderr == reasoning + "\n\n"
    result = run("generate", "Hello", "--model", folder, "--system", "S", *CHAT, "--json")
    *pieces, summary = [json.loads(line) for line in result.stdout.splitlines()]
    assert "".join(p.get("reasoning", "") for p in pieces) == reasoning
    assert "".join(p.get("text", "") for p in pieces) == text
    assert summary["finish_reason"] == "length" and summary["generated_tokens"] == 9


def test_calls_are_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    out = Printer(as_json=False, show_thinking=False)
    for event in (Reasoning("hm"), Text("Let me see."), ToolCall("1", "f", '{"a": 1}'), ToolCall("2", "g", "{")):
        out.show(event)
    captured = capsys.readouterr()
    out.end()
    assert capsys.readouterr().out == "" and captured.out.endswith("}\n"), "no empty line after calls"
    text, *calls = captured.out.splitlines()
    assert (text, captured.err) == ("Let me see.", "")
    assert [json.loads(call) for call in calls] == [
        {"id": "1", "name": "f", "arguments": {"a": 1}},
        {"id": "2", "name": "g", "arguments": "{"},
    ]


def test_tools_of_a_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([{"name": "weather", "parameters": {"type": "object"}}]))
    plain, tools = (
        json.loads(run("generate", "x", "--model", folder, *CHAT, "--json", *more).stdout.splitlines()[-1])
        for more in ((), ("--tools", file))
    )
    assert tools["prompt_tokens"] > plain["prompt_tokens"] + 500  # the model is told how to call
    file.write_text("{}")
    result = run("generate", "x", "--model", folder, "--tools", file)
    assert (
        result.exit_code == 1
        and "tools.json: expected a list of tools, found an object without the list" in result.stderr
    )


def test_base_models_continue_text(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", base=True)
    result = run("generate", "Hello", "--model", folder, "--max-tokens", 5)
    assert result.stdout == generate(*load(folder), "Hello", 5) + "\n"
    assert run("generate", "Hello", "--model", folder, *CHAT, "--chat").stdout != result.stdout
    result = run("generate", "Hello", "--model", folder, "--system", "S")
    assert result.exit_code == 1 and "expected a chat, found raw text" in result.stderr


def test_release_changes_the_prompt(folder: Path) -> None:
    lengths = [
        json.loads(run("generate", "x", "--model", folder, *CHAT, "--json", "--release", r).stdout.splitlines()[-1])
        for r in ("v4-preview", "v4-0731")
    ]
    assert lengths[1]["prompt_tokens"] - lengths[0]["prompt_tokens"] == 476  # bytes of the effort text of the latter


def test_default_model_works_offline_and_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run("generate", TALK[0])
    assert result.exit_code == 0 and result.stdout.rstrip("\n") in answers_to(TALK[0])
    assert result.stderr.startswith("no --model: this is Nano") and result.stderr.count("\n") == 1


def test_default_model_thinks_if_told_to() -> None:
    question, expression, total = SUM
    result = run("generate", question, "--think", "high", "--show-thinking")
    assert result.stdout == f"{expression} = {total}.\n" and f"So {total}.\n" in result.stderr


def test_default_model_calls_tools(tmp_path: Path) -> None:
    file, (question, expression, _) = tmp_path / "tools.json", CALL
    file.write_text(json.dumps([CALCULATOR]))
    call = json.loads(run("generate", question, "--tools", file).stdout)
    assert (call["name"], call["arguments"]) == ("calculator", {"expression": expression})


def test_default_model_talks_turn_after_turn() -> None:
    result = run("chat", stdin=f"My name is Lucy.\n{TALK[1]}\nWhat is my name?\n")
    hello, answer, name = result.stdout.splitlines()
    assert "Lucy" in hello and answer in answers_to(TALK[1]) and name == "Your name is Lucy."


def test_prompt_from_stdin_equals_argument(folder: Path) -> None:
    options = ("--model", folder, "--max-tokens", 5, "--raw")
    assert run("generate", "-", *options, stdin="two\nlines").stdout == run("generate", "two\nlines", *options).stdout


def test_json_is_one_object_per_line(folder: Path) -> None:
    options = (
        "--model",
        folder,
        "--raw",
        "--max-tokens",
        6,
        "--temp",
        1,
        "--top-p",
        0.9,
        "--min-p",
        0.01,
        "--top-k",
        40,
    )
    result = run("generate", "Hello", *options, "--seed", 4, "--json")
    *pieces, summary = [json.loads(line) for line in result.stdout.splitlines()]
    assert "".join(p["text"] for p in pieces) + "\n" == run("generate", "Hello", *options, "--seed", 4).stdout
    assert summary["finish_reason"] == "length" and summary["generated_tokens"] == 6
    assert summary["prompt_tokens"] == 6  # five bytes and the beginning of the sequence
    assert summary["bytes_read"] == Checkpoint.open(folder).nbytes
    assert summary["peak_memory_bytes"] > summary["bytes_read"] and summary["ops"] == "reference"


def test_stats_go_to_stderr(folder: Path) -> None:
    result = run("generate", "Hello", "--model", folder, "--max-tokens", 4, "--stats", "--prefill-chunk", 2)
    for name in ("prefill tokens per s", "decode tokens per s", "bytes read", "peak memory bytes", "ops: reference"):
        assert name in result.stderr and name not in result.stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numerics_are_options(folder: Path, dtype: str) -> None:
    options = {"dtype": dtype, "simulate_cache_quant": False, "quantize_activations": True}
    flags = ("--raw", "--dtype", dtype, "--no-cache-quant", "--activation-quant")
    want = generate(*load(folder, **options), "abc", 8)
    assert run("generate", "abc", "--model", folder, "--max-tokens", 8, *flags).stdout == want + "\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("generate", ""), "error: prompt: expected at least one token, found none"),
        (("generate", "x", "--temp", "-1"), "error: temp: expected 0 or more, found -1.0"),
        (("generate", "x", "--max-tokens", "0"), "error: max_tokens: expected 1 or more, found 0"),
        (("generate", "x", "--prefill-chunk", "0"), "error: prefill_chunk: expected 1 or more, found 0"),
        (("generate", "x", "--think-budget", "-1"), "error: think_budget: expected 0 or more, found -1"),
        (("chat", "--context", "0"), "error: context: expected 1 or more, found 0"),
        (("generate", "x", "--model", "/no/such/folder"), "error: /no/such/folder: "),
        (("generate", "x", "--dtype", "float16"), "error: dtype: expected bfloat16 or float32"),
        (("bench", "--frontiers", "0"), "error: frontiers: expected context lengths from 1"),
        (("lm", "nonsense"), "nonsense"),
        (
            ("lm", "generate", "--model", "/no/such/folder"),
            "/no/such/folder: expected a checkpoint folder, found nothing",
        ),
        (("generate", "x", "--model", str(Path(__file__).parent)), "expected a checkpoint folder with config.json"),
        (("generate", "x", "--memory", "0"), "memory: expected at least one byte, found '0'"),
        (("generate", "x", "--raw", "--think", "high"), "expected a chat, found raw text"),
        (("bench", "--decode", "0"), "decode: expected 1 or more, found 0"),
    ],
)
def test_errors_are_told_without_a_traceback(args: tuple[str, ...], message: str, folder: Path) -> None:
    if "--model" not in args and args[0] != "lm":
        args = (*args, "--model", str(folder))
    result = run(*args)
    assert result.exit_code == 1 and message in result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "args",
    [("generate", ""), ("generate", "x", "--max-tokens", "0"), ("chat", "--context", "-1"), ("chat", "--top-p", 2)],
)
def test_options_are_checked_before_the_model_is_loaded(args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_v4flash.run.load", lambda *_, **__: pytest.fail("loaded"))
    result = run(*args)
    assert result.exit_code == 1 and "error: " in result.stderr


def test_chat_goes_on_with_a_saved_one(folder: Path, tmp_path: Path) -> None:
    chat = Chat(*load(folder), messages=[{"role": "user", "content": "x"}], system="S")
    args = ("chat", "--model", folder, "--load", chat.save(tmp_path / "talk"))
    for saved in ("talk", "talk.safetensors"):
        args = (*args[:-1], tmp_path / saved)
        assert run(*args, stdin="/quit\n").exit_code == 0
    result = run(*args, stdin="/system\n")
    assert result.exit_code == 0 and "tokens (0.0%), 1 messages" in result.stdout and "system: S;" in result.stdout
    (tmp_path / "talk.safetensors").write_bytes(b"damaged")
    result = run(*args, stdin="what did we say?\n")
    assert result.exit_code == 1 and "talk.safetensors: expected a conversation" in result.stderr
    assert result.stdout == ""


def test_standard_input_that_is_no_text(folder: Path) -> None:
    result = CliRunner().invoke(main, ["generate", "-", "--model", str(folder)], input=b"a\xff")
    assert result.exit_code == 1 and "error: standard input: expected UTF-8, found" in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("generate", "x", "--release", "v5"),
        ("generate",),
        ("generate", "x", "--bogus"),
        ("bench", "--frontiers", "a,b"),
        ("bench", "--output", "/no/such/folder/x"),
        ("generate", "x", "--trace", "/no/such/folder/x"),
        ("chat", "--load", "/no/such/file"),
        ("quality", "m", "--against", "m", "--text", __file__, "--trace", "t"),
        ("plan", "--real", "model"),
        ("plan", "--real", "--revision", "x"),
        ("tiny", "folder", "--layers", "2"),
    ],
)
def test_wrong_usage_exits_with_2(args: tuple[str, ...]) -> None:
    assert run(*args).exit_code == 2


def test_tiny_writes_what_it_is_asked_for(tmp_path: Path) -> None:
    config = tmp_path / "sizes.json"
    config.write_text(json.dumps({"n_routed_experts": 5, "num_experts_per_tok": 2}))
    assert run("tiny", tmp_path / "m", "--config", config, "--base", "--seed", 3).exit_code == 0
    written = Checkpoint.open(tmp_path / "m").config
    assert (written.n_routed_experts, written.expert_dtype) == (5, "fp8")
    assert run("generate", "x", "--model", tmp_path / "m", "--max-tokens", 1).exit_code == 0
    assert run("tiny", tmp_path / "real", "--real-dims", "--layers", "x").exit_code == 2
    config.write_text("{")
    broken = run("tiny", tmp_path / "m", "--config", config)
    assert broken.exit_code == 1 and "sizes.json: expected JSON, found" in broken.stderr


def test_tiny_refuses_a_tokenizer_before_anything_is_removed(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    result = run("tiny", folder, "--tokenizer", nano_folder() / "tokenizer.json")
    assert result.exit_code == 1 and "vocab_size: expected at least 4,096" in result.stderr
    assert run("generate", "x", "--model", folder, "--max-tokens", 1).exit_code == 0
    assert run("tiny", tmp_path / "n", "--tokenizer", folder).exit_code == 0


def test_damaged_tokenizer(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    (folder / "tokenizer.json").write_text("{}")
    result = run("generate", "x", "--model", folder)
    assert result.exit_code == 1 and "tokenizer.json: expected a tokenizer, found" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
@pytest.mark.parametrize("command", ["generate Hi", "plan --real --memory 48GB --disk 1GB", "chat"])
def test_a_full_disk_behind_standard_output(command: str) -> None:
    done = shell(f"echo Hi | {{}} {command} > /dev/full")
    assert done.returncode == 1 and "error: [Errno 28] No space left" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("line", "code"), [("{} generate Hi >&-", 0), ("{} chat <&-", 0), ("{} generate - <&-", 1), ("{} --help 2>&-", 0)]
)
def test_closed_streams(line: str, code: int) -> None:
    done = shell(line)
    assert done.returncode == code and "Traceback" not in done.stderr


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a line, in which {} is the program."""
    program = f"{sys.executable} -m mlx_v4flash"
    return subprocess.run(["sh", "-c", line.format(program)], capture_output=True, text=True)


def test_limits_nobody_named_are_told() -> None:
    args = ("generate", TALK[0], "--max-context", 12)
    assert "cut off, the limit of tokens is reached" in run(*args).stderr
    assert "cut off" not in run("generate", TALK[0], "--max-tokens", 2).stderr


def test_lm_without_a_model_runs_the_small_one() -> None:
    args = ("lm", "generate", "--prompt", TALK[1], "--chat-template-config", '{"enable_thinking": false}')
    result = run(*args)
    assert result.exit_code == 0 and "this is Nano" in result.stderr
    assert any(answer in result.stdout for answer in answers_to(TALK[1]))
    listed = run("lm", "--help")
    assert listed.exit_code == 0 and "Run an mlx-lm COMMAND" in listed.stdout


@pytest.mark.parametrize("experts", ["stream", "resident"])
def test_bench_reports_streaming(experts: str, folder: Path) -> None:
    args = [
        "bench",
        "--model",
        str(folder),
        "--frontiers",
        "16",
        "--decode",
        "2",
        "--rounds",
        "1",
        "--experts",
        experts,
    ]
    report = json.loads(CliRunner().invoke(main, [*args, "--json"], catch_exceptions=False).output)["experts"]
    table = CliRunner().invoke(main, args, catch_exceptions=False).output
    assert ("experts streamed: " in table) == (experts == "stream")
    if experts == "stream":  # all are held: there is room
        assert report["expert_evictions"] == report["expert_bytes_per_token"] == 0
    else:
        assert report is None


def test_bench_reports_frontiers(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures"
    options = ("--frontiers", "20,140", "--decode", 2, "--rounds", 2, "--prefill-chunk", 64, "--output", out)
    result = run("bench", "--model", folder, *options, "--json")
    report = json.loads(result.stdout)
    assert report == json.loads(out.with_suffix(".json").read_text())
    assert [f["context"] for f in report["frontiers"]] == [20, 140]
    assert all(0 < f["decode_low"] <= f["decode_tokens_per_s"] <= f["decode_high"] for f in report["frontiers"])
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert [int(r["context"]) for r in rows] == [20, 140] and float(rows[1]["prefill_tokens_per_s"]) > 0
    assert "140" in run("bench", "--model", folder, *options).stdout


@pytest.mark.parametrize("mode", [("--raw",), ("--think", "off", "--temp", "0")], ids=["raw", "chat"])
def test_ctrl_c_keeps_what_was_generated(folder: Path, mode: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "mlx_v4flash", "generate", "Hello", "--model", str(folder), "--json", *mode]
    child = subprocess.Popen(
        [*command, "--max-tokens", "50000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # Started in the background of a script, the tests themselves may have been told to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert child.stdout is not None
    first = child.stdout.readline()
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    rest, err = child.communicate(timeout=60)
    *pieces, summary = [json.loads(line) for line in (first + rest).splitlines()]
    assert child.returncode == 130 and "Traceback" not in err
    assert summary["finish_reason"] == "interrupted" and 1 <= summary["generated_tokens"] < 50000
    assert len(pieces) >= summary["generated_tokens"] * (mode[0] == "--raw") and pieces


def test_help_names_every_option() -> None:
    text = run("generate", "--help").stdout
    for option in (
        "--model", "--max-tokens", "--temp", "--top-p", "--min-p", "--top-k", "--seed", "--prefill-chunk", "--stats",
        "--json", "--revision", "--raw", "--system", "--think", "--tools", "--think-budget", "--release",
        "--show-thinking",
    ):  # fmt: skip
        assert option in text


def test_help_waits_for_no_import() -> None:
    code = "import sys, mlx_v4flash.cli; print(*{'mlx_lm', 'transformers', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_names_of_the_package() -> None:
    for name in mlx_v4flash.__all__:
        assert getattr(mlx_v4flash, name).__name__ == name and name in dir(mlx_v4flash)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = mlx_v4flash.nothing


def test_default_is_the_tiny_config() -> None:
    assert TINY["model_type"] == "deepseek_v4" and "--real-dims" in run("tiny", "--help").stdout
