"""Every option of `lamoe serve` once: a field here is a flag --like-this and a variable LAMOE_LIKE_THIS. The flag wins."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

LOOPBACK = ("127.0.0.1", "::1", "localhost")
LOG_LEVELS = ("debug", "info", "warning", "error")


def parse_bytes(text: str) -> int:
    """'16GB', '512 MiB', '1e9' -> bytes. ArgumentTypeError for anything else."""
    units = {
        "": 1,
        "k": 10**3,
        "m": 10**6,
        "g": 10**9,
        "t": 10**12,
        "ki": 2**10,
        "mi": 2**20,
        "gi": 2**30,
        "ti": 2**40,
    }
    number = text.strip().lower().removesuffix("b").strip()
    unit = number.lstrip("0123456789.e+-").strip()
    try:
        return int(float(number[: len(number) - len(unit)]) * units[unit])
    except (KeyError, ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an amount of memory; write it like 16GB or 512MiB"
        ) from None


def _option(default, help: str, kind: Callable = str):
    return dataclasses.field(default=default, metadata={"help": help, "kind": kind})


@dataclass(frozen=True)
class Settings:
    """How to serve one model. ValueError for values that cannot work; what concerns the model itself is checked when it loads."""

    host: str = _option(
        "127.0.0.1", "address to listen on; anything but loopback should have an --api-key"
    )
    port: int = _option(8000, "0: any free one, see the log", int)
    api_key: str | None = _option(
        None,
        "secret that callers send as `Authorization: Bearer KEY`; other users can see it in the list of processes, so prefer "
        "--api-key-file or the variable",
    )
    api_key_file: str | None = _option(None, "file with a key on each line; all of them are valid")
    served_model_name: str | None = _option(
        None, "what the model is called in the API; default: the name of its folder"
    )
    max_model_len: int | None = _option(
        None, "longest prompt + output in tokens; default: what the model was made for", int
    )
    max_num_seqs: int = _option(64, "sequences running at once", int)
    max_num_batched_tokens: int = _option(512, "tokens of one step of the engine", int)
    quantization: str | None = _option(
        None,
        "of the weights, while loading: int8 or int4; a folder made by `lamoe quantize` needs none",
    )
    kv_cache_dtype: str = _option(
        "bf16", "storage format of the cache: fp32, bf16, int8, 6bit or 4bit"
    )
    kv_cache_memory: int | None = _option(
        None,
        "size of the cache, for example 2GB; default: four full contexts, at most 1 GiB",
        parse_bytes,
    )
    dtype: str | None = _option(
        None, "of the computation: float32 or bfloat16; default: the model's own"
    )
    threads: int = _option(0, "of the computation; default: all cores", int)
    seed: int | None = _option(None, "of requests that bring none", int)
    max_queued_requests: int = _option(
        128, "sequences that may wait for a place; beyond, requests get 429 with Retry-After", int
    )
    max_choices: int = _option(128, "prompts x n of one request", int)
    max_body_bytes: int = _option(8 << 20, "of one request", parse_bytes)
    max_header_bytes: int = _option(32 << 10, "of one request", parse_bytes)
    max_connections: int = _option(1024, "open at once; beyond, they get 503", int)
    request_timeout: float = _option(
        600.0, "seconds from a request to the end of its answer", float
    )
    body_timeout: float = _option(
        30.0, "seconds in which the headers of a request must have come, and then its body", float
    )
    shutdown_timeout: float = _option(
        30.0,
        "seconds that running requests get after SIGTERM; a second signal ends them at once",
        float,
    )
    allowed_hosts: str | None = _option(
        None,
        "names, with commas between, that callers may use in the Host header; * for any. Default: loopback names when "
        "listening on loopback without a key (a web page could reach the server through a name of its own), else any",
    )
    log_level: str = _option(
        "info", f"of the JSON lines on standard error: {', '.join(LOG_LEVELS)}"
    )

    def __post_init__(self):
        for name, low in (
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", self.max_num_seqs),
            ("max_queued_requests", 0),
            ("max_choices", 1),
            ("max_body_bytes", 1),
            ("max_header_bytes", 1024),
            ("max_connections", 1),
            ("threads", 0),
        ):
            if getattr(self, name) < low:
                raise ValueError(
                    f"{_flag(name)} is {getattr(self, name)}; it must be at least {low}"
                )
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port is {self.port}; it must be from 0 to 65535")
        for name in ("request_timeout", "body_timeout", "shutdown_timeout"):
            if not 0 <= getattr(self, name) <= 1e7:
                raise ValueError(
                    f"{_flag(name)} is {getattr(self, name)}; it must be a number of seconds, at least 0"
                )
        if self.log_level not in LOG_LEVELS:
            raise ValueError(f"--log-level is {self.log_level!r}; known: {', '.join(LOG_LEVELS)}")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"--dtype is {self.dtype!r}; known: float32, bfloat16")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed is {self.seed}; it must be from 0 to 2**63 - 1")

    def keys(self) -> tuple[str, ...]:
        """The valid keys; none: the server is open. ValueError for a key file without keys or a key that no header can carry."""
        keys = [] if self.api_key is None else [self.api_key]
        if self.api_key_file is not None:
            found = [
                line.strip()
                for line in Path(self.api_key_file).read_text(encoding="utf-8").splitlines()
                if line.strip()
            ]
            if not found:
                raise ValueError(
                    f"{self.api_key_file} holds no key; write one on each line, or leave --api-key-file out"
                )
            keys += found
        for key in keys:
            if not key or not key.isascii() or not key.isprintable() or key != key.strip():
                raise ValueError(
                    "an API key must be printable ASCII without blanks around it; make one with: openssl rand -hex 32"
                )
        return tuple(keys)

    def hosts(self) -> frozenset[str] | None:
        """Names allowed in the Host header; None: any."""
        if self.allowed_hosts is not None:
            names = {h.strip().lower() for h in self.allowed_hosts.split(",") if h.strip()}
            return None if "*" in names else frozenset(names)
        return frozenset(LOOPBACK) if self.host in LOOPBACK and not self.keys() else None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser) -> None:
    """A flag for every field; its help names the variable too."""
    for f in dataclasses.fields(Settings):
        default = (
            f" (default: {f.default})"
            if f.default is not None and "default:" not in f.metadata["help"]
            else ""
        )
        parser.add_argument(
            _flag(f.name),
            type=f.metadata["kind"],
            metavar=f.name.rsplit("_", 1)[-1].upper(),
            default=argparse.SUPPRESS,
            help=f"{f.metadata['help']}{default} [LAMOE_{f.name.upper()}]".replace("%", "%%"),
        )


def from_options(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from flags, then variables, then defaults. ValueError names the variable whose value is not of its kind."""
    values = {}
    for f in dataclasses.fields(Settings):
        variable = f"LAMOE_{f.name.upper()}"
        if hasattr(args, f.name):
            values[f.name] = getattr(args, f.name)
        elif environ.get(variable):
            try:
                values[f.name] = f.metadata["kind"](environ[variable])
            except (ValueError, argparse.ArgumentTypeError) as e:
                raise ValueError(f"{variable} is not a value for {_flag(f.name)}: {e}") from None
    return Settings(**values)
