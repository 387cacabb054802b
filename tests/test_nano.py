"""Training of the small model: its data, its model beside ours, its optimizer, and going on from a state."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from random import Random
from typing import Any
from xml.etree import ElementTree

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from known import TALK, answers_to

from mlx_v4flash import Chat as Talk
from mlx_v4flash import Model, load, load_model, nano_folder
from mlx_v4flash.byte_tokenizer import write_byte_tokenizer
from mlx_v4flash.config import ModelConfig
from mlx_v4flash.encoding import Encoding
from mlx_v4flash.tiny import TINY

WHY = "NOT CHECKED, TRAINING OF THE SMALL MODEL: install the extra `test`"
torch = pytest.importorskip("torch", reason=WHY)

from nano import rounding, shipped  # noqa: E402
from nano.baselines import ByteCounts, compressed_bits  # noqa: E402
from nano.chats import CALCULATOR, Chat, Chats, arithmetic, expression_of  # noqa: E402
from nano.data import Corpus, Mix  # noqa: E402
from nano.evaluate import answers_right, as_stored, greedy, rounding_cost, states  # noqa: E402
from nano.export import export  # noqa: E402
from nano.grouped import grouped_mm  # noqa: E402
from nano.layers import Training  # noqa: E402
from nano.model import Nano  # noqa: E402
from nano.optimizer import orthogonal  # noqa: E402
from nano.plot import draw_experts, plot  # noqa: E402
from nano.recipe import CONFIG, PHASES, WARMUP, Phase, phase_at, tokens_before  # noqa: E402
from nano.smalltalk import small_talk  # noqa: E402
from nano.tokenizer import MARKS, save_tokenizer, train_tokenizer  # noqa: E402
from nano.train import Shared, Worker, balanced, trim_log  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

KINDS = ["chat", "sums", "tools", "pairs", "glossary", "copy", "needle", "name"]
MEANINGS = [(f"{a}{b}{c}o", "noun", f"what comes {b}ter {a}") for a in "bdfgklmnp" for b in "aei" for c in "rst"]
TEXTS = ["It was a long night, and nothing happened. " * 40, "Of ships and shoes and sealing wax. " * 50]


@pytest.fixture(scope="module")
def chats() -> Chats:
    return Chats(MEANINGS, TEXTS)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, chats: Chats) -> Corpus:
    """A corpus of made-up tokens, with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("nano")
    write_byte_tokenizer(folder, 272)
    return Corpus(Encoding.from_folder(folder), {"bible": np.arange(5000, dtype=np.uint16) % 272}, chats)


# --- conversations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_model_says_has_weight(corpus: Corpus, kind: str) -> None:
    for seed in range(20):
        chat = corpus.chats.make(kind, Random(seed), 300)
        ids, weights = corpus.encode(chat)
        text = "".join(
            corpus.encoding.vocabulary.decode([i]) if w == 1 else "\0" for i, w in zip(ids, weights, strict=True)
        )
        spoken = [part for part in text.split("\0") if part]
        answers = [m for m in chat.messages if m["role"] == "assistant"]
        assert len(spoken) == len(answers)
        for part, message in zip(spoken, answers, strict=True):
            assert part.endswith("<｜end▁of▁sentence｜>") and message["content"] in part
        # Thoughts are rendered in the last turn, and everywhere if there are tools.
        assert (answers[-1].get("reasoning_content") or "") in spoken[-1]


def test_answers_are_read_back(corpus: Corpus) -> None:
    """Our own parser finds the call in what the model is taught to write."""
    chat = next(c for s in range(99) if (c := corpus.chats.make("tools", Random(s), 300)).messages[1]["content"] == "")
    ids, weights = corpus.encode(chat)
    first = weights.index(1.0)
    parser = corpus.encoding.parser(think="high" if chat.thinks else "off", tools=True)
    for token in ids[first : ids.index(corpus.eos, first)]:
        parser.feed(token)
    parser.finish()
    (found,) = parser.message["tool_calls"]
    call = chat.messages[1]["tool_calls"][0]["function"]
    assert found["function"]["name"] == call["name"]
    assert json.loads(found["function"]["arguments"]) == json.loads(call["arguments"])


