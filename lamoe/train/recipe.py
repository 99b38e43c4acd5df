"""A training recipe: a TOML file, read into checked dataclasses.

Section [model] takes `preset` and any field of ModelConfig. The other sections are dataclasses:
Data and Run here, Optim and Batch in optim.py, Balance in model/routing.py. On the command line
`--section.key value` overrides a line of the file.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamoe.model.config import ModelConfig, RopeScaling, check_types, did_you_mean
from lamoe.model.routing import Balance
from lamoe.train.optim import Batch, Optim


@dataclass(frozen=True)
class Data:
    """Section [data] of a recipe: the text and how it is split into rows.

    Attributes:
        sources: "stdlib", "austen", files, folders, globs or .jsonl files (see train/sources.py).
        tokenizer: a folder or tokenizer.json. If empty, the tokenizer of run.init_from is used. If
            that is empty too, a new byte-level BPE of model.vocab_size tokens is trained.
        seq_len: number of tokens per row.
        holdout: fraction of every source's bytes that is held out for evaluation.
        document_mask: whether a token attends only to tokens of its own document.
    """

    sources: tuple[str, ...] = ("stdlib", "austen")
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


@dataclass(frozen=True)
class Run:
    """Section [run] of a recipe: start, length, output, logging and saving.

    Attributes:
        out: the run folder.
        init_from: a run folder, model folder or hub id that gives the initial weights and, unless
            data.tokenizer is set, the tokenizer. If empty, the initial weights are random.
        dtype: dtype of the computation. Master weights are float32.
        threads: number of torch's threads. 0 means torch's default.
        eval_every: number of steps between evaluations. 0 evaluates at the end only.
        eval_tokens: number of tokens per evaluation. The last evaluation uses all held-out text.
        save_every: number of steps between checkpoints. 0 saves only at the end and on Ctrl-C or
            SIGTERM.
        keep: number of checkpoints to keep. 0 keeps all.
    """

    out: str = "runs/model"
    init_from: str = ""
    steps: int = 1000
    dtype: str = "bfloat16"
    seed: int = 0
    threads: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_tokens: int = 65536
    save_every: int = 0
    keep: int = 2

    def __post_init__(self):
        check_types(self, "run.")
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"run.dtype is {self.dtype!r}; known: bfloat16, float32")
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
        if not self.out:
            raise ValueError("run.out is empty; name a folder, for example runs/model")


@dataclass(frozen=True)
class Recipe:
    """A complete training recipe. Unknown sections and keys are refused."""

    model: ModelConfig
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    batch: Batch = field(default_factory=Batch)
    balance: Balance = field(default_factory=Balance)
    run: Run = field(default_factory=Run)

    def __post_init__(self):
        check_types(self.balance, "balance.")
        self.balance.check(self.model)
        if self.model.is_moe:
            # Set aux_loss_alpha, so that the saved config.json has the value used in training.
            object.__setattr__(
                self, "model", self.model.replace(aux_loss_alpha=float(self.balance.expert))
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
        for name, kind in dict(
            data=Data, optim=Optim, batch=Batch, balance=Balance, run=Run
        ).items():
            parts[name] = _section(kind, name, raw.get(name, {}))
        return cls(**parts)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe from a TOML file.

        Args:
            path: the TOML file.
            overrides: words `--section.key value` or `--section.key=value` that replace lines of
                the file. Values are TOML, but quotes may be left out, and lists may be written
                with commas.

        Raises:
            ValueError: if a section, key or value is invalid. For an unknown name, the message
                suggests a similar known one.
        """
        path = Path(path)
        if not path.is_file():
            near = (
                sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
            )
            raise ValueError(
                f"no recipe at {path}{did_you_mean(path.name, near)}"
                + (f"; there are {', '.join(near)}" if near else "")
            )
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise ValueError(f"{path} is not valid TOML: {e}") from None
        try:
            for section, key, value in _parse(overrides):
                if not isinstance(raw.setdefault(section, {}), dict):
                    raise ValueError(
                        f"{section} must be a section with keys, found {raw[section]!r}"
                    )
                raw[section][key] = value
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


def _section(kind, name: str, raw: dict[str, Any]):
    """Build the dataclass `kind` from the keys of section `name`.

    Comma-separated text becomes a list where the field is a list.
    """
    known = [f.name for f in dataclasses.fields(kind)]
    for key in raw:
        if key not in known:
            raise ValueError(
                f"unknown key {name}.{key}{did_you_mean(key, known)}; known: {', '.join(known)}"
            )
    lists = {
        f.name: str(f.type) for f in dataclasses.fields(kind) if str(f.type).startswith("tuple")
    }
    fixed = {}
    for key, value in raw.items():
        if key in lists:
            if isinstance(value, str):
                words = [word.strip() for word in value.split(",")]
                value = words if "str" in lists[key] else [_value(word) for word in words]
            value = tuple(value) if isinstance(value, list) else (value,)
        fixed[key] = value
    return kind(**fixed)


def _model(raw: dict[str, Any]) -> ModelConfig:
    preset = raw.pop("preset", None)
    if isinstance(raw.get("rope_scaling"), dict):
        raw["rope_scaling"] = _section(
            RopeScaling,
            "model.rope_scaling",
            {k: v for k, v in raw["rope_scaling"].items() if k not in ("type", "rope_type")},
        )
    known = ["preset", *(f.name for f in dataclasses.fields(ModelConfig))]
    for key in raw:
        if key not in known:
            raise ValueError(f"unknown key model.{key}{did_you_mean(key, known)}")
    if preset is None and not raw:
        raise ValueError(
            "the recipe describes no model; set model.preset, for example to tiny, "
            "or the fields of a config"
        )
    return ModelConfig(**raw) if preset is None else ModelConfig.preset(preset).replace(**raw)


def _parse(overrides: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield (section, key, value) of every override."""
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or "." not in word.split("=")[0]:
            raise ValueError(f"cannot read {word!r}; overrides look like --optim.lr 3e-4")
        name, equals, text = word[2:].partition("=")
        if not equals:
            if not words:
                raise ValueError(f"--{name} needs a value")
            text = words.pop(0)
        section, _, key = name.partition(".")
        yield section, key.replace("-", "_"), _value(text)


def _value(text: str) -> Any:
    """Parse a TOML value. Text that is not valid TOML is returned as a string."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text
