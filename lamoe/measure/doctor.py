"""`lamoe doctor`: what this machine and installation are, what lamoe makes of them, and a small check that the kernels compute what the torch ops do.

`examine` finds out, `render` says it in words. Problems (something is broken, or the compiled kernels are missing although nobody switched them off)
make the exit code 1; notes (it works, but here is something to know) do not.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from lamoe import __version__
from lamoe.backends.cpu import native
from lamoe.engine.llm import LLM
from lamoe.engine.plan import available_memory
from lamoe.engine.sampler import SamplingParams
from lamoe.measure.bench import Machine
from lamoe.model.accounting import human_bytes
from lamoe.model.config import ModelConfig
from lamoe.model.transformer import Transformer

EXTRAS = {
    "serve": "lamoe serve, and structured output (regex, grammar, JSON schema)",
    "train": "pictures in reports, TensorBoard events",
    "gguf": "lamoe convert of GGUF files",
    "test": "make test; of no use to a server, and neither is the chromium that tests of the page look for",
    "lm-eval": "make test-lm-eval",
    "dev": "make lint and make format",
}
FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)  # as Linux calls them
VARIABLES = ("LAMOE_IMPL", "LAMOE_ISA", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE")
MARGIN = 1e-3  # of the largest value, by which two ways of adding up may differ; a wrong kernel is off by far more


def examine(buffer_bytes: int = 256 << 20) -> dict[str, Any]:
    """Everything, as JSON takes it. buffer_bytes: read to measure the memory's bandwidth; far larger than the caches."""
    cpu, memory, kernels = _cpu(), _memory(), _kernels()
    found = {
        "lamoe": __version__,
        "cpu": cpu,
        "memory": memory,
        "kernels": kernels,
        "variables": {v: os.environ.get(v) for v in VARIABLES},
        "versions": {
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            **{name: _version(name) for name in _requirements(None)},
        },
        "extras": {
            extra: {
                "for": why,
                "missing": [name for name in _requirements(extra) if _version(name) is None],
            }
            for extra, why in EXTRAS.items()
        },
        "hub": {"folder": constants.HF_HUB_CACHE, "offline": constants.HF_HUB_OFFLINE},
    }
    probed = kernels["isa"] is not None
    if probed and (memory["available"] is None or memory["available"] > 2 * buffer_bytes):
        machine = Machine.probe(cpu["threads"], torch.zeros(buffer_bytes, dtype=torch.uint8))
        found["probe"] = {
            "read_bytes_per_s": machine.read,
            "int8_ops_per_s": 2 * machine.int8,
            "bf16_flops": 2 * machine.bf16,
            "fp32_flops": 2 * machine.fp32,
        }
    found["checks"] = checks()
    found["problems"], found["notes"] = _judge(found)
    found["verdict"] = (
        "broken"
        if any(not c["passed"] for c in found["checks"])
        else "limited"
        if found["problems"]
        else "good"
    )
    return found


