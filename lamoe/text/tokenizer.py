"""Text <-> token ids: byte-level BPE through `tokenizers`, the chat template through sandboxed jinja2, streaming decode.

Nothing here knows a model. tokenizer.json is always read as it is: class guessing (AutoTokenizer) has dropped every space of
DeepSeek's text more than once.

Control tokens - one policy everywhere. A control token is an added token that is marked special or looks like markup (begins with
"<" or contains the full-width bar): DeepSeek-V3 marks `<｜User｜>` as *not* special, so the flag alone would let users forge turns.
Text never becomes a control id by accident: `encode` treats such text as plain text unless `allow_special=True`, and `apply_chat`
gives control ids only to what the template itself wrote, never to what came out of a message.
"""

from __future__ import annotations

import codecs
import itertools
import json
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from lamoe.text.chat_template import V2_TEMPLATE, beginnings_of, render

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPECIAL_TOKENS = (BOS, EOS, "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>")

MAX_FILE_BYTES = 256 << 20  # the largest tokenizer.json in the wild is about 40 MB
_MAX_SIDE_FILE_BYTES = 16 << 20

# Line ends one by one and digits one by one, as DeepSeek's own tokenizer; the rest keeps words, CJK runs and indentation whole.
_CJK = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}"
_SPLIT = "|".join(
    [
        r"[\r\n]",
        r"\p{N}",
        rf"[{_CJK}]+",
        rf" ?[\p{{L}}\p{{M}}&&[^{_CJK}]]+",
        r" ?[^\s\p{L}\p{M}\p{N}]+",
        r"[^\S\r\n]+(?!\S)",  # a run of blanks leaves its last one to the word that follows
        r"[^\S\r\n]+",
    ]
)


def _byte_alphabet() -> dict[str, int]:
    """The byte behind each of the 256 characters that spell byte-level tokens: printable bytes are themselves, the others
    follow in order from U+0100 on."""
    chars = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {c: ord(c) for c in chars if ord(c) < 256}
    rest = sorted(set(range(256)) - set(own.values()))
    return own | dict(zip((c for c in chars if ord(c) >= 256), rest, strict=True))


_BYTE_OF = _byte_alphabet()


