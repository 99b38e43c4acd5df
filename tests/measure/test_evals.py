"""Tests of bits per byte and of needle tests, against direct computations."""

import math
import random

import numpy as np
import pytest
import torch

from lamoe.backends.base import next_token_targets
from lamoe.backends.torch_backend import TorchBackend
from lamoe.checkpoints import hf
from lamoe.engine.generate import generate
from lamoe.engine.sampler import SamplingParams
from lamoe.engine.text_loss import text_loss
from lamoe.measure import needle
from lamoe.model.config import ModelConfig
from lamoe.model.transformer import Transformer
from lamoe.text.tokenizer import Tokenizer
from lamoe.train import checkpoint
from lamoe.train.data import heldout_rows, open_corpus
from tiny_run import BODY, MLA, MOE, trained  # noqa: F401 (trained is a fixture)

CONFIG = ModelConfig(**BODY, **MLA, **MOE)


def rows(n=7, t=12, seed=0):
    """Make rows of two to four documents.

    The second half of the last row is padding: each of its tokens is a segment of its own.
    """
    rng, out = np.random.RandomState(seed), []
    for i in range(n):
        segments = np.sort(rng.randint(0, 4, t + 1)).astype(np.int32)
        if i == n - 1:
            segments[t // 2 :] = 10 + np.arange(t + 1 - t // 2)
        out.append((rng.randint(0, 300, t + 1).astype(np.int64), segments))
    return out


def model(seed=0) -> Transformer:
    return Transformer(CONFIG.replace(initializer_range=0.3)).init_weights(seed).eval()


def test_bits_per_byte_equal_a_direct_computation():
    """Bits per byte equal those of a loop over the targets.

    The loop predicts each target from earlier tokens of its own document only.
    """
    m, nats, targets = model(), 0.0, 0
    with torch.no_grad():
        for ids, segments in rows():
            for j in range(1, len(ids)):
                if segments[j] == segments[j - 1]:
                    start = int(np.flatnonzero(segments == segments[j])[0])
                    # RoPE is relative, so the document may start at position 0.
                    logits = m(torch.from_numpy(ids[None, start:j]))[0, -1]
                    nats, targets = nats - logits.log_softmax(0)[ids[j]].item(), targets + 1
    result = text_loss(TorchBackend(m), rows())
    assert result.targets == targets and result.nats == pytest.approx(nats, rel=1e-5)
    assert result.bits_per_token == pytest.approx(nats / targets / math.log(2), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / targets), rel=1e-4)
    assert result.bits_per_byte(100) == pytest.approx(nats / math.log(2) / 100, rel=1e-5)


def test_without_the_document_mask_other_documents_are_context():
    m, nats = model(), 0.0
    with torch.no_grad():
        for ids, segments in rows():
            nll = (
                -m(torch.from_numpy(ids[None, :-1]))
                .log_softmax(-1)[0]
                .gather(-1, torch.from_numpy(ids[1:, None]))[:, 0]
            )
            nats += nll[torch.from_numpy(segments[1:] == segments[:-1])].sum().item()
    result = text_loss(TorchBackend(m), rows(), document_mask=False)
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert result.nats != pytest.approx(text_loss(TorchBackend(m), rows()).nats, rel=1e-5)


def test_a_uniform_model_needs_log2_of_the_vocabulary():
    m = model()
    torch.nn.init.zeros_(m.head.weight)
    assert text_loss(TorchBackend(m), rows()).bits_per_token == pytest.approx(
        math.log2(300), rel=1e-6
    )
    assert text_loss(TorchBackend(m), rows()).perplexity == pytest.approx(300, rel=1e-5)


