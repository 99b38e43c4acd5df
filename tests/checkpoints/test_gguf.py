"""Tests of GGUF files. The tests write them with the gguf package, as llama.cpp's converter does.

test_tokenizer.py tests the real vocabularies.
"""

import builtins
import itertools
import json

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from lamoe import Tokenizer, checkpoints
from lamoe.checkpoints import gguf as ours
from lamoe.checkpoints import gguf_tokenizer, hf
from lamoe.cli import main
from lamoe.model.config import ModelConfig
from lamoe.model.transformer import Transformer

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=320,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    rope_theta=5000.0,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    torch_dtype="float32",
    bos_token_id=0,
    eos_token_id=1,
    tie_word_embeddings=True,
)
TEXTS = [
    "Hello 1234 world",
    "don't  stop\n\n\tnow",
    "naïve café 日本語 😀",
    "",
    "x = f(10)  # 3.14",
]
TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"


def model_of(config: ModelConfig, seed: int = 0) -> Transformer:
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.2 if p.dim() > 1 else 1.0))
    return model


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a Q or K matrix as the converter of llama.cpp stores them.

    In each head, row j of the first half is followed by row j of the second half.
    """
    half = rows.shape[0] // heads // 2
    order = [
        h * 2 * half + part * half + j for h in range(heads) for j in range(half) for part in (0, 1)
    ]
    return rows[order]


@pytest.fixture(scope="module")
def words() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        [" ".join(TEXTS)] * 2 + ["hello world 12 12 12 don't stop now"] * 3,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>", "<end>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return inner


def write(
    path, model: Transformer, words: tokenizers.Tokenizer, kind: str = "F32", change=None
) -> dict[str, np.ndarray]:
    """Write a GGUF file of `model`. Return its tensors as stored, dequantised.

    Args:
        change: called with facts and tensors before writing, to damage them.
    """
    c = model.config
    vocab = sorted(words.get_vocab().items(), key=lambda item: item[1])
    tokens = [t for t, _ in vocab] + [f"[PAD{i}]" for i in range(len(vocab), c.vocab_size)]
    merges = [
        m if isinstance(m, str) else " ".join(m)
        for m in json.loads(words.to_str())["model"]["merges"]
    ]
    facts = {
        "llama.block_count": c.num_hidden_layers,
        "llama.context_length": c.max_position_embeddings,
        "llama.embedding_length": c.hidden_size,
        "llama.feed_forward_length": c.intermediate_size,
        "llama.attention.head_count": c.num_attention_heads,
        "llama.attention.head_count_kv": c.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "llama.rope.freq_base": c.rope_theta,
        "llama.rope.dimension_count": c.qk_head_dim,
        "llama.vocab_size": c.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3
        + [1] * (len(vocab) - 3)
        + [5] * (c.vocab_size - len(vocab)),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": TEMPLATE,
        "tokenizer.chat_template.tool_use": "{{ tools }}",
    }
    tensors = {}
    for disk, w in hf.views(c, dict(model.named_parameters())).items():
        name = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers).get_name(
            disk, try_suffixes=(".weight",)
        )
        heads = (
            {"q": c.num_attention_heads, "k": c.n_kv_heads}.get(
                disk.removesuffix("_proj.weight")[-1]
            )
            if "self_attn" in disk
            else None
        )
        tensors[name] = (interleaved(w, heads) if heads else w).detach().numpy().copy()
    if change:
        change(facts, tensors)
    writer = gguf.GGUFWriter(path, facts.pop("general.architecture", "llama"))
    for key, value in facts.items():
        add = {
            list: writer.add_array,
            str: writer.add_string,
            bool: writer.add_bool,
            float: writer.add_float32,
            int: writer.add_uint32,
        }[type(value)]
        add(key, value)
    stored = {}
    for name, w in tensors.items():
        as_ = gguf.GGMLQuantizationType["F32" if w.ndim == 1 else kind]
        data = gguf.quants.quantize(w, as_)
        stored[name] = gguf.quants.dequantize(data, as_)
        writer.add_tensor(name, data, raw_dtype=as_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


IDS = torch.arange(2 * 40).reshape(2, 40) * 7 % 320


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"num_key_value_heads": None}, {"head_dim": 24}],
    ids=str,
)
def test_float32_files_give_the_same_model(tmp_path, words, changes):
    config = CONFIG.replace(**changes)
    model = model_of(config)
    write(
        tmp_path / "m.gguf",
        model,
        words,
        change=lambda f, t: (
            f.update({"llama.attention.key_length": 24, "llama.attention.value_length": 24})
            if "head_dim" in changes
            else None
        ),
    )
    found = ours.load(ours.read(tmp_path / "m.gguf"))
    assert found.config == config and torch.equal(found(IDS), model(IDS))


def test_rotary_row_order_against_a_model_with_interleaved_pairs(tmp_path, words):
    """The stored rows give equal logits in a model whose rope rotates pairs (2k, 2k + 1)."""
    stored = write(tmp_path / "m.gguf", model_of(CONFIG), words)
    twin = Transformer(CONFIG.replace(model_type="deepseek_v2")).eval()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    with torch.no_grad():
        for disk, place in hf.views(twin.config, dict(twin.named_parameters())).items():
            place.copy_(torch.from_numpy(stored[names.get_name(disk, try_suffixes=(".weight",))]))
    found, expected = ours.load(ours.read(tmp_path / "m.gguf"))(IDS), twin(IDS)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    "kind, dtype, error",
    [
        ("F16", "float16", 1e-3),
        ("BF16", "bfloat16", 1e-2),
        ("Q8_0", "bfloat16", 2e-2),
        ("Q4_1", "bfloat16", 0.2),
    ],
)
def test_quantised_files_are_dequantised(tmp_path, words, kind, dtype, error):
    model = model_of(CONFIG)
    stored = write(tmp_path / "m.gguf", model, words, kind)
    file = ours.read(tmp_path / "m.gguf")
    assert ours.config_of(file).torch_dtype == dtype and ours.load(
        file
    ).embed.weight.dtype == getattr(torch, dtype)
    exact = ours.load(file, "float32")
    for name, place in (
        ("token_embd", exact.embed.weight),
        ("blk.1.ffn_down", exact.layers[1].ffn.w2.weight),
        ("blk.0.attn_v", exact.layers[0].attn.wv.weight),
    ):
        assert np.array_equal(place.detach().numpy(), stored[f"{name}.weight"])
    wrong = (
        torch.cat(
            [(a - b).flatten() for a, b in zip(exact.parameters(), model.parameters())]
        ).norm()
        / torch.cat([p.flatten() for p in model.parameters()]).norm()
    )
    assert 0 < wrong < error


def test_convert_writes_a_folder_with_model_and_tokenizer(tmp_path, words, capsys):
    model = model_of(CONFIG)
    write(tmp_path / "m.gguf", model, words)
    assert main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "out")]) == 0
    assert torch.equal(checkpoints.load(tmp_path / "out")(IDS), model(IDS))
    tok = Tokenizer.load(tmp_path / "out")
    assert (
        tok.encode_batch(TEXTS) == [words.encode(t, add_special_tokens=False).ids for t in TEXTS]
        and [tok.decode(i) for i in tok.encode_batch(TEXTS)] == TEXTS
    )
    assert (tok.bos_id, tok.eos_id, tok.stop_ids, tok.add_bos, tok.vocab_size) == (
        0,
        1,
        {1, 2},
        True,
        words.get_vocab_size(),
    )
    assert tok.templates == {"default": TEMPLATE, "tool_use": "{{ tools }}"}
    assert (
        tok.apply_chat([{"role": "user", "content": "hi</s>"}])[-1] == 1
        and tok.decode(tok.apply_chat([{"role": "user", "content": "hi</s>"}])) == "hi</s>"
    )
    assert (
        main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "out")]) == 2
        and "is not empty" in capsys.readouterr().err
    )
    assert (
        main(["info", str(tmp_path / "out")]) == 0
        and main(["generate", "--model", str(tmp_path / "m.gguf"), "--prompt", "x"]) == 2
    )
    assert "make a folder of it first: lamoe convert" in capsys.readouterr().err


def test_convert_with_a_tokenizer_from_another_folder(tmp_path, words):
    write(
        tmp_path / "m.gguf",
        model_of(CONFIG),
        words,
        change=lambda f, t: f.update({"tokenizer.ggml.pre": "some-model"}),
    )
    with pytest.raises(
        ValueError,
        match=r"m\.gguf: it splits text as 'some-model', which is not known here; known: gpt-2, "
        r".*--tokenizer",
    ):
        ours.to_folder(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "tok").mkdir()
    words.save(str(tmp_path / "tok" / "tokenizer.json"))
    ours.to_folder(tmp_path / "m.gguf", tmp_path / "out", tokenizer=tmp_path / "tok")
    assert (
        Tokenizer.load(tmp_path / "out").encode("Hello 1234")
        == words.encode("Hello 1234", add_special_tokens=False).ids
    )


@pytest.mark.parametrize("pre", ["llama3", "llama-v3", "pixtral"])
def test_other_names_of_a_splitting_rule(tmp_path, words, pre):
    tokenizers = []
    for name in ("llama-bpe", pre):
        facts = {"tokenizer.ggml.pre": name, "tokenizer.ggml.padding_token_id": 2**32 - 1}
        path, out = tmp_path / f"{name}.gguf", tmp_path / f"out-{name}"
        write(path, model_of(CONFIG), words, change=lambda f, t, facts=facts: f.update(facts))
        ours.to_folder(path, out)
        tokenizers.append((out / "tokenizer.json").read_bytes())
        assert Tokenizer.load(out).pad_id is None
    assert tokenizers[0] == tokenizers[1]


# ---- scored pieces ----
def joined(text: str, scores: dict[str, float]) -> list[str]:
    """Tokenise by the definition of SentencePiece's merging.

    Repeatedly join the neighbours whose concatenation is the piece with the best score. Of equal
    scores, the leftmost pair is joined.
    """
    parts = list(text)
    while found := [
        (-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores
    ]:
        i = min(found)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


@pytest.mark.parametrize("blank", [True, False])
def test_scored_pieces_are_joined_best_first(tmp_path, blank):
    pieces = ["▁", "a", "b", "c", "ab", "bc", "abc", "▁a", "▁ab", "ca", "cab"]
    scores = {p: -float(i * 7 % 11) for i, p in enumerate(pieces)}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    facts = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * 259 + [scores[p] for p in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": blank,
    }
    gguf_tokenizer.write(facts, tmp_path, "m.gguf")
    tok = Tokenizer.load(tmp_path)
    generator = np.random.default_rng(0)
    for text in ["".join(generator.choice(list("abc "), 12)).strip() for _ in range(60)] + [
        "abé\nc"
    ]:
        spelt = ("▁" if blank and text else "") + text.replace(" ", "▁")
        want = [
            i
            for p in joined(spelt, scores)
            for i in ([tokens.index(p)] if p in tokens else [3 + b for b in p.encode()])
        ]
        assert tok.encode(text) == want and tok.decode(want) == text
    assert tok.add_bos and tok.encode("</s>") != [2]


# ---- unsupported and damaged files ----
@pytest.mark.parametrize(
    "facts, tensors, says",
    [
        ({"general.architecture": "qwen2"}, {}, "has the architecture 'qwen2'"),
        (
            {"llama.rope.scaling.type": "linear"},
            {},
            "llama.rope.scaling.type is 'linear', which lamoe does not implement",
        ),
        ({"llama.expert_count": 8}, {}, "llama.expert_count is 8"),
        ({"llama.new_fact": 1}, {}, "llama.new_fact is 1"),
        ({"llama.rope.dimension_count": 8}, {}, "supported: 16"),
        ({"llama.block_count": None}, {}, "does not say llama.block_count"),
        ({"llama.attention.head_count": 5}, {}, "not divisible"),
        ({"split.count": 3}, {}, "one of 3 parts"),
        ({"llama.block_count": 3}, {}, "9 of 29 tensors of its architecture are missing: 'blk.2"),
        ({"llama.feed_forward_length": 95}, {}, "is [96, 64], not [95, 64]"),
        ({"llama.block_count": 2**31 - 1}, {}, "says 2,147,483,647 layers"),
        ({"llama.feed_forward_length": 2**31 - 1}, {}, "not [2147483647, 64]"),
        (
            {
                "llama.feed_forward_length": 2**31 - 1,
                "llama.embedding_length": 2**31 - 8,
                "llama.rope.dimension_count": None,
            },
            {},
            "cannot be built",
        ),
        ({}, {"token_embd.weight": np.ones(64, np.float32)}, "m.gguf"),
        ({"llama.attention.head_count_kv": [2, 4]}, {}, "head_count_kv is [2, 4]; lamoe"),
        ({"llama.attention.head_count_kv": [2, 2, 2]}, {}, "one value for all layers"),
        ({"llama.tensor_data_layout": "reference"}, {}, "tensor_data_layout is 'reference'"),
        ({"llama.attention.causal": False}, {}, "attention.causal is False"),
        ({"llama.rope.scaling.factor": 2.0}, {}, "rope.scaling.factor is 2.0"),
        ({"llama.rope.scale_linear": 0.5}, {}, "rope.scale_linear is 0.5"),
        ({"llama.attention.scale": 0.5}, {}, "attention.scale is 0.5"),
        ({"llama.attention.clamp_kqv": 8.0}, {}, "attention.clamp_kqv is 8.0"),
        ({"llama.attention.sliding_window": 16}, {}, "attention.sliding_window is 16"),
        ({"llama.final_logit_softcapping": 30.0}, {}, "final_logit_softcapping is 30.0"),
        ({"llama.logit_scale": 0.5}, {}, "logit_scale is 0.5"),
        ({"llama.attention.layer_norm_epsilon": 0.5}, {}, "layer_norm_epsilon is 0.5"),
        ({"general.type": "adapter"}, {}, "LoRA adapter and not a model; merge it"),
        ({"general.type": "mmproj"}, {}, "the image projector of a multimodal model"),
        ({"general.architecture": "clip"}, {}, "the image projector"),
        ({"general.type": "vocab"}, {}, "holds a vocabulary"),
        ({}, {"rope_freqs.weight": np.ones(8, np.float32)}, "'rope_freqs.weight'"),
        ({}, {"blk.0.attn_q.bias": np.ones(64, np.float32)}, "1 tensors are not known"),
        ({}, {"token_embd.weight": None}, "no tensor token_embd.weight"),
        ({"tokenizer.ggml.tokens": None}, {}, "no vocabulary"),
        ({"tokenizer.ggml.model": "bert"}, {}, "kind 'bert'"),
        ({"tokenizer.ggml.merges": ["q qqq"]}, {}, "do not belong"),
        ({"tokenizer.ggml.merges": [1, 2]}, {}, "merges is not a list of its type"),
        ({"tokenizer.ggml.tokens": 7}, {}, "tokens is not a list of its type"),
        (
            {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": ["a" * 100_000],
                "tokenizer.ggml.token_type": [1],
                "tokenizer.ggml.scores": [0.0],
            },
            {},
            "too long to be words",
        ),
        ({"tokenizer.ggml.merges": ["qq"]}, {}, "m.gguf: "),
        ({"tokenizer.ggml.bos_token_id": 319}, {}, "bos_token_id is 319, which is no id"),
        ({"tokenizer.ggml.merges": None}, {}, "not complete"),
    ],
)
def test_unsupported_files_are_refused(tmp_path, words, facts, tensors, says):
    def change(f, t):
        for have, new in ((f, facts), (t, tensors)):
            have.update({k: v for k, v in new.items() if v is not None})
            for k in [k for k, v in new.items() if v is None]:
                del have[k]

    write(tmp_path / "m.gguf", model_of(CONFIG), words, change=change)
    with pytest.raises(ValueError) as e:
        ours.to_folder(tmp_path / "m.gguf", tmp_path / "out")
    assert says in str(e.value) and "m.gguf" in str(e.value)
    assert not (tmp_path / "out").exists()


def test_broken_files_are_value_errors(tmp_path, words):
    """Reading a truncated or changed file gives a model or a ValueError that names the file.

    Only the head of the file is damaged. Other exceptions are never raised.
    """
    write(tmp_path / "good.gguf", model_of(CONFIG), words)
    good, bad = (tmp_path / "good.gguf").read_bytes(), tmp_path / "bad.gguf"
    generator, refused = np.random.default_rng(0), 0
    cuts = [good[:n] for n in (0, 3, 8, 20, 24, 100, 900, 5000, len(good) // 2, len(good) - 1)]
    flips = []
    for _ in range(60):
        data = bytearray(good)
        data[
            generator.integers(0, 1200)
            if generator.random() < 0.8
            else generator.integers(1200, 12000)
        ] = generator.integers(0, 256)
        flips.append(bytes(data))
    deep = (
        good[:8]
        + (0).to_bytes(8, "little")
        + (1).to_bytes(8, "little")
        + (1).to_bytes(8, "little")
        + b"a"
        + b"\t\0\0\0"
        + (b"\t\0\0\0" + (1).to_bytes(8, "little")) * 5000
    )
    for data in [*cuts, *flips, deep]:
        bad.write_bytes(data)
        try:
            ours.load(ours.read(bad))
        except ValueError as e:
            assert "bad.gguf" in str(e)
            refused += 1
    assert refused > len(cuts) + 5
    with pytest.raises(ValueError, match="there is no file"):
        ours.read(tmp_path / "none.gguf")


def test_missing_gguf_package_error_says_what_to_install(tmp_path, words, monkeypatch):
    write(tmp_path / "m.gguf", model_of(CONFIG), words)
    real = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *a, **k: (
            (_ for _ in ()).throw(ImportError(name=name)) if name == "gguf" else real(name, *a, **k)
        ),
    )
    with pytest.raises(ValueError, match=r"pip install 'lamoe\[gguf\]'"):
        ours.read(tmp_path / "m.gguf")
