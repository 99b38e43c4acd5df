"""A training recipe: a TOML file, read into checked dataclasses.

Section [model] takes `preset` and any field of ModelConfig. The other sections are dataclasses:
Data and Run here, Optim and Batch in optim.py, Spikes in spikes.py, Balance in model/routing.py. On
the command line `--section.key value` overrides a line of the file.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamoe.backends.load import DEVICES
from lamoe.model.config import ModelConfig, RopeScaling, check_types, did_you_mean
from lamoe.model.field_checks import parse_int
from lamoe.model.routing import Balance
from lamoe.text.json_file import read_json
from lamoe.train.mixing import MIN_SHARE
from lamoe.train.optim import Batch, Optim
from lamoe.train.spikes import Spikes


@dataclass(frozen=True)
class Data:
    """Section [data] of a recipe: the text and how it is split into rows.

    Attributes:
        sources: "stdlib", "austen", files, folders, globs or .jsonl files (see train/sources.py).
        tokenizer: a folder or tokenizer.json. If empty, the tokenizer of run.init_from is used. If
            that is empty too, a new byte-level BPE of model.vocab_size tokens is trained.
        seq_len: number of tokens per row.
        weights: share of each source in the training tokens, one positive number per source; they
            need not add up to 1. Short sources repeat. If empty, all text is read equally often.
        fim_rate: fraction of the training documents that are reordered for fill-in-the-middle (see
            train/fill_in.py). DeepSeek-Coder uses 0.5.
        holdout: fraction of every source's bytes that is held out for evaluation.
        document_mask: whether a token attends only to tokens of its own document.
    """

    sources: tuple[str, ...] = ("stdlib", "austen")
    weights: tuple[float, ...] = ()
    fim_rate: float = 0.0
    tokenizer: str = ""
    seq_len: int = 512
    holdout: float = 0.02
    document_mask: bool = True

    def __post_init__(self):
        check_types(self, "data.")
        if self.seq_len < 1:
            raise ValueError(f"data.seq_len is {self.seq_len}; it must be at least 1")
        if not self.sources:
            raise ValueError("data.sources is empty; name at least one source, for example stdlib")
        if not 0 <= self.holdout <= 0.5:
            raise ValueError(
                f"data.holdout is {self.holdout}; it is the fraction of the text held out for "
                "evaluation, so it must be from 0 to 0.5"
            )
        if self.weights and len(self.weights) != len(self.sources):
            raise ValueError(
                f"data.weights has {len(self.weights)} numbers, and data.sources has "
                f"{len(self.sources)} sources; write one number per source, or leave it out"
            )
        if not all(0 < w < float("inf") for w in self.weights):
            raise ValueError(
                f"data.weights is {list(self.weights)}; each must be a finite number above 0. "
                "To leave a source out, remove it from data.sources"
            )
        if self.weights and min(self.weights) < MIN_SHARE * sum(self.weights):
            raise ValueError(
                f"data.weights is {list(self.weights)}; the smallest share must be at least "
                f"{MIN_SHARE} of all"
            )
        if not 0 <= self.fim_rate <= 1:
            raise ValueError(
                f"data.fim_rate is {self.fim_rate}; it is the fraction of the documents reordered "
                "for fill-in-the-middle, so it must be from 0 to 1"
            )


@dataclass(frozen=True)
class Run:
    """Section [run] of a recipe: start, length, output, logging and saving.

    Attributes:
        out: the run folder.
        init_from: a run folder, model folder or hub id that gives the initial weights and, unless
            data.tokenizer is set, the tokenizer. If empty, the initial weights are random.
        dtype: dtype of the computation. Master weights are float32.
        threads: number of torch's threads. 0 means torch's default.
        device: auto, cpu, cuda or mps. auto means cuda if available, else mps, else cpu.
        compile: whether torch.compile fuses the operations of the blocks, for accelerators. It
            needs dtype bfloat16.
        eval_every: number of steps between evaluations. 0 evaluates at the end only.
        eval_tokens: number of tokens per evaluation. The last evaluation uses all held-out text.
        save_every: number of steps between checkpoints. 0 saves only at the end and on Ctrl-C or
            SIGTERM.
        keep: number of checkpoints to keep. 0 keeps all.
        recompute: whether blocks compute their activations again in the backward pass instead of
            keeping them. Results do not change. "auto" recomputes as few blocks as memory needs.
        memory_gb: memory that the run may use, in GB. 0 means what the machine has available.
    """

    out: str = "runs/model"
    init_from: str = ""
    steps: int = 1000
    dtype: str = "bfloat16"
    seed: int = 0
    threads: int = 0
    device: str = "auto"
    compile: bool = False
    log_every: int = 10
    eval_every: int = 0
    eval_tokens: int = 65536
    save_every: int = 0
    keep: int = 2
    recompute: bool | str = "auto"
    memory_gb: float = 0.0

    def __post_init__(self):
        check_types(self, "run.")
        if self.recompute not in (True, False, "auto"):
            raise ValueError(f"run.recompute is {self.recompute!r}; known: auto, true, false")
        if not 0 <= self.memory_gb < float("inf"):
            raise ValueError(
                f"run.memory_gb is {self.memory_gb}; it must be a finite number of at least 0"
            )
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"run.dtype is {self.dtype!r}; known: bfloat16, float32")
        if self.compile and self.dtype != "bfloat16":
            raise ValueError(
                f"run.compile needs run.dtype bfloat16, found {self.dtype}: torch compiles the "
                "products of the experts in bfloat16 only"
            )
        if self.device not in DEVICES:
            raise ValueError(f"run.device is {self.device!r}; known: {', '.join(DEVICES)}")
        for name, low in dict(
            steps=1,
            threads=0,
            log_every=1,
            eval_every=0,
            eval_tokens=1,
            save_every=0,
            keep=0,
            seed=0,
        ).items():
            if getattr(self, name) < low:
                raise ValueError(f"run.{name} is {getattr(self, name)}; it must be at least {low}")
        if self.seed >= 1 << 32:
            raise ValueError(f"run.seed is {self.seed}; it must be below 2**32")
        if not self.out.strip():
            raise ValueError("run.out is empty; name a folder, for example runs/model")


@dataclass(frozen=True)
class Recipe:
    """A complete training recipe. Unknown sections and keys are refused."""

    model: ModelConfig
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    batch: Batch = field(default_factory=Batch)
    balance: Balance = field(default_factory=Balance)
    spikes: Spikes = field(default_factory=Spikes)
    run: Run = field(default_factory=Run)

    def __post_init__(self):
        check_types(self.balance, "balance.")
        self.balance.check(self.model)
        if self.model.is_moe:
            # Set aux_loss_alpha, so that the saved config.json has the value used in training.
            object.__setattr__(
                self, "model", self.model.replace(aux_loss_alpha=float(self.balance.expert))
            )
        if self.spikes.restarts and not self.run.save_every:
            raise ValueError(
                f"spikes.restarts is {self.spikes.restarts}, but run.save_every is 0, so there "
                "would be no checkpoint to restart from; set run.save_every"
            )
        if self.data.seq_len > self.model.max_position_embeddings:
            raise ValueError(
                f"data.seq_len {self.data.seq_len} is more than model.max_position_embeddings "
                f"{self.model.max_position_embeddings}"
            )

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Recipe:
        """Build a recipe from {section: {key: value}}.

        Raises:
            ValueError: if a section, key or value is invalid. The message names it.
        """
        sections = {f.name: f for f in dataclasses.fields(cls)}
        for name, value in raw.items():
            if name not in sections:
                raise ValueError(
                    f"unknown section [{name}] in the recipe{did_you_mean(name, sections)}; "
                    f"known: {', '.join(sections)}"
                )
            if not isinstance(value, dict):
                raise ValueError(f"{name} must be a section with keys, found {value!r}")
        parts: dict[str, Any] = {"model": _model(dict(raw.get("model", {})))}
        for name, kind in SECTIONS.items():
            parts[name] = _section(kind, name, raw.get(name, {}))
        return cls(**parts)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe from a TOML file, or from the recipe.json of a run.

        Args:
            path: the file.
            overrides: words `--section.key value` or `--section.key=value` that replace lines of
                the file. The type of the field decides what a value means: text is taken as it
                stands, and lists may be written as TOML or with commas.

        Raises:
            ValueError: if a section, key or value is invalid. For an unknown name, the message
                suggests a similar known one.
        """
        path = Path(path)
        if (path / "recipe.json").is_file():
            raise ValueError(f"{path} is a run folder; its recipe is {path / 'recipe.json'}")
        if not path.is_file():
            near = (
                sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
            )
            raise ValueError(
                f"no recipe at {path}{did_you_mean(path.name, near)}"
                + (f"; there are {', '.join(near)}" if near else "")
            )
        raw = read_json(path) if path.suffix == ".json" else _read_toml(path)
        try:
            for (*sections, key), word in _parse(overrides):
                inner = raw
                for section in sections:
                    inner = inner.setdefault(section, {})
                    if not isinstance(inner, dict):
                        raise ValueError(f"{section} must be a section with keys, found {inner!r}")
                inner[key] = word
            return cls.from_dict(raw)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return {section: {key: value}} as stored in recipe.json. `from_dict` is the inverse."""
        out = dataclasses.asdict(self)
        out["model"] = {k: v for k, v in out["model"].items() if v is not None}
        for section in out.values():
            section.update({k: list(v) for k, v in section.items() if isinstance(v, tuple)})
        return out


def _read_toml(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    try:  # Windows editors write a byte order mark, or UTF-16
        return tomllib.loads(data.decode(json.detect_encoding(data)).replace("\r\n", "\n"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        fix = "; write a path with \\ in single quotes" if b"\\" in data else ""
        raise ValueError(f"{path} is not valid TOML: {e}{fix}") from None


SECTIONS = {
    "data": Data,
    "optim": Optim,
    "batch": Batch,
    "balance": Balance,
    "spikes": Spikes,
    "run": Run,
}


def _section(kind, name: str, raw: dict[str, Any]):
    """Build the dataclass `kind` from the keys of section `name`.

    Values are converted to the types of the fields where nothing is lost, see `_converted`.
    """
    types = {f.name: str(f.type) for f in dataclasses.fields(kind)}
    for key in raw:
        if key not in types:
            raise ValueError(f"unknown key {name}.{key}{_hint(name, key, types)}")
    values = {key: _converted(value, types[key]) for key, value in raw.items()}
    for key, value in values.items():
        if types[key] == "str" and not isinstance(value, str):
            shown = f"{value}".lower() if isinstance(value, bool) else value
            raise ValueError(
                f'{name}.{key} must be str, found {shown}; write it in quotes: {key} = "{shown}"'
            )
    return kind(**values)


def _hint(section: str, key: str, known: Iterable[str]) -> str:
    """Suggest the key of this name in another section, or a similar key of this section."""
    for other, kind in {"model": ModelConfig, **SECTIONS}.items():
        if other != section and key in {f.name for f in dataclasses.fields(kind)}:
            return f", did you mean {other}.{key}?"
    return f"{did_you_mean(key, known)}; known: {', '.join(known)}"


def _model(raw: dict[str, Any]) -> ModelConfig:
    preset = _converted(raw.pop("preset", None), "str")
    if isinstance(raw.get("rope_scaling"), dict):
        raw["rope_scaling"] = _section(
            RopeScaling,
            "model.rope_scaling",
            {k: v for k, v in raw["rope_scaling"].items() if k not in ("type", "rope_type")},
        )
    types = {f.name: str(f.type) for f in dataclasses.fields(ModelConfig)}
    for key, value in raw.items():
        if key not in types:
            raise ValueError(f"unknown key model.{key}{_hint('model', key, ['preset', *types])}")
        raw[key] = _converted(value, types[key])
    if preset is None and not raw:
        raise ValueError(
            "the recipe describes no model; set model.preset, for example to tiny, "
            "or the fields of a config"
        )
    return ModelConfig(**raw) if preset is None else ModelConfig.preset(preset).replace(**raw)


# ---- values --------------------------------------------------------------------------------------
class _Word(str):
    """A value from the command line. The type of its field decides what it means."""


_NONE = ("none", "null")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def _converted(value: Any, kind: str) -> Any:
    """Convert a value to the type of its field where nothing is lost, else return it as it is.

    Args:
        value: a value of a TOML file, or a `_Word`.
        kind: the annotation of the field, for example "int | None".
    """
    if isinstance(value, _Word) and "None" in kind and value.strip().lower() in _NONE:
        return None
    if "tuple" in kind:
        items = _items(value, kind) if isinstance(value, str) else value
        items = items if isinstance(items, list) else [items]
        item_kind = next(name for name in ("str", "int", "float") if f"tuple[{name}" in kind)
        converted = tuple(_converted(item, item_kind) for item in items)
        # "int | tuple[int, ...] | None" also takes one value.
        may_be_one = not kind.startswith("tuple") and len(converted) == 1
        return converted[0] if may_be_one else converted
    if isinstance(value, _Word):
        return _typed(value, kind)
    if "int" in kind and isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    return value


def _typed(word: _Word, kind: str) -> Any:
    """Convert a word of the command line. Words that do not fit are returned as they are."""
    lower = word.strip().lower()
    if "bool" in kind and lower in _TRUE + _FALSE:
        return lower in _TRUE
    for name, convert in (("int", parse_int), ("float", float)):
        if name in kind:
            try:
                return convert(word)
            except ValueError:
                pass
    return _unquoted(word) if "str" in kind else _toml(word)


def _items(text: str, kind: str) -> Any:
    """Split the text of a list: a TOML list, or words between commas.

    Names of existing files may hold commas, so the longest run of words that exists is one item.
    """
    text_type = type(text)
    if text.startswith(("[", '"', "'")) and (items := _toml(text)) is not text:
        return items
    words, items = text.split(","), []
    while words:
        taken = 1
        if "str" in kind:
            taken = max(n for n in range(1, len(words) + 1) if n == 1 or _exists(words[:n]))
        items.append(text_type(",".join(words[:taken]).strip()))
        words = words[taken:]
    return items


def _exists(words: list[str]) -> bool:
    path = os.path.expanduser(",".join(words).strip())
    return os.path.exists(path) or (glob.has_magic(path) and bool(glob.glob(path)))


def _unquoted(text: str) -> str:
    """Return the content of a quoted TOML string, and other text as it stands."""
    value = _toml(text) if text.startswith(('"', "'")) else text
    return str(value if isinstance(value, str) else text)


def _toml(text: str) -> Any:
    """Parse a TOML value. Text that is not valid TOML is returned as it is."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _parse(overrides: Sequence[str]) -> Iterator[tuple[list[str], _Word]]:
    """Yield (section and keys, value) of every override."""
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or "." not in word.split("=")[0]:
            raise ValueError(f"cannot read {word!r}; overrides look like --optim.lr 3e-4")
        name, equals, text = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ValueError(
                    f"--{name} needs a value; write --{name}=VALUE for a value that begins with --"
                )
            text = words.pop(0)
        yield name.replace("-", "_").split("."), _Word(text)