def test_bits_per_byte_do_not_depend_on_the_batch_size():
    """Bits per byte do not depend on the batch size.

    An evaluation drops no tokens, and it weights batches by their number of targets.
    """
    m = model()
    whole = text_loss(TorchBackend(m), rows(), batch=7)
    for batch in (1, 2, 3, 100):
        other = text_loss(TorchBackend(m), iter(rows()), batch=batch)
        assert other.nats == pytest.approx(whole.nats, rel=1e-6) and other.targets == whole.targets
        assert np.array_equal(other.load, whole.load)


def test_expert_load():
    load = text_loss(TorchBackend(model()), rows()).load
    assert load.shape == (1, 8) and load.sum(1) == pytest.approx([1.0]) and (load >= 0).all()
    dense = ModelConfig(model_type="llama", **BODY)
    assert text_loss(TorchBackend(Transformer(dense).init_weights()), rows()).load.shape == (0, 0)


@pytest.mark.parametrize(
    "limit, taken", [(1, 1), (12, 1), (24, 2), (36, 3), (40, 3), (83, 4), (84, 7), (10**6, 7)]
)
def test_max_tokens_takes_rows_spread_evenly(limit, taken):
    """max_tokens selects rows that are spread evenly over the 7 rows of the text."""
    m, step = model(), -(-84 // limit)
    result = text_loss(TorchBackend(m), rows(), max_tokens=limit)
    want = text_loss(TorchBackend(m), rows()[::step])
    assert len(rows()[::step]) == taken
    assert result.nats == pytest.approx(want.nats, rel=1e-6)
    assert result.targets == want.targets


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("what", [[], [(np.zeros(5, np.int64), np.arange(5, dtype=np.int32))]])
def test_nothing_to_evaluate_on(what, limit):
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        text_loss(TorchBackend(model()), what, max_tokens=limit)


def test_bits_per_byte_of_a_run(trained):
    """Bits per byte in the metrics of a run equal those of its saved model on the held-out text."""
    import json

    corpus = open_corpus(trained / "data")
    m = hf.load(checkpoint.latest(trained) / "model")
    result = text_loss(TorchBackend(m), heldout_rows(corpus, 32), batch=3)
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert result.bits_per_byte(corpus.heldout_bytes()) == pytest.approx(
        last["heldout_bits_per_byte"], rel=1e-5
    )
    # Every token is a target except the BOS of each document.
    assert result.targets == len(corpus.heldout.tokens) - len(corpus.heldout)


def test_targets_stay_inside_their_document():
    ids, segments = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1, 2]])
    assert next_token_targets(ids, segments).tolist() == [[6, -1, 8, -1]]


# ---- needle in a haystack ----
def own_continuation(m, wrong=()):
    """Return a `make` function whose answers are greedy continuations of random prompts.

    In the draws listed in `wrong`, one token of the answer is replaced.
    """
    count = iter(range(10**6))

    def make(length, depth, draw):
        prompt = [draw.randrange(300) for _ in range(length - 3)]
        answer = [
            p.token_id for p in generate(m, prompt, SamplingParams(temperature=0.0, max_tokens=3))
        ]
        if (n := next(count)) in wrong:
            answer[n % 3] = (answer[n % 3] + 1) % 300
        return prompt, answer

    return make


@pytest.mark.parametrize("chunk", [1, 4, 7, 1024])
def test_needle_results_agree_with_greedy_decoding(chunk, monkeypatch):
    """A needle counts as found exactly if greedy decoding gives every token of the answer.

    Prefill chunks may end anywhere, also inside the answer.
    """
    monkeypatch.setattr(needle, "CHUNK", chunk)
    m = model()
    assert needle.needle(
        TorchBackend(m), own_continuation(m), [8, 30], [0.0, 0.5, 1.0], 3
    ).tolist() == [
        [1, 1],
        [1, 1],
        [1, 1],
    ]
    found = needle.needle(
        TorchBackend(m), own_continuation(m, wrong={0, 4, 8, 9}), [8, 30], [0.0, 0.5, 1.0], 3
    )
    # Draws are numbered by depth, first for length 8, then for length 30.
    assert found == pytest.approx(np.array([[2 / 3, 2 / 3], [2 / 3, 1], [2 / 3, 1]]))


