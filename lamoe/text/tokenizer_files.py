"""Read the files of a tokenizer: tokenizer.json and the configs beside it. They are untrusted."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, pre_tokenizers

from lamoe import atomic
from lamoe.text import json_file

TEMPLATES = "additional_chat_templates"  # transformers' folder of named chat templates
MAX_FILE_BYTES = 256 << 20  # the largest known tokenizer.json has about 40 MB
# A prefix that is set, or letters that are written as numbers and may spell its name.
_MAY_ABORT = re.compile(r'"continuing_subword_prefix"\s*:\s*"[^"]|\\u00[2-7]')
_MAX_SIDE_FILE_BYTES = 16 << 20
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_MAX_TEMPLATES = 64
# Tokenizer classes that add BOS if neither the config nor a post-processor decides.
_BEGIN_BY_CLASS = re.compile("(Code)?(Llama|Gemma)Tokenizer(Fast)?")


def read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json.

    Raises:
        ValueError: if the file is invalid or larger than MAX_FILE_BYTES.
    """
    if (size := file.stat().st_size) > MAX_FILE_BYTES:
        raise ValueError(
            f"{file} has {size} bytes; a tokenizer.json above {MAX_FILE_BYTES} is not read"
        )
    text = json_file.decode(file.read_bytes(), str(file))
    if _MAY_ABORT.search(text):
        _check_merges(text, file)
    try:
        inner = tokenizers.Tokenizer.from_str(text)
        inner.no_truncation()  # tokenizer.json may ask for either; both change the ids silently
        inner.no_padding()
        if getattr(inner.model, "dropout", None):
            inner.model.dropout = None  # for training: it makes the ids random
        make_splits_linear(inner)
        return inner
    except BaseException as e:  # a Rust panic is a BaseException, but not an Exception
        if isinstance(e, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise ValueError(
            f"{file} is not a tokenizer.json that the tokenizers library can read: {e}"
        ) from None


def _check_merges(text: str, file: Path) -> None:
    """Raise ValueError for merges that do not fit their continuing_subword_prefix.

    The library cuts the prefix off without a look, and ends the whole process where it is missing.
    """
    try:
        model = json.loads(text)["model"]
        prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # the library reports it
    if not isinstance(prefix, str) or not prefix or not isinstance(merges, list):
        return
    for merge in merges:
        right = merge.split(" ")[-1] if isinstance(merge, str) else merge[1:] and merge[-1]
        if not isinstance(right, str) or not right.startswith(prefix):
            raise ValueError(
                f"{file} is not a tokenizer.json that the tokenizers library can read: the merge "
                f"{merge!r} lacks the continuing_subword_prefix {prefix!r}"
            )


def make_splits_linear(inner: tokenizers.Tokenizer) -> None:
    r"""Replace the pattern `\s+$`, by which tokenizers of DeepSeek split text, by a faster equal.

    It takes time quadratic in a run of blanks that is not at the end: it searches again from each
    of them. The other pattern begins at the first blank of a run only. It has the same matches.
    """
    if inner.pre_tokenizer is None:
        return
    state = inner.pre_tokenizer.__getstate__().decode()
    slow, fast = (
        json.dumps({"Regex": p}, separators=(",", ":")) for p in (r"\s+$", r"(?<!\s)\s+$")
    )
    if slow in state:
        made = pre_tokenizers.Sequence([])
        made.__setstate__(state.replace(slow, fast).encode())
        inner.pre_tokenizer = made


def write_pair(folder: Path, tokenizer: str, config: str) -> None:
    """Write tokenizer.json and tokenizer_config.json, which belong together.

    A new folder, or one with no other files, is replaced as a whole. Among other files,
    tokenizer.json is the first to go and the last to come. If the process is killed in between, the
    folder has no tokenizer, which `Tokenizer.load` reports. It never has files of two tokenizers.

    Raises:
        OSError: if the files could not be written. The old ones are still there then.
    """
    contents = {"tokenizer_config.json": config.encode(), "tokenizer.json": tokenizer.encode()}
    folder = Path(os.path.realpath(folder.expanduser()))
    folder.parent.mkdir(parents=True, exist_ok=True)
    is_inside = folder in (here := Path.cwd(), *here.parents)  # a shell would lose its folder
    there = {p.name for p in folder.iterdir()} if folder.is_dir() else None
    if there is None or (there == set(contents) and not is_inside):
        with atomic.replace_folder(folder, size=sum(map(len, contents.values()))) as temporary:
            for name, data in contents.items():
                (temporary / name).write_bytes(data)
        return
    atomic.write_together(folder, contents)


def read_text(file: Path) -> str:
    """Read a small UTF-8 file."""
    if (size := file.stat().st_size) > _MAX_SIDE_FILE_BYTES:
        raise ValueError(f"{file} has {size} bytes; more than {_MAX_SIDE_FILE_BYTES} is not read")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{file} is not UTF-8 text: {e}") from None


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or {} if the file does not exist."""
    return json_file.read_json(file, _MAX_SIDE_FILE_BYTES) if file.is_file() else {}


def read_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return the chat templates of a folder by name. The usual one is called "default".

    Files of their own replace templates of the same name in tokenizer_config.json.

    Args:
        config: the content of tokenizer_config.json.
    """
    templates = {
        **_named_templates(config.get("chat_template"), "tokenizer_config.json"),
        **_named_templates(
            read_json(folder / "chat_template.json").get("chat_template"), "chat_template.json"
        ),
    }
    if (file := folder / "chat_template.jinja").is_file():
        templates["default"] = read_text(file)
    more = sorted((folder / TEMPLATES).glob("*.jinja"))
    if len(more) > _MAX_TEMPLATES:
        raise ValueError(
            f"{TEMPLATES} has {len(more)} files; more than {_MAX_TEMPLATES} are refused"
        )
    return templates | {file.stem: read_text(file) for file in more}


def _named_templates(value: Any, where: str) -> dict[str, str]:
    """Return chat templates by name, from one text, a list of objects, or an object."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {item.get("name"): item.get("template") for item in value}
    if (
        not isinstance(value, dict)
        or len(value) > _MAX_TEMPLATES
        or not all(isinstance(k, str) and isinstance(v, str) for k, v in value.items())
    ):
        raise ValueError(
            f"{where}: chat_template must be a str or a list of at most {_MAX_TEMPLATES} objects "
            "{'name': ..., 'template': ...}"
        )
    return value


def add_tokens(inner: tokenizers.Tokenizer, folder: Path, config: dict[str, Any]) -> None:
    """Apply what the files beside tokenizer.json say about added tokens, as transformers does.

    They can change the flags of added tokens, and turn tokens of the vocabulary into added ones.
    A token that they would append to the vocabulary must get the id that they name.

    Args:
        inner: the tokenizer, which is changed.
        folder: the folder of the files.
        config: the content of tokenizer_config.json and special_tokens_map.json.
    """
    known = {t.content for t in inner.get_added_tokens_decoder().values()}
    named = {k: v for k, v in config.items() if k.endswith("_token") and v}
    named = {k: v for k, v in named.items() if isinstance(v, (str, dict))}
    special = {token_text(v, k) for k, v in named.items()}
    listed, ids = config.get("added_tokens_decoder"), {}
    if listed is None:
        names = read_json(folder / "added_tokens.json")
        listed = {i: {"content": t, "special": t in special} for t, i in names.items()}
        listed = {i: t for i, t in listed.items() if t["content"] not in known}
    if not isinstance(listed, dict):
        raise ValueError(
            f"added_tokens_decoder must be an object of tokens by id, found {type(listed).__name__}"
        )
    for i, value in listed.items():
        if not re.fullmatch("[0-9]{1,9}", str(i)):
            raise ValueError(f"the id of an added token must be a number, found {str(i)[:40]!r}")
        token = _added_token(value, f"added token {i}", special=False)
        token.special = token.special or token.content in special
        ids[int(i)] = token
    inner.add_tokens([ids[i] for i in sorted(ids)])
    for i, token in ids.items():
        if token.content not in known and inner.token_to_id(token.content) != i:
            raise ValueError(
                f"the added token {token.content!r} has id {i}, but behind the vocabulary of "
                f"tokenizer.json it gets id {inner.token_to_id(token.content)}; "
                "save the tokenizer again with transformers"
            )
    known |= {t.content for t in ids.values()}
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if not isinstance(more, (list, dict)):
        raise ValueError(
            f"extra_special_tokens must be a list of tokens, found {type(more).__name__}"
        )
    more = [*named.values(), *(more.values() if isinstance(more, dict) else more)]
    tokens = [_added_token(value, "a special token", special=True) for value in more]
    # A token that the vocabulary lacks gets no id: the model has no weights for it.
    inner.add_tokens(
        [t for t in tokens if t.content not in known and inner.token_to_id(t.content) is not None]
    )


def _added_token(value: Any, key: str, special: bool) -> AddedToken:
    """Return a token that is given as text or as an object with flags."""
    flags = {} if not isinstance(value, dict) else value
    text = token_text(value, key)
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    flags = {"special": special} | {k: flags[k] for k in names if flags.get(k) is not None}
    if text is None or not all(isinstance(v, bool) for v in flags.values()):
        raise ValueError(
            f"{key} must be a str, or an object with content and flags that are true or false; "
            f"found {str(value)[:80]}"
        )
    return AddedToken(text, **{"normalized": not flags["special"]} | flags)


def token_text(value: Any, key: str) -> str | None:
    """Return the text of a token, which is given as text or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key} must be a str, found {type(value).__name__}")
    return value or None


