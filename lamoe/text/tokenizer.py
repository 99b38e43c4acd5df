"""Convert text to token ids and back, render chats, decode streams, train a vocabulary.

The `tokenizers` library does the BPE, from tokenizer.json as it is. In contrast, AutoTokenizer
chooses a class by the model's name, which once lost the spaces in DeepSeek's text.

Control tokens follow one policy. A control token is an added token that is marked special or looks
like markup: it begins with "<" or contains the full-width bar. The flag alone is not enough:
DeepSeek-V3 does not mark `<｜User｜>` as special, so users could forge turns. Text becomes a
control id only on purpose: `encode` does so only with `allow_special=True`, and `apply_chat` only
for what the template wrote, never for the content of a message.
"""

from __future__ import annotations

import codecs
import functools
import itertools
import json
import logging
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from lamoe.text import tokenizer_files as files
from lamoe.text.chat_template import Templates, free_mark, render
from lamoe.text.control_tokens import Encoder

log = logging.getLogger("lamoe.text")
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
FILL_IN_TOKENS = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
SPECIAL_TOKENS = (BOS, EOS, "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>")

# Line ends and digits are split one by one, as in DeepSeek's own tokenizer. Words, CJK runs and
# indentation stay whole.
_CJK = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}"
_SPLIT = "|".join(
    [
        r"[\r\n]",
        r"\p{N}",
        rf"[{_CJK}]+",
        rf" ?[\p{{L}}\p{{M}}&&[^{_CJK}]]+",
        r" ?[^\s\p{L}\p{M}\p{N}]+",
        r"[^\S\r\n]+(?!\S)",  # blanks, without the one that belongs to the next word
        r"[^\S\r\n]+",
    ]
)
_TO_WORDS = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
_TO_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PRE_TOKENIZER = pre_tokenizers.Sequence([_TO_WORDS, _TO_BYTES])


def _byte_alphabet() -> dict[str, int]:
    """Return the byte for each of the 256 characters that spell byte-level tokens.

    Printable bytes are spelt as themselves. The others are U+0100, U+0101, ... in order.
    """
    chars = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {c: ord(c) for c in chars if ord(c) < 256}
    rest = sorted(set(range(256)) - set(own.values()))
    return own | dict(zip((c for c in chars if ord(c) >= 256), rest, strict=True))


BYTE_OF = _byte_alphabet()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece spells missing characters