def test_the_draws_of_a_cell_do_not_depend_on_other_cells():
    seen = {}

    def make(length, depth, draw):
        seen.setdefault((length, depth), []).append(draw.random())
        return [1] * (length - 1), [2]

    needle.needle(TorchBackend(model()), make, [4, 9], [0.0, 1.0], 3, seed=5)
    first, seen = dict(seen), {}
    said = []
    needle.needle(TorchBackend(model()), make, [9], [1.0], 2, seed=5, note=said.append)
    assert seen[9, 1.0] == first[9, 1.0][:2]
    assert len(set(sum(first.values(), []))) == 12
    assert said == ["9 tokens: 0% found"]
    seen = {}
    needle.needle(TorchBackend(model()), make, [9], [1.0], 2, seed=6)
    assert seen[9, 1.0] != first[9, 1.0][:2]


@pytest.mark.parametrize(
    "lengths, depths, draws, what",
    [
        ([], [0.5], 1, "at least one length"),
        ([8], [], 1, "at least one length"),
        ([8], [0.5], 0, "at least one length"),
        ([8, 65], [0.5], 1, "haystack of 65 tokens.*max_position_embeddings 64"),
        ([1], [0.5], 1, "haystack of 1 tokens"),
        ([8], [1.5], 1, "depth is 1.5"),
    ],
)
def test_impossible_needle_tests_are_refused(lengths, depths, draws, what):
    with pytest.raises(ValueError, match=what):
        needle.needle(TorchBackend(model()), own_continuation(model()), lengths, depths, draws)


def test_text_needles(trained):
    """The needle lies between two sentences at the requested depth, and the question comes last."""
    tok = Tokenizer.load(checkpoint.latest(trained) / "model")
    text = " ".join(f"Sentence {i} has some words{'.!?'[i % 3]}" for i in range(300))
    make, before = needle.text_needle(tok, [text]), -1
    for depth in (0.0, 0.1, 0.5, 0.9, 1.0):
        prompt, answer = make(900, depth, random.Random(3))
        assert (
            (prompt, answer)
            == make(900, depth, random.Random(3))
            != make(900, depth, random.Random(4))
        )
        assert prompt[0] == tok.bos_id and 890 < len(prompt) + len(answer) <= 900
        said, number = tok.decode(prompt), tok.decode(answer).strip()
        assert len(number) == 5 and number.isdigit()
        city = said.rsplit("The secret number of ", 1)[1].removesuffix(" is")
        assert city in needle.CITIES and said.endswith(f" The secret number of {city} is")
        at = said.index(f" The secret number of {city} is {number}.")
        assert said.count("secret number") == 2
        assert before < at == pytest.approx(depth * (len(said) - 80), abs=40)
        # The needle begins between two sentences.
        assert at == 0 or said[at - 1] in ".!?" or depth == 1.0
        hay = (
            said[:at]
            + said[at:]
            .replace(f" The secret number of {city} is {number}.", "", 1)
            .rsplit(" The secret", 1)[0]
        )
        assert hay.strip() in f"{text} {text}"
        before = at
    with pytest.raises(
        ValueError,
        match="a haystack of 20 tokens is too short for the needle and the question, "
        "which have [0-9]+ tokens",
    ):
        make(20, 0.5, random.Random(3))
    shortest = int(
        str(pytest.raises(ValueError, make, 20, 0.5, random.Random(3)).value)
        .split("which have ")[1]
        .split()[0]
    )
    prompt, answer = make(shortest, 0.5, random.Random(3))  # has only needle and question
    assert len(prompt) + len(answer) == shortest and tok.decode(prompt).count("secret number") == 2
    with pytest.raises(ValueError, match="haystack has no text"):
        needle.text_needle(tok, ["", "  \n "])
