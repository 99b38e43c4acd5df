"""A training recipe: TOML in, checked dataclasses out. `--section.key value` on the command line means the same as the file.

[model] takes `preset` and any ModelConfig field; the other sections are the dataclasses below, routing.Balance and optim's.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamoe.model.config import ModelConfig, RopeScaling, check_types, did_you_mean
from lamoe.model.routing import Balance
from lamoe.train.optim import Batch, Optim


@dataclass(frozen=True)
class Data:
    """[data]: what to read and how to cut it. Sources: "stdlib", "austen", files, folders, globs, .jsonl (see train/sources.py)."""

    sources: tuple[str, ...] = ("stdlib", "austen")
    tokenizer: str = ""  # a folder or tokenizer.json; empty: train a byte-level BPE of model.vocab_size on the training text
    seq_len: int = 512
    holdout: float = 0.02  # share of every source's bytes that is never trained on, by file
    document_mask: bool = True  # attention stays inside a document

    def __post_init__(self):
        check_types(self, "data.")
        if self.seq_len < 1:
            raise ValueError(f"data.seq_len is {self.seq_len}; it must be at least 1")
        if not self.sources:
            raise ValueError("data.sources is empty; name at least one source, for example stdlib")
        if not 0 <= self.holdout <= 0.5:
            raise ValueError(
                f"data.holdout is {self.holdout}; it is the share of the text kept for evaluation, 0 to 0.5"
            )


@dataclass(frozen=True)
class Run:
    """[run]: length, output, and everything that does not change what is learnt."""

    out: str = "runs/model"
    init_from: str = ""  # a run, a model folder or a hub id whose weights (and tokenizer) training starts with; empty: random weights
    steps: int = 1000
    dtype: str = "bfloat16"  # of the computation; masters are float32
    seed: int = 0
    threads: int = 0  # 0: torch's choice
    log_every: int = 10
    eval_every: int = 0  # 0: at the end only
    eval_tokens: int = (
        65536  # of the evaluations on the way; the last one reads all that is held out
    )
    save_every: int = 0  # 0: at the end only (and on Ctrl-C or SIGTERM)
    keep: int = 2  # checkpoints; 0 keeps all

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
    """All that decides what a run learns and where it goes. Unknown sections and keys are refused."""

    model: ModelConfig
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    batch: Batch = field(default_factory=Batch)
    balance: Balance = field(default_factory=Balance)
    run: Run = field(default_factory=Run)

    def __post_init__(self):
        check_types(self.balance, "balance.")
        self.balance.check(self.model)
        if (
            self.model.is_moe
        ):  # the coefficient that trained the model is the one its config.json tells others about
            object.__setattr__(
                self, "model", self.model.replace(aux_loss_alpha=float(self.balance.expert))
            )
        if self.data.seq_len > self.model.max_position_embeddings:
            raise ValueError(
                f"data.seq_len {self.data.seq_len} is more than model.max_position_embeddings {self.model.max_position_embeddings}"
            )

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Recipe:
        sections = {f.name: f for f in dataclasses.fields(cls)}
        for name, value in raw.items():
            if name not in sections:
                raise ValueError(
                    f"unknown section [{name}] in the recipe{did_you_mean(name, sections)}; known: {', '.join(sections)}"
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
    def load(cls, path: str | Path, overrides: list[str] = ()) -> Recipe:
        """Read a TOML file, then apply `--section.key value` (or `--section.key=value`) pairs. Values are TOML; a bare word is a
        string, a comma-separated one a list where the key takes a list. ValueError says what is unknown and what was meant."""
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
        """Plain values, as saved with a run. `from_dict(to_dict())` is the identity."""
        out = dataclasses.asdict(self)
        out["model"] = {k: v for k, v in out["model"].items() if v is not None}
        for section in out.values():
            section.update({k: list(v) for k, v in section.items() if isinstance(v, tuple)})
        return out


def _section(kind, name: str, raw: dict[str, Any]):
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
            "the recipe says no model; give model.preset, for example tiny, or the fields of a config"
        )
    return ModelConfig(**raw) if preset is None else ModelConfig.preset(preset).replace(**raw)


def _parse(overrides: list[str]):
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
    """A TOML value; text that is none stands for itself."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text
