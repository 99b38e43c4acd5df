"""Tests of lm-eval's unchanged local-completions adapter against the server.

Log-likelihoods equal those of the model itself. Generation and a small task work.

lm-eval installs about 45 packages in more than a minute, so it has its own extra:
`make test-lm-eval`.
"""

import os

import pytest
import torch

from tiny_server import NAME, Running, llm, model, tok

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
lm_eval = pytest.importorskip(
    "lm_eval",
    reason="NOT TESTED: lm-eval against the server. lm-eval is not installed; "
    "run `make test-lm-eval`",
)

from lm_eval import evaluator  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402

DOCS = [
    {"question": f"the {a} sat on", "choices": ["a mat", "the hill", "rain"], "answer": i % 3}
    for i, a in enumerate(("cat", "dog", "bird", "hill", "mat", "rain"))
]


@pytest.fixture(scope="module")
def server():
    with Running(llm) as s:
        yield s.wait_ready()


@pytest.fixture(params=["huggingface", "auto"])
def lm(server, request, tmp_path):
    """Return the adapter.

    Its tokenizer comes from a folder, or with "auto" from the server over HTTP.
    """
    tok().save(tmp_path / "tokenizer")
    where = {"tokenizer": str(tmp_path / "tokenizer")} if request.param == "huggingface" else {}
    made = get_model("local-completions")(
        base_url=f"{server.url}/v1/completions",
        model=NAME,
        tokenizer_backend=request.param,
        batch_size=4,
        num_concurrent=1,
        max_retries=1,
        **where,
    )
    assert made.tokenizer_backend == ("remote" if request.param == "auto" else "huggingface")
    return made


def loglikelihood(context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Compute (log-likelihood, whether greedy decoding gives it) in one forward pass."""
    ids = context + continuation
    with torch.no_grad():
        logp = model()(torch.tensor([ids]))[0, len(context) - 1 : -1].log_softmax(-1)
    return float(sum(logp[i, t] for i, t in enumerate(continuation))), bool(
        (logp.argmax(-1) == torch.tensor(continuation)).all()
    )


def instance(kind: str, *args) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


def test_loglikelihood(lm):
    pairs = [("the cat", " sat on a mat"), ("one bird", " sang"), ("rain", " in spring\n")]
    context = tok().encode("the cat")
    with torch.no_grad():
        best = int(model()(torch.tensor([context]))[0, -1].argmax())
    pairs.append(("the cat", tok().decode([best])))
    got = lm.loglikelihood([instance("loglikelihood", *p) for p in pairs])
    for (before, after), (value, greedy) in zip(pairs, got):
        whole, head = tok().encode(before + after), tok().encode(before)
        want = loglikelihood(head, whole[len(head) :])
        assert value == pytest.approx(want[0], abs=1e-3) and greedy == want[1], (before, after)


def test_generate_until(lm, server):
    got = lm.generate_until(
        [
            instance(
                "generate_until",
                "the cat",
                {"until": ["zzz"], "max_gen_toks": 8, "temperature": 0.0},
            )
        ]
    )
    want = server.complete(tok().encode("the cat"), max_tokens=8, temperature=0)["choices"][0][
        "text"
    ]
    assert got == [want]


def test_task(lm):
    import datasets

    task = ConfigurableTask(
        config={
            "task": "tiny",
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(DOCS)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    )
    results = evaluator.evaluate(
        lm=lm, task_dict={"tiny": task}, bootstrap_iters=0, log_samples=True
    )

    def scores(doc) -> list[float]:
        head = tok().encode(doc["question"])
        return [
            loglikelihood(head, tok().encode(doc["question"] + " " + c)[len(head) :])[0]
            for c in doc["choices"]
        ]

    right = [max(range(3), key=scores(d).__getitem__) == d["answer"] for d in DOCS]
    assert results["results"]["tiny"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert len(results["samples"]["tiny"]) == len(DOCS)