class Tokenizer:
    """A vocabulary, its stop tokens and its chat template. Make one with `Tokenizer.load` or `train`.

    `vocab_size` is the largest id + 1: the rows a model needs at least. Released models have more (V2: 102,400 rows for 100,015
    tokens); an id beyond the vocabulary is a padding row and decodes to nothing. `bos_id`, `eos_id`, `pad_id` are int or None,
    `stop_ids` a frozenset (eos and whatever generation_config.json adds), `add_bos` says whether prompts of this model begin with BOS.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        chat_template: str | None = None,
        add_bos: bool = True,
        stop_ids: Iterable[int] = (),
        max_length: int | None = None,
    ):
        inner.no_truncation()  # a file may carry either, and both would change ids in silence
        inner.no_padding()
        inner.encode_special_tokens = True  # i.e. spell special tokens out like any other text
        self.inner = inner
        self._byte_level = isinstance(inner.decoder, decoders.ByteLevel)
        vocab = inner.get_vocab(with_added_tokens=True)
        if not vocab:
            raise ValueError("the tokenizer has an empty vocabulary")
        self.vocab_size = max(vocab.values()) + 1
        self.bos_id, self.eos_id, self.pad_id = (
            _id_of(vocab, t, kind) for t, kind in ((bos, "bos"), (eos, "eos"), (pad, "pad"))
        )
        for i in stop_ids:
            _check_id(i)
        self.stop_ids = frozenset(stop_ids) | ({self.eos_id} if self.eos_id is not None else set())
        self.chat_template, self.add_bos, self.max_length = (
            chat_template,
            add_bos and bos is not None,
            max_length,
        )
        self._bos, self._eos, self._pad = bos, eos, pad
        added = inner.get_added_tokens_decoder()
        self._added = {i: t.content for i, t in added.items()}
        self._skipped = frozenset(i for i, t in added.items() if t.special)
        # A one-character token cannot be told from the character, so it is never control
        self._control = {
            t.content: i
            for i, t in added.items()
            if len(t.content) > 1 and (t.special or _is_markup(t.content))
        }
        self._control_ids = frozenset(self._control.values())
        self._control_re = beginnings_of(self._control)
        # the library spells out only what is marked special; the rest is our business
        self._unmarked_re = beginnings_of(
            t.content for t in added.values() if t.content in self._control and not t.special
        )

    # ---- reading and writing -------------------------------------------------------------------------------------
    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a model folder, or a tokenizer.json (its neighbours are read too). Beside tokenizer.json, all optional:
        tokenizer_config.json, special_tokens_map.json, generation_config.json, chat_template.jinja. ValueError for a broken
        file or a named token that the vocabulary lacks, OSError (FileNotFoundError) when there is no tokenizer.json."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(
                f"no tokenizer at {file}; give a folder with a tokenizer.json, or that file"
            )
        inner, folder = _read_tokenizer(file), file.parent
        config = _read_json(folder / "tokenizer_config.json")
        names = {
            **_read_json(folder / "special_tokens_map.json"),
            **{k: v for k, v in config.items() if v is not None},
        }
        generation = _read_json(folder / "generation_config.json")
        try:
            ids = {
                k: _id_list(
                    generation.get(f"{k}_token_id"), f"generation_config.json: {k}_token_id"
                )
                for k in ("bos", "eos", "pad")
            }
            named = {
                k: _token_text(names.get(f"{k}_token"), f"{k}_token") or _first_token(inner, ids[k])
                for k in ids
            }
            for key, usual in (("bos", BOS), ("eos", EOS)):
                if named[key] is None and inner.token_to_id(usual) is not None:
                    named[key] = usual
            return cls(
                inner,
                **named,
                chat_template=_read_template(folder, config),
                add_bos=config.get("add_bos_token") is not False,
                stop_ids=ids["eos"],
                max_length=_max_length(config),
            )
        except ValueError as e:
            raise ValueError(f"{folder}: {e}") from None

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers' PreTrainedTokenizerFast, vLLM and SGLang read them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._bos,
            "eos_token": self._eos,
            "pad_token": self._pad,
            "add_bos_token": self.add_bos,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": self.chat_template or V2_TEMPLATE,
        }
        if self.max_length is not None:
            config["model_max_length"] = self.max_length
        (folder / "tokenizer.json").write_text(self.inner.to_str(pretty=False), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
        )

    # ---- text to ids ---------------------------------------------------------------------------------------------
    def encode(self, text: str, *, bos: bool = False, allow_special: bool = False) -> list[int]:
        """The ids of `text`, after BOS when `bos`. The text of a control token stays text unless `allow_special`.
        ValueError when text is not a str, holds a lone surrogate, or `bos` is asked of a vocabulary without one."""
        return self.encode_batch([text], bos=bos, allow_special=allow_special)[0]

    def encode_batch(
        self, texts: Sequence[str], *, bos: bool = False, allow_special: bool = False
    ) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        if isinstance(texts, str):
            raise ValueError("encode_batch takes a list of texts, found one str; use encode")
        if bos and self.bos_id is None:
            raise ValueError("this vocabulary has no bos token; leave bos out")
        texts = list(texts)
        for n, text in enumerate(texts):
            _check_text(text, f"text {n}" if len(texts) > 1 else "text")
        head = [self.bos_id] if bos else []
        if allow_special and self._control_re:
            return [head + self._with_controls(text) for text in texts]
        return [head + ids for ids in self._plain(texts)]

    def _plain(self, texts: list[str]) -> list[list[int]]:
        if self._unmarked_re is None or not any(self._unmarked_re.search(t) for t in texts):
            out = [e.ids for e in self.inner.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            out = [
                [
                    i
                    for e in self.inner.encode_batch_fast(self._cut(t), add_special_tokens=False)
                    for i in e.ids
                ]
                for t in texts
            ]
        for text, ids in zip(texts, out):
            if not self._control_ids.isdisjoint(
                ids
            ):  # only a normalizer that rewrites text into a control token gets here
                token = self.inner.id_to_token(next(i for i in ids if i in self._control_ids))
                raise ValueError(
                    f"a text of {len(text)} characters is normalised into the control token {token!r}; remove that part"
                )
        return out

    def _cut(self, text: str) -> list[str]:
        """The text in pieces, cut after the first character of every unmarked control token so that none can match."""
        cuts = [0, *(m.start() + 1 for m in self._unmarked_re.finditer(text)), len(text)]
        return [text[a:b] for a, b in itertools.pairwise(cuts)]

    def _with_controls(self, text: str, drop: str = "") -> list[int]:
        """Ids of text whose control tokens count; the characters of `drop` are taken out of the plain text in between."""
        ids, at = [], 0
        while m := self._control_re.search(text, at) if self._control_re else None:
            ids += self._plain(
                [text[at : m.start()].replace(drop, "") if drop else text[at : m.start()]]
            )[0]
            ids.append(self._control[m[1]])
            at = m.start() + len(m[1])
        return ids + self._plain([text[at:].replace(drop, "") if drop else text[at:]])[0]

    # ---- ids to text ---------------------------------------------------------------------------------------------
    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids` (ints, or a 1-D array / tensor of them). Bytes that are not UTF-8 become U+FFFD; tokens marked special
        are left out when `skip_special`; ids beyond the vocabulary decode to nothing; a negative id is a ValueError."""
        ids = [_check_id(i) for i in ids]
        if not self._byte_level:
            return self.inner.decode(ids, skip_special_tokens=skip_special)
        skipped = self._skipped if skip_special else frozenset()
        return b"".join(self._bytes(i) for i in ids if i not in skipped).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token by itself, special ones spelt out. Of vocabularies that are not byte-level: of its text."""
        return (
            self._bytes(_check_id(token_id))
            if self._byte_level
            else self.decode([token_id], skip_special=False).encode("utf-8")
        )

    def _bytes(self, token_id: int) -> bytes:
        """The bytes behind an id of a byte-level vocabulary. An added token is its own text: the library reads it as spelt-out
        bytes (huggingface/tokenizers 1392), which is how DeepSeek-V2's ö and ü (ids 100003, 100014) come back as U+FFFD elsewhere."""
        token = self._added.get(token_id)
        if token is None:
            token = self.inner.id_to_token(token_id) or ""
            if all(c in _BYTE_OF for c in token):
                return bytes(_BYTE_OF[c] for c in token)
        return token.encode("utf-8")

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        return StreamDecoder(self, skip_special=skip_special)

    def bytes_per_token(self, text: str) -> float:
        """UTF-8 bytes of `text` per token: the compression this vocabulary reaches on it. ValueError for an empty text."""
        ids = self.encode(text)
        if not ids:
            raise ValueError("bytes_per_token needs a text that is not empty")
        return len(text.encode("utf-8")) / len(ids)

    # ---- chat ----------------------------------------------------------------------------------------------------
    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The conversation as the model reads it, for people to look at. For ids use `apply_chat`: the text of a control token
        inside a message looks here like the real one. Errors as there."""
        text, mark = self._render(messages, add_generation_prompt, tools)
        return text.replace(mark, "")

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The ids of a conversation: `messages` are {"role": system | user | assistant | tool, "content": str}. BOS and the other
        control tokens are the template's to write. Without a template in the folder, DeepSeek-V2's is used. ValueError for an
        unknown role, a content that is not a str, tools the template does not know, or a template that fails or runs away."""
        return self._with_controls(*self._render(messages, add_generation_prompt, tools))

    def _render(self, messages, add_generation_prompt, tools) -> tuple[str, str]:
        text, mark = render(
            self.chat_template or V2_TEMPLATE,
            messages,
            tools=tools,
            control_tokens=tuple(self._control),
            bos_token=self._bos or "",
            eos_token=self._eos or "",
            add_generation_prompt=bool(add_generation_prompt),
        )
        _check_text(text, "the conversation")
        return text, mark