def generation_ids(folder: Path) -> dict[str, list[int]]:
    """Return the ids in generation_config.json by the names bos, eos and pad.

    If it has no EOS, those are the ids in config.json. An id below 0 means none.
    """
    content = read_json(folder / "generation_config.json")
    found = {}
    for name in ("bos", "eos", "pad"):
        key = f"{name}_token_id"
        value = content.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in values):
            raise ValueError(
                f"generation_config.json: {key} must be a token id or a list of them, "
                f"found {value!r}"
            )
        found[name] = [i for i in values if i >= 0]
        if len(found[name]) > 1 and name != "eos":
            raise ValueError(f"generation_config.json: {key} must be one id, found {value!r}")
    if not found["eos"]:
        value = read_json(folder / "config.json").get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        found["eos"] = [i for i in values if type(i) is int and 0 <= i < 1 << 32]
    return found


def first_token(inner: tokenizers.Tokenizer, ids: list[int]) -> str | None:
    """Return the text of the first of `ids`, or None."""
    return inner.id_to_token(ids[0]) if ids else None


def begins_with(inner: tokenizers.Tokenizer, bos: str | None, config: dict[str, Any]) -> bool:
    """Return whether prompts of a model begin with BOS.

    add_bos_token of tokenizer_config.json decides, else the post-processor of tokenizer.json. If
    there is neither, only Llama's and Gemma's tokenizer classes add BOS, as in transformers 4.
    """
    if isinstance(config.get("add_bos_token"), bool):
        return config["add_bos_token"]
    if inner.post_processor is not None and bos is not None:
        return first_added(inner) == bos
    return bool(_BEGIN_BY_CLASS.fullmatch(str(config.get("tokenizer_class"))))