@pytest.mark.parametrize("thinks", [True, False])
def test_sums_and_their_steps_are_true(thinks: bool) -> None:
    for seed in range(300):
        question, answer, steps = arithmetic(Random(seed), thinks)
        expression, result = answer.removesuffix(".").split(" = ")
        assert eval(expression) == int(result) and result in steps
        for left, right in re.findall(r"([\d+*-]+)=(-?\d+)", steps):
            assert eval(re.sub(r"\b0+(?=\d)", "", left)) == int(right), steps


def test_the_calculators_results_are_true() -> None:
    for seed in range(300):
        question, expression, result = expression_of(Random(seed))
        assert eval(expression) == int(result)
        assert all(number in question for number in re.findall(r"\d+", expression))
    assert CALCULATOR["name"] == "calculator"


@pytest.mark.parametrize("kind", ["pairs", "needle", "glossary"])
def test_what_is_asked_for_was_said(chats: Chats, kind: str) -> None:
    for seed in range(50):
        messages = chats.make(kind, Random(seed), 600).messages
        before, answer = "".join(m["content"] for m in messages[:-1]), messages[-1]["content"]
        assert answer.removesuffix(".").split(" is ")[-1] in before


def test_longer_room_gives_longer_conversations(corpus: Corpus) -> None:
    sizes = [
        np.mean([len(corpus.encode(corpus.chats.make("pairs", Random(s), room))[0]) for s in range(30)])
        for room in (200, 800, 3200)
    ]
    assert sizes[0] < sizes[1] < sizes[2]


def test_small_talk_has_every_part() -> None:
    for questions, answers, thought in small_talk():
        assert all(questions) and all(answers) and thought.endswith(".")


def test_batches_depend_on_their_seed_alone(corpus: Corpus) -> None:
    mix = Mix(length=64, text=0.5, kinds=dict.fromkeys(KINDS, 1.0))
    a, b, c = (corpus.batch(mix, 8, seed) for seed in ((1, 2), (1, 2), (1, 3)))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True)) and not np.array_equal(a[0], c[0])
    assert a[0].shape == (8, 65) and (a[1] == 1).all(1).sum() == 4


def test_tokenizer_has_the_marks(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(["some words, 1234 of them; some more words"] * 9, 300), tmp_path)
    vocabulary = Encoding.from_folder(tmp_path).vocabulary
    ids = vocabulary.encode(["some words <think> 1234\n"])
    assert vocabulary.decode(ids) == "some words <think> 1234\n"
    assert min(ids) >= len(MARKS), "text must not become a mark"
    assert [vocabulary.decode([i]) for i in ids[-5:]] == ["1", "2", "3", "4", "\n"]
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    assert [(t["content"], t["special"]) for t in added] == [(m, n < 3) for n, m in enumerate(MARKS)]


# --- arithmetic --------------------------------------------------------------------------------------------


def test_grouped_product_and_its_gradient() -> None:
    counts = torch.tensor([3, 0, 4])
    x, w = torch.randn(7, 5, requires_grad=True), torch.randn(3, 6, 5, requires_grad=True)
    y = grouped_mm(x, w, counts)
    expert = torch.repeat_interleave(torch.arange(3), counts)
    expected = torch.einsum("snk,sk->sn", w[expert], x)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, (x, w), dy), torch.autograd.grad(expected, (x, w), dy), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rounding_is_that_of_the_formats() -> None:
    x = torch.cat([torch.linspace(-7, 7, 1001), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])])
    fp4 = np.clip(x.numpy(), -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(rounding.round_fp4(x.clamp(-6, 6)).numpy(), fp4)
    y = torch.randn(3, 64)
    expected = mx.hadamard_transform(mx.array(y.numpy()))
    np.testing.assert_allclose(rounding.hadamard(y).numpy(), np.array(expected), atol=1e-6)


def test_rounding_passes_the_gradient() -> None:
    w = torch.randn(130, 160, requires_grad=True)
    for rounded in (rounding.fp8_weight, rounding.fp4_weight):
        (gradient,) = torch.autograd.grad(rounded(w).sum(), w)
        assert (gradient == 1).all() and not torch.equal(rounded(w), w)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 20)])