class StreamDecoder:
    """Text as its ids arrive: `piece = s.step(id)` ("" while a character is incomplete), `s.flush()` for the rest at the end.

    The pieces joined are exactly `decode` of all ids, for any ids. Byte-level vocabularies go through the UTF-8 decoder of the
    standard library, constant work a token: tokenizers' DecodeStream decodes an undecodable tail again at every step (quadratic
    on the garbage of an untrained model), has no flush, and raises on broken byte-fallback runs.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True):
        self._tokenizer, self._inner, self._skip_special = tokenizer, tokenizer.inner, skip_special
        self._skipped = tokenizer._skipped if skip_special else frozenset()
        self._utf8 = (
            codecs.getincrementaldecoder("utf-8")("replace") if tokenizer._byte_level else None
        )
        self._context: list[
            int
        ] = []  # ids already shown, kept because a decoder may treat the first token apart
        self._pending: list[int] = []

    def step(self, token_id: int) -> str:
        token_id = _check_id(token_id)
        token = self._inner.id_to_token(token_id)
        if token is None or token_id in self._skipped:
            return ""
        if self._utf8 is not None:
            return self._utf8.decode(self._tokenizer._bytes(token_id))
        self._pending.append(token_id)
        # one more byte can change how a whole run of byte tokens reads, so a run is shown when it is over
        return "" if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else self._show()

    def flush(self) -> str:
        """What is left: U+FFFD for a character that never came to its end. The stream can be used anew afterwards."""
        text = self._utf8.decode(b"", final=True) if self._utf8 is not None else self._show()
        self.__init__(self._tokenizer, skip_special=self._skip_special)
        return text

    def _show(self) -> str:
        shown = len(self._inner.decode(self._context, skip_special_tokens=False))
        text = self._inner.decode(self._context + self._pending, skip_special_tokens=False)[shown:]
        self._context, self._pending = self._pending or self._context, []
        return text


def train(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = SPECIAL_TOKENS
) -> Tokenizer:
    """Learn a byte-level BPE vocabulary of `vocab_size` tokens, specials and the 256 bytes included, from an iterable of str.

    The first special token is BOS, the second EOS and padding; their ids are 0, 1, ... The same texts give the same vocabulary.
    It is smaller than asked only when the texts have no more pairs to merge. ValueError when vocab_size leaves no room for every
    byte, when there is no text, or when something else than str comes.
    """
    least = 256 + len(special_tokens)
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < least:
        raise ValueError(
            f"vocab_size is {vocab_size!r}; it must be at least {least}: 256 bytes and {len(special_tokens)} special tokens"
        )
    if (
        len(special_tokens) < 2
        or len(set(special_tokens)) != len(special_tokens)
        or not all(special_tokens)
    ):
        raise ValueError(
            f"special_tokens needs at least BOS and EOS, all different and not empty; found {list(special_tokens)!r}"
        )
    if isinstance(texts, str):
        raise ValueError("train takes an iterable of texts, found one str; put it into a list")
    seen = 0

    def checked():
        nonlocal seen
        for n, text in enumerate(texts):
            _check_text(text, f"training text {n}")
            seen += len(text)
            yield text

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    specials = [AddedToken(t, special=True, normalized=False) for t in special_tokens]
    inner.train_from_iterator(
        checked(),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=sorted(_BYTE_OF),
            show_progress=False,
        ),
    )
    if not seen:
        raise ValueError("there is no text to train a tokenizer on: the corpus is empty")
    bos, eos = special_tokens[:2]
    inner.post_processor = (
        processors.TemplateProcessing(  # for programs that let tokenizer.json add BOS
            single=[bos, "$A"],
            pair=[bos, "$A", bos, "$B:1"],
            special_tokens=[(bos, inner.token_to_id(bos))],
        )
    )
    return Tokenizer(inner, bos=bos, eos=eos, pad=eos)


# ---- checks and files ----------------------------------------------------------------------------------------------------
def _is_markup(content: str) -> bool:
    return content.startswith("<") or "｜" in content


def _check_text(text: Any, what: str):
    if not isinstance(text, str):
        raise ValueError(f"{what} must be a str, found {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(
            f"{what} holds a lone surrogate (U+{ord(text[e.start]):04X} at character {e.start}), which no UTF-8 text can; "
            "decode the source with errors='replace'"
        ) from None


def _check_id(i: Any) -> int:
    try:
        i = operator.index(i)
    except TypeError:
        raise ValueError(f"a token id must be an integer, found {type(i).__name__}") from None
    if not 0 <= i < 1 << 32:
        raise ValueError(f"token id {i} is out of range; ids are 0 or more, and below 2^32")
    return i


def _id_of(vocab: dict[str, int], token: str | None, kind: str) -> int | None:
    if token is not None and token not in vocab:
        raise ValueError(
            f"the {kind} token {token!r} is not in the vocabulary of {len(vocab)} tokens"
        )
    return None if token is None else vocab[token]


def _read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    if (size := file.stat().st_size) > MAX_FILE_BYTES:
        raise ValueError(
            f"{file} has {size} bytes; a tokenizer.json above {MAX_FILE_BYTES} is not read"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except BaseException as e:  # a Rust panic arrives as a BaseException that is not an Exception
        if isinstance(e, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise ValueError(
            f"{file} is not a tokenizer.json that the tokenizers library can read: {e}"
        ) from None


def _read_text(file: Path) -> str:
    if (size := file.stat().st_size) > _MAX_SIDE_FILE_BYTES:
        raise ValueError(f"{file} has {size} bytes; more than {_MAX_SIDE_FILE_BYTES} is not read")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{file} is not UTF-8 text: {e}") from None


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, {} when there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(_read_text(file))
    except (json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"{file} is not valid JSON: {e}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, found {type(content).__name__}")
    return content


def _read_template(folder: Path, config: dict[str, Any]) -> str | None:
    if (file := folder / "chat_template.jinja").is_file():
        return _read_text(file)
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next(
            (
                t.get("template")
                for t in template
                if isinstance(t, dict) and t.get("name") == "default"
            ),
            template,
        )
    if template is not None and not isinstance(template, str):
        raise ValueError(
            f"chat_template must be a str or a list with one named default, found {type(template).__name__}"
        )
    return template


def _token_text(value: Any, key: str) -> str | None:
    """A token is named by its text or by an object with its text as `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key} must be a str, found {type(value).__name__}")
    return value or None


def _id_list(value: Any, key: str) -> list[int]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in values):
        raise ValueError(f"{key} must be a token id or a list of them, found {value!r}")
    return values


def _first_token(inner: tokenizers.Tokenizer, ids: list[int]) -> str | None:
    return inner.id_to_token(ids[0]) if ids else None


def _max_length(config: dict[str, Any]) -> int | None:
    """transformers writes 1e30 for 'unlimited'."""
    value = config.get("model_max_length")
    return (
        value
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 40
        else None
    )
