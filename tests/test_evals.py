"""Bits per byte against a direct computation."""

import math

import numpy as np
import pytest
import torch
from tiny_run import BODY, MLA, MOE, trained  # noqa: F401 (trained is a fixture)

from lamoe import evals
from lamoe.config import ModelConfig
from lamoe.convert import hf
from lamoe.model import Transformer
from lamoe.train import checkpoint
from lamoe.train.data import heldout_rows, open_corpus

CONFIG = ModelConfig(**BODY, **MLA, **MOE)


def rows(n=7, t=12, seed=0):
    """Rows of two to four documents; the last one is padding from its middle on, each place a segment of its own."""
    rng, out = np.random.RandomState(seed), []
    for i in range(n):
        segments = np.sort(rng.randint(0, 4, t + 1)).astype(np.int32)
        if i == n - 1:
            segments[t // 2 :] = 10 + np.arange(t + 1 - t // 2)
        out.append((rng.randint(0, 300, t + 1).astype(np.int64), segments))
    return out


def model(seed=0) -> Transformer:
    return Transformer(CONFIG.replace(initializer_range=0.3)).init_weights(seed).eval()


def test_against_a_direct_computation():
    """Token by token: each target's negative log-probability given its own document's earlier tokens of the row, and nothing else."""
    m, nats, targets = model(), 0.0, 0
    with torch.no_grad():
        for ids, segments in rows():
            for j in range(1, len(ids)):
                if segments[j] == segments[j - 1]:
                    start = int(np.flatnonzero(segments == segments[j])[0])
                    logits = m(torch.from_numpy(ids[None, start:j]))[0, -1]  # rotary positions are relative, so it may begin at 0
                    nats, targets = nats - logits.log_softmax(0)[ids[j]].item(), targets + 1
    result = evals.text_loss(m, rows())
    assert result.targets == targets and result.nats == pytest.approx(nats, rel=1e-5)
    assert result.bits_per_token == pytest.approx(nats / targets / math.log(2), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / targets), rel=1e-4)
    assert result.bits_per_byte(100) == pytest.approx(nats / math.log(2) / 100, rel=1e-5)


def test_without_the_document_mask_other_documents_are_context():
    m, nats, targets = model(), 0.0, 0
    with torch.no_grad():
        for ids, segments in rows():
            nll = -m(torch.from_numpy(ids[None, :-1])).log_softmax(-1)[0].gather(-1, torch.from_numpy(ids[1:, None]))[:, 0]
            nats += nll[torch.from_numpy(segments[1:] == segments[:-1])].sum().item()
    result = evals.text_loss(m, rows(), document_mask=False)
    assert result.nats == pytest.approx(nats, rel=1e-5) and result.nats != pytest.approx(evals.text_loss(m, rows()).nats, rel=1e-5)


def test_a_uniform_model_needs_log2_of_the_vocabulary():
    m = model()
    torch.nn.init.zeros_(m.head.weight)
    assert evals.text_loss(m, rows()).bits_per_token == pytest.approx(math.log2(300), rel=1e-6)
    assert evals.text_loss(m, rows()).perplexity == pytest.approx(300, rel=1e-5)


def test_independent_of_the_batch_size():
    """Also of what shares a batch: no token is dropped in an evaluation, and shares are weighted by targets."""
    m = model()
    whole = evals.text_loss(m, rows(), batch=7)
    for batch in (1, 2, 3, 100):
        other = evals.text_loss(m, iter(rows()), batch=batch)
        assert other.nats == pytest.approx(whole.nats, rel=1e-6) and other.targets == whole.targets
        assert np.array_equal(other.load, whole.load)


def test_expert_load():
    load = evals.text_loss(model(), rows()).load
    assert load.shape == (1, 8) and load.sum(1) == pytest.approx([1.0]) and (load >= 0).all()
    dense = ModelConfig(model_type="llama", **BODY)
    assert evals.text_loss(Transformer(dense).init_weights(), rows()).load.shape == (0, 0)


@pytest.mark.parametrize("limit, taken", [(1, 1), (12, 1), (24, 2), (36, 3), (40, 3), (83, 4), (84, 7), (10**6, 7)])
def test_max_tokens_takes_rows_spread_evenly(limit, taken):
    """7 rows of 12 positions."""
    m, step = model(), -(-84 // limit)
    result = evals.text_loss(m, rows(), max_tokens=limit)
    want = evals.text_loss(m, rows()[::step])
    assert len(rows()[::step]) == taken and result.nats == pytest.approx(want.nats, rel=1e-6) and result.targets == want.targets


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("what", [[], [(np.zeros(5, np.int64), np.arange(5, dtype=np.int32))]])
def test_nothing_to_evaluate_on(what, limit):
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        evals.text_loss(model(), what, max_tokens=limit)


def test_bits_per_byte_of_a_run(trained):
    """The figure in the metrics is that of the saved model on the held-out text."""
    import json

    corpus = open_corpus(trained / "data")
    m = hf.load(checkpoint.latest(trained) / "model")
    result = evals.text_loss(m, heldout_rows(corpus, 32), batch=3)
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert result.bits_per_byte(corpus.heldout_bytes()) == pytest.approx(last["heldout_bits_per_byte"], rel=1e-5)
    assert result.targets == len(corpus.heldout.tokens) - len(corpus.heldout)  # all but each document's BOS


def test_shift():
    ids, segments = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1, 2]])
    assert evals.shift(ids, segments).tolist() == [[6, -1, 8, -1]]