def first_added(inner: tokenizers.Tokenizer) -> str | None:
    """Return the token that the post-processor puts before a text, or None."""
    with_added = inner.encode("a", add_special_tokens=True)
    return with_added.tokens[0] if with_added.special_tokens_mask[:1] == [1] else None


def max_length(config: dict[str, Any]) -> int | None:
    """Return model_max_length, or None if there is no limit (transformers writes 1e30 then)."""
    value = config.get("model_max_length")
    is_limit = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 40
    return value if is_limit else None


def conversion_advice(folder: Path) -> str | None:
    """Say how to make tokenizer.json, if a folder has only older files that it can be made from."""
    if (folder / "tokenizer.json").exists():
        return None
    pieces = [n for n in _SENTENCEPIECE if (folder / n).is_file()]
    merges = [n for n in ("vocab.json", "merges.txt") if (folder / n).is_file()]
    if not pieces and len(merges) < 2:
        return None
    kind = "a SentencePiece file" if pieces else "the files of an older tokenizer"
    return (
        f"{folder} has no tokenizer.json, only {' and '.join(pieces[:1] or merges)}: {kind}, which "
        "lamoe does not read. To make tokenizer.json: pip install transformers sentencepiece, "
        'then python -c "from transformers import AutoTokenizer as T; '
        f"T.from_pretrained('{folder}').save_pretrained('{folder}')\""
    )
