"""The options of `lamoe serve`, each defined once.

A field `like_this` of `Settings` is the flag `--like-this` and the environment variable
`LAMOE_LIKE_THIS`. The flag takes precedence.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOOPBACK = ("127.0.0.1", "::1", "localhost")
LOG_LEVELS = ("debug", "info", "warning", "error")


def parse_bytes(text: str) -> int:
    """Convert an amount of memory such as '16GB', '512 MiB' or '1e9' to bytes.

    Raises:
        argparse.ArgumentTypeError: if the text is not an amount of memory.
    """
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


def _option(default: Any, help: str, kind: Callable = str, alias: str | None = None) -> Any:
    """Make a dataclass field.

    Args:
        kind: converts the text of a flag or variable to the value.
        alias: vLLM's name of the option. Its flag and variable are accepted too.
    """
    metadata = {"help": help, "kind": kind, "alias": alias}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """How to serve one model. Options that depend on the model are checked when it loads.

    Raises:
        ValueError: if a value is out of range.
    """

    host: str = _option(
        "127.0.0.1", "address to listen on; set an API key for anything but loopback"
    )
    port: int = _option(8000, "port to listen on; 0 picks a free port and logs it", int)
    api_key: str | None = _option(
        None,
        "secret that clients send as `Authorization: Bearer KEY`; other users can see it in the "
        "process list, so prefer --api-key-file or the variable",
    )
    api_key_file: str | None = _option(None, "file with one API key per line; each key is valid")
    prefix_cache_scope: str = _option(
        "key",
        "which requests may reuse the cached prompt beginnings of others: key (only those with the "
        "same API key) or server (all); with one key or none there is no difference",
    )
    served_model_name: str | None = _option(
        None, "name of the model in the API; default: the name of its folder"
    )
    max_model_len: int | None = _option(
        None, "maximum tokens of prompt plus output; default: the model's context length", int
    )
    max_num_seqs: int = _option(64, "maximum number of sequences that run at once", int)
    max_num_batched_tokens: int = _option(512, "maximum number of tokens in one engine step", int)
    weights: str | None = _option(
        None,
        "storage format of the weights: fp32, bf16, int8 (8.5 bits per weight, group scales "
        "included) or int4 (4.5 bits); default: the format of the model folder",
        alias="quantization",
    )
    head: str | None = _option(
        None,
        "storage format of the output head, for example int8 with int4 weights; "
        "default: the format of the weights",
    )
    cache: str = _option(
        "bf16",
        "storage format of the KV cache: fp32, bf16, int8, 6bit or 4bit",
        alias="kv_cache_dtype",
    )
    kv_cache_memory: int | None = _option(
        None,
        "size of the KV cache, for example 2GB; default: four full contexts, at most 1 GiB",
        parse_bytes,
    )
    dtype: str | None = _option(
        None, "compute dtype: float32 or bfloat16; default: the dtype of the checkpoint"
    )
    device: str | None = _option(
        None,
        "where the model runs: cpu, cuda, mps, or auto (cuda or mps if there is one, else cpu); "
        "default: cpu",
    )
    threads: int = _option(0, "number of CPU threads; 0 uses all cores", int)
    seed: int | None = _option(None, "sampling seed of requests that do not set one", int)
    max_queued_requests: int = _option(
        128, "maximum number of waiting sequences; further requests get 429 with Retry-After", int
    )
    max_choices: int = _option(128, "maximum number of sequences (prompts x n) in one request", int)
    max_body_bytes: int = _option(8 << 20, "maximum size of a request body", parse_bytes)
    max_header_bytes: int = _option(32 << 10, "maximum size of the request headers", parse_bytes)
    max_connections: int | None = _option(
        None,
        "maximum number of open connections; a further one replaces the one that has waited "
        "longest for its client, or gets 503; default: 1024, or as many as the limit on open files "
        "allows",
        int,
    )
    request_timeout: float = _option(
        600.0, "seconds from a request to the end of its response", float
    )
    body_timeout: float = _option(
        30.0, "seconds to wait for the headers of a request, and then for its body", float
    )
    write_timeout: float = _option(
        30.0,
        "seconds without any progress after which a client that does not read is cut off",
        float,
    )
    shutdown_timeout: float = _option(
        30.0,
        "seconds that running requests get after SIGTERM; a second signal ends them at once",
        float,
    )
    allowed_hosts: str | None = _option(
        None,
        "comma-separated names that clients may use in the Host header; * allows any. Default: "
        "the loopback names when listening on loopback without a key (a defence against DNS "
        "rebinding by web pages), else any",
    )
    allowed_origins: str | None = _option(
        None,
        "comma-separated origins of web pages that may call this server from a browser, for "
        "example https://chat.example.org; * allows any and needs a key. Default: only the "
        "server's own page",
    )
    log_level: str = _option(
        "info", f"level of the JSON log lines on standard error: {', '.join(LOG_LEVELS)}"
    )

    def __post_init__(self):
        for name, minimum in (
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", self.max_num_seqs),
            ("max_queued_requests", 0),
            ("max_choices", 1),
            ("max_body_bytes", 1),
            ("max_header_bytes", 1024),
            ("max_connections", 1),
            ("threads", 0),
            ("write_timeout", 0.1),
        ):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{_flag(name)} is {value}; it must be at least {minimum}")
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port is {self.port}; it must be from 0 to 65535")
        for name in ("request_timeout", "body_timeout", "write_timeout", "shutdown_timeout"):
            value = getattr(self, name)
            if not 0 <= value <= 1e7:
                raise ValueError(
                    f"{_flag(name)} is {value}; it must be a number of seconds from 0 to 1e7"
                )
        if "*" in (self.allowed_origins or "") and not (self.api_key or self.api_key_file):
            raise ValueError(
                "--allowed-origins * lets every web page use the server; set --api-key-file, or "
                "name the origins"
            )
        self.origins()
        if self.log_level not in LOG_LEVELS:
            raise ValueError(f"--log-level is {self.log_level!r}; known: {', '.join(LOG_LEVELS)}")
        if self.prefix_cache_scope not in ("key", "server"):
            raise ValueError(
                f"--prefix-cache-scope is {self.prefix_cache_scope!r}; known: key, server"
            )
        if self.dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"--dtype is {self.dtype!r}; known: float32, bfloat16")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed is {self.seed}; it must be from 0 to 2**63 - 1")

    def api_keys(self) -> tuple[str, ...]:
        """Collect the valid API keys. Without any, the server needs no key.

        Raises:
            ValueError: if the key file holds no key, or a key does not fit in a header.
            OSError: if the key file cannot be read.
        """
        keys = [] if self.api_key is None else [self.api_key]
        if self.api_key_file is not None:
            lines = Path(self.api_key_file).read_text(encoding="utf-8").splitlines()
            file_keys = [line.strip() for line in lines if line.strip()]
            if not file_keys:
                raise ValueError(
                    f"{self.api_key_file} holds no key; write one key per line, or leave "
                    "--api-key-file out"
                )
            keys += file_keys
        for key in keys:
            if not key or not key.isascii() or not key.isprintable() or key != key.strip():
                raise ValueError(
                    "an API key must be printable ASCII without surrounding blanks; "
                    "make one with: openssl rand -hex 32"
                )
        return tuple(keys)

    def host_names(self) -> frozenset[str] | None:
        """Return the names allowed in the Host header, or None if any name is allowed."""
        if self.allowed_hosts is not None:
            names = {h.strip().lower() for h in self.allowed_hosts.split(",") if h.strip()}
            return None if "*" in names else frozenset(names)
        return frozenset(LOOPBACK) if self.host in LOOPBACK and not self.api_keys() else None

    def origins(self) -> frozenset[bytes]:
        """Return the origins of --allowed-origins as they appear in the Origin header.

        Raises:
            ValueError: if one of them is not an origin.
        """
        names = [n.strip().lower() for n in (self.allowed_origins or "").split(",") if n.strip()]
        for name in names:
            if name != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[!-.0-~]+/?", name):
                raise ValueError(
                    f"--allowed-origins: {name!r} is not an origin; write scheme, host and port, "
                    "for example http://localhost:3000"
                )
        return frozenset(name.removesuffix("/").encode() for name in names)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _variable(name: str) -> str:
    return f"LAMOE_{name.upper()}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add one flag per field of `Settings`. The help names the environment variable too."""
    for f in dataclasses.fields(Settings):
        help = f.metadata["help"]
        if f.default is not None and "default:" not in help:
            help += f" (default: {f.default})"
        alias = f.metadata["alias"]
        parser.add_argument(
            *([_flag(alias)] if alias else []),
            _flag(f.name),
            dest=f.name,
            type=f.metadata["kind"],
            metavar=f.name.rsplit("_", 1)[-1].upper(),
            default=argparse.SUPPRESS,
            help=f"{help} [{_variable(f.name)}]".replace("%", "%%"),
        )


def from_options(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Settings:
    """Build the settings: flags first, then environment variables, then defaults.

    Raises:
        ValueError: if a variable cannot be converted, or a value is out of range.
    """
    values = {}
    for f in dataclasses.fields(Settings):
        alias = f.metadata["alias"]
        variable = _variable(f.name)
        if alias and not environ.get(variable):
            variable = _variable(alias)
        if hasattr(args, f.name):
            values[f.name] = getattr(args, f.name)
        elif environ.get(variable):
            try:
                values[f.name] = f.metadata["kind"](environ[variable])
            except (ValueError, argparse.ArgumentTypeError) as e:
                raise ValueError(f"{variable} is not a value for {_flag(f.name)}: {e}") from None
    return Settings(**values)