def test_orthogonal_evens_out_singular_values(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) @ torch.diag(torch.linspace(0.3, 3, shape[-1]))
    values = torch.linalg.svdvals(orthogonal(x))
    assert values.min() > 0.5 and values.max() < 1.4


def test_hash_tables_are_balanced() -> None:
    model = tiny_model()
    frequency = 1 / (1 + torch.arange(model.c.vocab_size, dtype=torch.float64))
    table = balanced(frequency, model.c)
    load = torch.zeros(model.c.n_routed_experts, dtype=torch.float64)
    load.index_add_(0, table.flatten(), frequency.repeat_interleave(table.shape[1]))
    assert all(len(set(row)) == len(row) for row in table.tolist())
    assert load.max() / load.mean() < 1.6


def test_byte_counts_compress() -> None:
    text = b"the cat sat on the mat and the dog sat on the cat. " * 30
    counts = ByteCounts(text[:1200], 4)
    assert counts.bits_per_byte(text[1200:]) < 0.7 < counts.bits_per_byte(b"zqxjkvbw" * 5)
    # The probabilities of all next bytes sum to one.
    total = sum(counts._probability(text[:20] + bytes([b]), 20) for b in range(256))
    assert abs(total - 1) < 1e-9
    assert set(compressed_bits(text[1200:], text[:1200])) == {"gzip", "xz"}


# --- the model ------------------------------------------------------------------------------------------------

# Sizes of TINY, but 16 instead of 128 tokens per HCA row, so that a short text fills some.
SMALL: dict[str, Any] = TINY | {"compress_ratios": [0, 4, 16, 4, 16], "sliding_window": 64, "index_topk": 8}


def tiny_model(settings: dict[str, Any] = SMALL) -> Nano:
    torch.manual_seed(1)
    model = Nano(ModelConfig.from_dict(settings, "test")).eval()
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("tid2eid"):
            p.copy_(torch.randint(0, model.c.n_routed_experts, p.shape))
        elif name.endswith(("norm.weight", "attn_sink", "gate.bias", "base")):
            p.data += 0.2 * torch.randn(p.shape)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Nano, Path]:
    model, folder = tiny_model(), tmp_path_factory.mktemp("exported")
    tokens = tmp_path_factory.mktemp("tokens")
    write_byte_tokenizer(tokens, SMALL["vocab_size"])
    export(model, tokens, folder, {"nano": True}, SMALL)
    as_stored(model, {"Experts", "Weights", "Norm", "Gate"})
    return model, folder


def logits_of(model: Model, ids: np.ndarray) -> np.ndarray:
    return np.array(model(mx.array(ids[None])))[0]


def test_the_exported_model_is_the_trained_one(exported: tuple[Nano, Path]) -> None:
    """Every mechanism: rows are chosen from token 32 on, HCA rows exist, the window ends at 64."""
    model, folder = exported
    ids = np.random.default_rng(2).integers(0, SMALL["vocab_size"], 192)
    how = Training(dtype=torch.float32, sparse=True, rounding=False)
    with torch.no_grad():
        theirs = model.logits(torch.from_numpy(ids)[None], how)[0].numpy()
    ours = logits_of(load_model(folder, dtype="float32", simulate_cache_quant=False), ids)
    error = np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2))
    assert error < 5e-6, f"relative error {error:.1e}"


def test_cache_rounding_is_that_of_the_exported_model(exported: tuple[Nano, Path]) -> None:
    model, folder = exported
    ids = np.random.default_rng(3).integers(0, SMALL["vocab_size"], 128)
    how = Training(dtype=torch.float32, sparse=True, rounding=True)
    with torch.no_grad():
        theirs = model.logits(torch.from_numpy(ids)[None], how)[0].numpy()
    ours = logits_of(load_model(folder, dtype="float32"), ids)
    # A value between two codes may fall either way, so a few positions differ by more.
    assert np.median(np.abs(ours - theirs).max(1)) < 1e-3