class Tokenizer:
    """A vocabulary with stop tokens and a chat template. Make one with `Tokenizer.load` or `train`.

    Attributes:
        vocab_size: the largest id + 1. A model needs at least this many embedding rows. Released
            models have more (V2: 102,400 rows for 100,015 tokens). Ids beyond the vocabulary decode
            to the empty text.
        bos_id, eos_id, pad_id: token ids, or None if the vocabulary has no such token.
        stop_ids: ids that end a reply: EOS and those in generation_config.json or config.json.
        add_bos: whether prompts of this model begin with BOS.
        control_tokens: the texts of the control tokens.
        max_length: model_max_length of tokenizer_config.json, or None.
        templates: the chat templates by name.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        chat_template: str | Mapping[str, str] | None = None,
        add_bos: bool = True,
        stop_ids: Iterable[int] = (),
        max_length: int | None = None,
    ):
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
        eos_ids = {self.eos_id} if self.eos_id is not None else set()
        self.stop_ids = frozenset(stop_ids) | eos_ids
        self.templates = Templates(
            {"default": chat_template} if isinstance(chat_template, str) else chat_template or {}
        )
        self.max_length = max_length
        self.add_bos = add_bos and bos is not None
        self._bos, self._eos, self._pad = bos, eos, pad
        added = inner.get_added_tokens_decoder()
        self._added = {i: t.content for i, t in added.items()}
        self._skipped = frozenset(i for i, t in added.items() if t.special)
        self._control = {
            t.content: i for i, t in added.items() if t.special or _is_markup(t.content)
        }
        self.control_tokens = frozenset(self._control)
        self._control_ids = frozenset(self._control.values())
        self._encoder = Encoder(inner, self._control)

    # ---- reading and writing ---------------------------------------------------------------------
    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read the tokenizer of a model folder.

        Besides tokenizer.json it reads, if they exist, tokenizer_config.json,
        special_tokens_map.json, added_tokens.json, generation_config.json, chat_template.jinja,
        chat_template.json and additional_chat_templates/*.jinja. If generation_config.json names no
        EOS, the ids in config.json end a reply.

        Args:
            path: the folder, or the tokenizer.json in it.

        Raises:
            FileNotFoundError: if there is no tokenizer.json.
            ValueError: if a file is invalid, or names a token that the vocabulary lacks.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(
                files.conversion_advice(file.parent)
                or f"no tokenizer at {file}; give a folder with a tokenizer.json, or that file"
            )
        inner, folder = files.read_tokenizer(file), file.parent
        config = files.read_json(folder / "tokenizer_config.json")
        names = {
            **files.read_json(folder / "special_tokens_map.json"),
            **{k: v for k, v in config.items() if v is not None},
        }
        try:
            files.add_tokens(inner, folder, names)
            ids = files.generation_ids(folder)
            named = {
                k: files.token_text(names.get(f"{k}_token"), f"{k}_token")
                or files.first_token(inner, ids[k])
                for k in ids
            }
            for key, usual in (("bos", BOS), ("eos", EOS)):
                if named[key] is None and inner.token_to_id(usual) is not None:
                    named[key] = usual
            named["bos"] = named["bos"] or files.first_added(inner)
            if named["pad"] is not None and inner.token_to_id(named["pad"]) is None:
                log.warning("%s: the pad token %r has no id; ignored", folder, named["pad"])
                named["pad"] = None
            return cls(
                inner,
                **named,
                chat_template=files.read_templates(folder, config),
                add_bos=files.begins_with(inner, named["bos"], config),
                stop_ids=ids["eos"],
                max_length=files.max_length(config),
            )
        except ValueError as e:
            raise ValueError(f"{folder}: {e}") from None

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json for transformers, vLLM and SGLang.

        The two files change together, see tokenizer_files.write_pair.
        """
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._bos,
            "eos_token": self._eos,
            "pad_token": self._pad,
            "add_bos_token": self.add_bos,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": self.templates.to_config(),
        }
        if self.max_length is not None:
            config["model_max_length"] = self.max_length
        text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        files.write_pair(Path(folder), self.inner.to_str(pretty=False), text)

    # ---- text to ids -----------------------------------------------------------------------------
    def encode(self, text: str, *, bos: bool = False, allow_special: bool = False) -> list[int]:
        """Return the ids of `text`.

        Args:
            text: the text to encode.
            bos: whether to begin with BOS.
            allow_special: whether the text of a control token becomes its id. If False, it is
                encoded as plain text.

        Raises:
            ValueError: if `text` is not a str or holds a lone surrogate, or there is no BOS token.
        """
        return self.encode_batch([text], bos=bos, allow_special=allow_special)[0]

    def encode_batch(
        self, texts: Sequence[str], *, bos: bool = False, allow_special: bool = False
    ) -> list[list[int]]:
        """Return the ids of every text, encoded on all cores. See `encode`."""
        if isinstance(texts, str):
            raise ValueError("encode_batch takes a list of texts, found one str; use encode")
        if bos and self.bos_id is None:
            raise ValueError("this vocabulary has no bos token; leave bos out")
        texts = list(texts)
        for n, text in enumerate(texts):
            _check_text(text, f"text {n}" if len(texts) > 1 else "text")
        head = [self.bos_id] if bos else []
        encode = self._encoder.with_controls if allow_special else self._encoder.plain
        return [head + ids for ids in encode(texts)]

    def encode_fill_in(
        self, prefix: str | Sequence[int], suffix: str, tokens: tuple[str, str, str]
    ) -> list[int]:
        """Return the ids of a prompt that asks for the text between a prefix and a suffix.

        Args:
            prefix: a text, or ids without BOS.
            suffix: the text after the gap.
            tokens: the control tokens before the prefix, between the two, and after the suffix.

        Raises:
            ValueError: see `encode`; also if the texts use all 32 noncharacters.
        """
        begin, hole, end = tokens
        for text in (prefix, suffix) if isinstance(prefix, str) else (suffix,):
            _check_text(text, "text")
        if isinstance(prefix, str):
            mark = free_mark([*self._control, prefix, suffix])
            return self._encoder.between(["", prefix, suffix, ""], tokens, mark)
        mark = free_mark([*self._control, suffix])
        rest = self._encoder.between(["", suffix, ""], (hole, end), mark)
        return [self._control[begin], *prefix, *rest]

    @property
    def fill_in_ids(self) -> tuple[int, ...] | None:
        """The ids of FILL_IN_TOKENS, or None if one is missing."""
        ids = tuple(self._control[t] for t in FILL_IN_TOKENS if t in self._control)
        return ids if len(ids) == len(FILL_IN_TOKENS) else None

    # ---- ids to text -----------------------------------------------------------------------------
    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`.

        Bytes that are not UTF-8 become U+FFFD. Ids beyond the vocabulary decode to nothing.

        Args:
            ids: integers, or a 1-D array or tensor.
            skip_special: whether to leave out tokens that are marked special.

        Raises:
            ValueError: if an id is negative or not an integer.
        """
        ids = [_check_id(i) for i in ids]
        if not self._byte_level:
            return self.inner.decode(ids, skip_special_tokens=skip_special)
        skipped = self._skipped if skip_special else frozenset()
        return b"".join(self._bytes(i) for i in ids if i not in skipped).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token. The bytes of a special token are those of its name.

        For vocabularies that are not byte-level, these are the bytes of the token within a text: a
        blank at its beginning is kept.
        """
        token_id = _check_id(token_id)
        if self._byte_level or token_id in self._added:
            return self._bytes(token_id)
        if byte := _BYTE_TOKEN.fullmatch(self.inner.id_to_token(token_id) or ""):
            return bytes.fromhex(byte[1])
        before, shown = self._neighbour
        return self.inner.decode([before, token_id], skip_special_tokens=False)[shown:].encode()

    @functools.cached_property
    def _neighbour(self) -> tuple[int, int]:
        """Return an ordinary token and the length of its text, to decode other tokens after it."""
        ordinary = (i for i in range(self.vocab_size) if i not in self._added)
        for i in itertools.islice(ordinary, 10_000):
            if (text := self.decode([i])) and text.isalnum():
                return i, len(text)
        return 0, len(self.decode([0], skip_special=False))

    def _bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token of a byte-level vocabulary.

        An added token stands for its own text. The library reads it as byte characters instead
        (huggingface/tokenizers issue 1392) and decodes DeepSeek-V2's added ö and ü (ids 100003 and
        100014) to U+FFFD.
        """
        token = self._added.get(token_id)
        if token is None:
            token = self.inner.id_to_token(token_id) or ""
            if all(c in BYTE_OF for c in token):
                return bytes(BYTE_OF[c] for c in token)
        return token.encode("utf-8")

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """Return a decoder for ids that arrive one by one."""
        return StreamDecoder(self, skip_special=skip_special)

    def bytes_per_token(self, text: str) -> float:
        """Return the compression of `text` in UTF-8 bytes per token.

        Raises:
            ValueError: if the text is empty.
        """
        ids = self.encode(text)
        if not ids:
            raise ValueError("bytes_per_token needs a text that is not empty")
        return len(text.encode("utf-8")) / len(ids)

    # ---- chat ------------------------------------------------------------------------------------
    @property
    def chat_template(self) -> str | None:
        """The usual chat template, or None."""
        return self.templates.usual

    @chat_template.setter
    def chat_template(self, source: str | None) -> None:
        self.templates = Templates({} if source is None else {**self.templates, "default": source})

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the conversation as text, for people to read. Errors are those of `apply_chat`.

        Use `apply_chat` to get ids. In this text, a control token that the template wrote looks
        like the same text in a message.
        """
        text, mark = self._render(messages, add_generation_prompt, tools, options)
        return text.replace(mark, "")

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
        continued: bool = False,
        check: Callable[[str], object] = lambda text: None,
    ) -> list[int]:
        """Return the ids of a conversation.

        The template writes BOS and the other control tokens. If the folder has no template,
        DeepSeek-V2's is used.

        Args:
            messages: {"role": "system", "user", "assistant" or "tool", "content": str}.
            add_generation_prompt: whether to end with the beginning of the assistant's turn.
            tools: descriptions of functions, for templates that use them.
            options: further variables for the template, for example enable_thinking.
            continued: end where the last message ends, which must be the assistant's.
            check: called with the rendered text before it is tokenized; may raise.

        Raises:
            ValueError: if a role is unknown, a content is not a str, the template does not know
                tools, or the template fails (see chat_template.render).
        """
        text, mark = self._render(messages, add_generation_prompt, tools, options, continued)
        check(text)
        return self._encoder.marked(text, mark)

    def _render(
        self, messages, add_generation_prompt, tools, options, continued=False
    ) -> tuple[str, str]:
        text, mark = render(
            self.templates.choose_for(messages, tools),
            messages,
            tools=tools,
            options=options,
            continued=continued,
            control_tokens=tuple(self._control),
            bos_token=self._bos or "",
            eos_token=self._eos or "",
            **({} if self._pad is None else {"pad_token": self._pad}),
            add_generation_prompt=bool(add_generation_prompt),
        )
        _check_text(text, "the conversation")
        return text, mark


class StreamDecoder:
    """Decodes ids that arrive one by one. Call `step` for each id, then `flush`.

    The joined results equal `decode` of all ids, for any ids. Byte-level vocabularies use the
    incremental UTF-8 decoder of the standard library, which needs constant time per token. The
    library's DecodeStream decodes an incomplete end again at every step (quadratic on the output of
    an untrained model), has no flush, and raises on incomplete byte-fallback runs.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True):
        self._tokenizer, self._inner = tokenizer, tokenizer.inner
        self._skipped = tokenizer._skipped if skip_special else frozenset()
        self._utf8 = (
            codecs.getincrementaldecoder("utf-8")("replace") if tokenizer._byte_level else None
        )
        # Ids already decoded, kept because a decoder may treat the first token in a special way.
        self._context: list[int] = []
        self._pending: list[int] = []

    def step(self, token_id: int) -> str:
        """Add an id and return the new text, or "" while a character is incomplete."""
        token_id = _check_id(token_id)
        token = self._inner.id_to_token(token_id)
        if token is None or token_id in self._skipped:
            return ""
        if self._utf8 is not None:
            return self._utf8.decode(self._tokenizer._bytes(token_id))
        self._pending.append(token_id)
        # The next byte can change the text of a whole run of byte tokens, so wait for its end.
        return "" if _BYTE_TOKEN.fullmatch(token) else self._decode_pending()

    def flush(self) -> str:
        """Return the rest of the text and reset the decoder.

        A character that is still incomplete becomes U+FFFD.
        """
        if self._utf8 is not None:
            return self._utf8.decode(b"", final=True)  # also resets the decoder
        text = self._decode_pending()
        self._context, self._pending = [], []
        return text

    def _decode_pending(self) -> str:
        shown = len(self._inner.decode(self._context, skip_special_tokens=False))
        text = self._inner.decode(self._context + self._pending, skip_special_tokens=False)[shown:]
        self._context, self._pending = self._pending or self._context, []
        return text


def train(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = SPECIAL_TOKENS
) -> Tokenizer:
    """Learn a byte-level BPE vocabulary. The same texts always give the same vocabulary.

    Args:
        texts: strings.
        vocab_size: number of tokens, including special tokens and the 256 bytes. The vocabulary is
            smaller if the texts have no more pairs to merge.
        special_tokens: texts of the tokens with the ids 0, 1, ... The first is BOS, the second EOS
            and padding.

    Raises:
        ValueError: if `vocab_size` is below 256 plus the special tokens, there is no text, or an
            item is not a str.
    """
    least = 256 + len(special_tokens)
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < least:
        raise ValueError(
            f"vocab_size is {vocab_size!r}; it must be at least {least}: 256 bytes and "
            f"{len(special_tokens)} special tokens"
        )
    if (
        len(special_tokens) < 2
        or len(set(special_tokens)) != len(special_tokens)
        or not all(special_tokens)
    ):
        raise ValueError(
            "special_tokens needs at least BOS and EOS, all different and not empty; "
            f"found {list(special_tokens)!r}"
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
    inner.pre_tokenizer = PRE_TOKENIZER
    inner.decoder = decoders.ByteLevel()
    specials = [AddedToken(t, special=True, normalized=False) for t in special_tokens]
    inner.train_from_iterator(
        checked(),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=sorted(BYTE_OF),
            show_progress=False,
        ),
    )
    if not seen:
        raise ValueError("there is no text to train a tokenizer on: the corpus is empty")
    bos, eos = special_tokens[:2]
    # For programs that let tokenizer.json add BOS.
    inner.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"],
        pair=[bos, "$A", bos, "$B:1"],
        special_tokens=[(bos, inner.token_to_id(bos))],
    )
    return Tokenizer(inner, bos=bos, eos=eos, pad=eos)


# ---- checks --------------------------------------------------------------------------------------
def _is_markup(content: str) -> bool:
    return len(content) > 1 and (content.startswith("<") or "｜" in content)


def _check_text(text: Any, what: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{what} must be a str, found {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(
            f"{what} holds a lone surrogate (U+{ord(text[e.start]):04X} at character {e.start}), "
            "which no UTF-8 text can; decode the source with errors='replace'"
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