# ---- the machine -------------------------------------------------------------------------------------------------------
def _cpu(info: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """threads: what torch, and so lamoe without --threads, computes with. quota: CPUs that the control group grants, None without a limit."""
    try:
        text = info.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    blocks = [
        dict(re.findall(r"^(.*?)\s*:\s*(.*)$", block, re.M))
        for block in text.split("\n\n")
        if block.strip()
    ]
    first = blocks[0] if blocks else {}
    has = set(first.get("flags", "").split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": first.get("model name", platform.processor() or "unknown"),
        "features": [f for f in FLAGS if f in has],
        "cores": len(
            {
                (b["physical id"], b["core id"])
                for b in blocks
                if "core id" in b and "physical id" in b
            }
        )
        or None,
        "logical": os.cpu_count(),
        "usable": usable,
        "quota": _quota(),
        "threads": torch.get_num_threads(),
    }


def _quota(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    try:
        most, period = file.read_text().split()
        return round(int(most) / int(period), 2)
    except (OSError, ValueError):  # "max" is no number and no limit
        return None


def _memory() -> dict[str, Any]:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        total = None
    try:
        pages = re.search(
            r"\[(\w+)\]", Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        )[1]
    except (OSError, TypeError):
        pages = None
    return {"total": total, "available": available_memory(), "huge_pages": pages}


# ---- the installation ----------------------------------------------------------------------------------------------------
def _requirements(extra: str | None) -> list[str]:
    """Names of the packages that lamoe, or an extra of it, asks for."""
    try:
        lines = importlib.metadata.requires("lamoe") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder that is not installed
        return []
    of = [
        (re.match(r"[\w.-]+", line)[0], re.search(r"extra\s*==\s*['\"]([\w.-]+)", line))
        for line in lines
    ]
    return [name for name, found in of if (found[1] if found else None) == extra]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kernels() -> dict[str, Any]:
    """isa: of the compiled kernels when they run, else None and `why`."""
    found = {"isa": None, "why": None, "could": []}
    if native.lib is None:
        return found | {"why": f"they are not there ({native.missing()})"}
    found["could"] = [name.strip() for name in native.lib.features().split(",")]
    if not native.available():
        return found | {"why": f"LAMOE_IMPL={os.environ['LAMOE_IMPL']} switches them off"}
    try:
        return found | {"isa": native.lib.isa()}
    except ValueError as e:  # LAMOE_ISA names one that this CPU lacks
        return found | {"why": str(e)}


# ---- whether it computes what it should ------------------------------------------------------------------------------------
def checks() -> list[dict[str, Any]]:
    """[{"name", "passed", "says"}]. On a tiny random DeepSeek-V2: the torch ops run; where the compiled kernels run, their products are those of torch
    for every weight format and instruction set, and their replies are those of the torch ops."""
    torch_tokens, torch_logprobs = _replies("torch")
    out = [
        _check(
            "the torch ops run a tiny random model", lambda: f"{sum(map(len, torch_tokens))} tokens"
        )
    ]
    if _kernels()["isa"] is None:
        return out
    for isa in _kernels()["could"]:
        out.append(_check(f"products of {isa} equal torch's", partial(_products, isa)))
    return [
        *out,
        _check(
            "compiled kernels and torch ops give the same replies",
            lambda: _same(_replies("native"), (torch_tokens, torch_logprobs)),
        ),
    ]


def _check(name: str, work: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"name": name, "passed": True, "says": work()}
    except Exception as e:  # whatever it is, it is what doctor is there to tell
        return {
            "name": name,
            "passed": False,
            "says": f"{type(e).__name__}: {e}" if not isinstance(e, ArithmeticError) else str(e),
        }


def _products(isa: str) -> str:
    generator, worst = torch.Generator().manual_seed(0), 0.0
    w, x = (
        torch.randn(48, 192, generator=generator) * 0.02,
        torch.randn(5, 192, generator=generator),
    )
    for fmt, most in (
        ("fp32", MARGIN),
        ("bf16", 0.02),
        ("int8", 0.03),
        ("int4", 0.03),
    ):  # x is rounded too: bf16 keeps 8 bits, int8 and int4 take 8
        data, scale = native.pack(fmt, w, isa=isa)
        want = x @ native.unpack(fmt, data, 48, 192, scale, isa).T
        error = float(
            (native.linear(fmt, data, scale, 48, x, isa) - want).abs().max() / want.abs().max()
        )
        if not error <= most:
            raise ArithmeticError(
                f"{fmt} weights: off by {error:.2g} of the largest value, at most {most:g} is rounding"
            )
        worst = max(worst, error)
    return f"fp32, bf16, int8, int4; at most {worst:.1g} off, which is rounding"


def _replies(impl: str) -> tuple[list[list[int]], list[float]]:
    """Greedy tokens of three prompts and the log-probability of each."""
    config = ModelConfig(
        model_type="deepseek_v2",
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=256,
        kv_lora_rank=32,
        q_lora_rank=24,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        moe_intermediate_size=32,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        initializer_range=0.2,
        torch_dtype="float32",
    )
    llm = LLM(
        Transformer(config).init_weights(1).eval(), cache="fp32", impl=impl, cache_memory=1 << 22
    )
    prompts = [[(7 * i + j) % 128 for i in range(n)] for j, n in enumerate((1, 19, 64))]
    outs = llm.generate(
        prompts, SamplingParams(temperature=0.0, max_tokens=24, logprobs=0, ignore_eos=True)
    )
    return [o.token_ids for o in outs], [
        found[t] for o in outs for t, found in zip(o.token_ids, o.logprobs)
    ]


def _same(a: tuple[list[list[int]], list[float]], b: tuple[list[list[int]], list[float]]) -> str:
    if a[0] != b[0]:
        raise ArithmeticError("their greedy tokens differ")
    off = max(abs(x - y) for x, y in zip(a[1], b[1]))
    if not off <= MARGIN:
        raise ArithmeticError(f"log-probabilities differ by up to {off:.2g}")
    return f"{len(a[1])} greedy tokens, log-probabilities within {off:.1g}"


# ---- what to make of it ------------------------------------------------------------------------------------------------------
def _judge(found: dict[str, Any]) -> tuple[list[str], list[str]]:
    cpu, kernels = found["cpu"], found["kernels"]
    problems = [f"{c['name']}: NO. {c['says']}" for c in found["checks"] if not c["passed"]]
    problems += [
        f"{name} is not installed; pip install lamoe again"
        for name, version in found["versions"].items()
        if version is None
    ]
    notes = []
    if kernels["isa"] is None:
        if (
            native.available()
        ):  # LAMOE_ISA names what this CPU lacks, and models do not fall back in silence
            problems.append(f"{kernels['why']}. No model runs like this; leave LAMOE_ISA away")
        else:
            told = notes if os.environ.get("LAMOE_IMPL") else problems
            told.append(
                f"the compiled kernels do not run: {kernels['why']}. Everything but quantised weights works on torch ops, many times slower"
                + ("; install lamoe with a C++ compiler at hand" if native.lib is None else "")
            )
    elif kernels["could"] and kernels["isa"] != kernels["could"][0]:
        notes.append(
            f"LAMOE_ISA={kernels['isa']} keeps the kernels from {kernels['could'][0]}, which is faster"
        )
    granted = min(
        filter(None, (cpu["usable"], cpu["quota"] and max(1, int(cpu["quota"])))), default=None
    )
    if granted and cpu["threads"] > granted:
        notes.append(
            f"{cpu['threads']} threads for {granted} CPUs: they will wait for each other; set --threads {granted} or OMP_NUM_THREADS={granted}"
        )
    if found["extras"]["serve"]["missing"]:
        notes.append("lamoe serve needs pip install 'lamoe[serve]'")
    if "probe" not in found and kernels["isa"]:
        notes.append("too little memory is free to measure how fast it is")
    return problems, notes


def render(found: dict[str, Any]) -> str:
    """The findings in lines for people; the last one is the verdict."""
    cpu, memory, kernels, probe = (
        found["cpu"],
        found["memory"],
        found["kernels"],
        found.get("probe"),
    )
    size = {
        k: "unknown" if v is None else human_bytes(v)
        for k, v in memory.items()
        if k != "huge_pages"
    }
    rows = [
        ("cpu", cpu["model"]),
        ("features", " ".join(cpu["features"]) or "none of those that the kernels know"),
        (
            "cores",
            f"{cpu['cores'] or '?'} cores, {cpu['logical']} logical CPUs, {cpu['usable']} usable"
            + (f", limited to {cpu['quota']:g}" if cpu["quota"] else ""),
        ),
        (
            "threads",
            f"{cpu['threads']} (OMP_NUM_THREADS {found['variables']['OMP_NUM_THREADS'] or 'not set'}; --threads of the verbs wins)",
        ),
        (
            "memory",
            f"{size['total']}, {size['available']} available; transparent huge pages: {memory['huge_pages'] or 'unknown'}",
        ),
    ]
    if probe:
        rows += [
            (
                "probed",
                f"{probe['read_bytes_per_s'] / 1e9:.1f} GB/s read, {probe['int8_ops_per_s'] / 1e9:.0f} Gop/s int8, {probe['bf16_flops'] / 1e9:.0f} GFLOP/s bf16, "
                f"{probe['fp32_flops'] / 1e9:.0f} GFLOP/s fp32, with {cpu['threads']} thread{'s' * (cpu['threads'] > 1)}",
            )
        ]
    rows += [
        (
            "kernels",
            f"compiled, {kernels['isa']} (this CPU runs {', '.join(kernels['could'])})"
            if kernels["isa"]
            else f"torch ops; of the compiled ones: {kernels['why']}",
        ),
        (
            "",
            f"LAMOE_IMPL {found['variables']['LAMOE_IMPL'] or 'not set'}, LAMOE_ISA {found['variables']['LAMOE_ISA'] or 'not set'}",
        ),
        (
            "versions",
            ", ".join(
                f"{name} {version or 'MISSING'}"
                for name, version in {"lamoe": found["lamoe"], **found["versions"]}.items()
            ),
        ),
    ]
    rows += [
        (
            f"[{extra}]",
            ("present" if not x["missing"] else f"missing {', '.join(x['missing'])}")
            + f"; for {x['for']}",
        )
        for extra, x in found["extras"].items()
    ]
    rows += [
        (
            "models",
            f"from the hub into {found['hub']['folder']}, {'offline: only what is there already' if found['hub']['offline'] else 'downloads allowed (HF_HUB_OFFLINE=1 forbids them)'}",
        )
    ]
    rows += [
        ("check", f"{'ok ' if c['passed'] else 'NO '} {c['name']}: {c['says']}")
        for c in found["checks"]
    ]
    rows += [("note", n) for n in found["notes"]] + [("problem", p) for p in found["problems"]]
    verdict = {
        "good": f"good: the compiled kernels ({kernels['isa']}) run and compute what the torch ops do"
        if kernels["isa"]
        else "good: the torch ops run, as LAMOE_IMPL asks",
        "limited": "limited: see the problems above",
        "broken": "broken: a check failed; please report the lines above",
    }[found["verdict"]]
    return "\n".join([*(f"{name:9} {text}" for name, text in rows), f"verdict   {verdict}"])


def exit_code(found: dict[str, Any]) -> int:
    """0 when nothing is wrong."""
    return int(bool(found["problems"]))