def test_the_indexer_learns_and_disturbs_nothing_else() -> None:
    model = tiny_model().train()
    ids = torch.randint(0, SMALL["vocab_size"], (2, 128))
    how = Training(dtype=torch.float32, sparse=True, index_stride=2)
    loss = model(ids, how)[1].sum()
    loss.backward()
    for name, p in model.named_parameters():
        learns = p.grad is not None and bool((p.grad != 0).any())
        assert learns == (".indexer." in name), name


def test_rounding_costs_more_the_more_is_rounded() -> None:
    model, ids = tiny_model(), torch.randint(0, SMALL["vocab_size"], (1, 64))
    cost = rounding_cost(model, ids)
    assert 0 < cost["layers to FP8"] < cost["both"] and 0 < cost["experts to FP4"]
    as_stored(model, {"Experts", "Weights"})
    assert rounding_cost(model, ids)["both"] < 1e-6, "what is rounded already loses nothing more"


def test_greedy_continues_and_is_graded_right(corpus: Corpus) -> None:
    """What the model itself says is, graded as an answer, right; another answer is not."""
    model, how = tiny_model(SMALL | {"vocab_size": 272}), Training(dtype=torch.float32)
    prompt = corpus.encoding.prompt([{"role": "user", "content": "Hello"}], think="off")
    (said,) = greedy(model, [prompt], 3, corpus.eos, how)
    both = greedy(model, [prompt, prompt[:-3]], 3, corpus.eos, how)
    assert both[0] == said and len(said) == 3
    h = states(model, [prompt], how)[0, len(prompt) - 1]
    assert model.head(h, how).argmax().item() == said[0]

    class Fixed:
        def encode(self, answer: list[int]) -> tuple[list[int], list[float]]:
            return prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer)

    other = [*said[:2], (said[2] + 1) % 272]
    assert answers_right(model, Fixed(), [said, other], how) == [[True], [False]]  # type: ignore[arg-type, list-item]


# --- the recipe and the loop ------------------------------------------------------------------------------------


def test_rates_rise_stay_and_fall() -> None:
    last = PHASES[-1].until
    rates = [phase_at(step)[1] for step in range(last)]
    assert rates[0] < rates[WARMUP] == rates[2000] == 1.0 and rates[-1] < 0.01
    assert max(abs(a - b) for a, b in zip(rates[WARMUP:], rates[WARMUP + 1 :], strict=False)) < 0.01
    with pytest.raises(ValueError, match="expected one before"):
        phase_at(last)
    assert tokens_before(last) > 25_000_000 and tokens_before(1) == PHASES[0].rows * PHASES[0].mix.length


def test_the_recipe_has_every_mechanism() -> None:
    assert {0, 4, 128} == set(CONFIG["compress_ratios"])
    assert 0 < CONFIG["num_hash_layers"] < CONFIG["num_hidden_layers"]
    assert CONFIG["index_topk"] < 2048 // 4 and CONFIG["sliding_window"] == 128
    assert PHASES[-1].rounding and PHASES[-1].sparse


MIX = Mix(length=64, text=0.5, kinds={"chat": 1.0})
SHORT_PHASES = (Phase(2, MIX, 4, sparse=False, rounding=False), Phase(4, MIX, 4, sparse=True, rounding=True))


def run_steps(folder: Path, corpus: Corpus, until: int) -> Shared:
    shared = Shared(1, SMALL, torch.ones(SMALL["vocab_size"], dtype=torch.float64), folder)
    phases = [p for p in SHORT_PHASES if p.until <= until]
    Worker(0, 1, shared, threading.Barrier(1), folder, corpus.batch, phases, compiled=False).run()
    return shared


def test_going_on_equals_not_stopping(tmp_path: Path, corpus: Corpus) -> None:
    """State and log of two steps and two more are those of four; both phases and the balance of experts take part."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = run_steps(tmp_path / "whole", corpus, 4)
    run_steps(tmp_path / "parts", corpus, 2)
    parts = run_steps(tmp_path / "parts", corpus, 4)
    for (name, a), b in zip(whole.model.state_dict().items(), parts.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert any((layer.ffn.gate.bias != 0).any() for layer in whole.model.layers if not layer.ffn.gate.hashed)
    losses = [
        [line.split(",")[:6] for line in (tmp_path / name / "log.csv").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 5


def test_steps_taken_again_are_logged_once(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("step,text\n1,5.0\n2,4.0\n3,3.0\n")
    trim_log(log, 2)
    assert log.read_text() == "step,text\n1,5.0\n2,4.0\n"


def test_two_processes_learn_what_one_does(tmp_path: Path, corpus: Corpus) -> None:
    """Threads stand for processes here: parameters and gradients are shared alike."""
    results = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        shared = Shared(count, SMALL, torch.ones(SMALL["vocab_size"], dtype=torch.float64), folder)
        tokens, weights = (torch.from_numpy(a) for a in corpus.batch(MIX, 4, (1,)))
        for rank in range(count):
            worker = Worker(rank, count, shared, None, folder, corpus.batch, compiled=False)
            worker._backward(tokens, weights, Phase(1, MIX, 4, sparse=False, rounding=False))
            for name, p in shared.model.named_parameters():
                assert p.grad is shared.gradients[rank][name]
        results.append({n: sum(g[n] for g in shared.gradients) for n in shared.gradients[0]})
        assert sorted(s.name for r in range(count) for s in shared.slots(r, count)) == sorted(results[-1])
    for name, one in results[0].items():
        scale = one.abs().max()
        assert (one - results[1][name]).abs().max() <= 0.02 * scale + 1e-6, name


def test_plot_shows_the_log(tmp_path: Path) -> None:
    rows = [f"{n},{n * 1000},{5 - n / 100},{0 if n % 2 else 3}" for n in range(1, 301)]
    (tmp_path / "log.csv").write_text("\n".join(["step,tokens,text,chat", *rows]) + "\n")
    plot(tmp_path / "log.csv", tmp_path / "log.svg")
    lines = ElementTree.parse(tmp_path / "log.svg").getroot().findall("{*}polyline")
    text, chat = ([tuple(map(float, p.split(","))) for p in line.attrib["points"].split()] for line in lines)
    assert text[0][1] < text[-1][1], "a loss that falls goes down in the picture"
    assert len({y for _, y in chat}) == 1, "steps without conversations are left out"
    assert all(0 <= x <= 640 and 0 <= y <= 320 for x, y in text + chat)


def test_experts_are_drawn_by_their_shares() -> None:
    root = ElementTree.fromstring(draw_experts([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]]))
    bars = [float(bar.attrib["height"]) for bar in root.findall("{*}rect") if bar.get("class") == "bar"]
    assert len(bars) == 6 and bars[0] == max(bars) and bars[3] == bars[4]
    assert bars[1] / bars[0] == pytest.approx(0.6, abs=0.01)


# --- the exported checkpoint -------------------------------------------------------------------------------------


def test_fewer_bits_diverge_more(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("In the beginning there was a small model. " * 9)
    native, fewer = shipped.divergences(nano_folder(), ["native", "192gb"], text, 64, 32)
    assert native["kld"] < 1e-6 < fewer["kld"] and fewer["model_bytes"] < native["model_bytes"]
    assert native["reference_perplexity"] == fewer["reference_perplexity"] and native["tokens"] == 64


def test_recall_counts_right_answers(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """One conversation ends with what the model answers, another with something else."""
    right, wrong = Chat(), Chat()
    right.say("Hello.", "OK.")
    right.say(TALK[1], answers_to(TALK[1])[0])
    wrong.say(TALK[1], "The capital of France is Rome.")
    made = iter([right, wrong, right, right])
    monkeypatch.setattr(shipped, "recall_chat", lambda corpus, r, distance, pairs: next(made))
    assert shipped.recall(Talk(*load(nano_folder())), corpus, 60, 4, 1) == 0.75


@pytest.mark.slow
def test_sample_chats_are_whole() -> None:
    found = shipped.sample_chats(Talk(*load(nano_folder())))
    assert len(found) == 5 and all(chat["messages"][-1]["role"] == "assistant" for chat in found)
    assert found[1]["messages"][-1]["reasoning_content"] and found[4]["messages"][1]["tool_calls"]


def test_the_calculator_computes() -> None:
    assert [shipped.computed(f'{{"expression": "{e}"}}') for e in ("12 * 3", "7-9", "8/2")] == ["36", "-2", "4"]
    assert shipped.computed("{}").startswith("error: ")
