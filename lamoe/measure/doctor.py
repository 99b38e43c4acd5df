"""`lamoe doctor`: describe the machine and the installation, and check the kernels' results.

`examine` collects the facts and `render` prints them. A problem means that something is broken, or
that the compiled kernels are missing although they are not disabled; the exit code is then 1. A
note is worth knowing, but nothing is wrong.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from lamoe import __version__, backends
from lamoe.backends.cpu import native
from lamoe.backends.load import why_torch
from lamoe.backends.memory import available_memory
from lamoe.engine.llm import LLM
from lamoe.engine.sampler import SamplingParams
from lamoe.measure.timing import Machine
from lamoe.model.accounting import human_bytes
from lamoe.model.config import ModelConfig
from lamoe.model.transformer import Transformer

EXTRAS = {
    "serve": "lamoe serve, and structured output (regex, grammar, JSON schema)",
    "train": "plots in reports, TensorBoard events",
    "data": "training text in Parquet and .zst files",
    "gguf": "lamoe convert of GGUF files",
    "test": "make test; a server does not need it, nor the chromium that tests of the page use",
    "lm-eval": "make test-lm-eval",
    "dev": "make lint: ruff, mypy, clang-format",
}
# CPU features that the kernels can use, as /proc/cpuinfo names them
FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    *("avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16"),
)
# variables that choose what runs
CHOICES = ("LAMOE_BACKEND", "LAMOE_OPS", "LAMOE_IMPL", "LAMOE_ISA")
VARIABLES = (*CHOICES, "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE")
# Largest accepted difference, as a share of the largest value. Another order of summation stays
# below it; a wrong kernel exceeds it by far.
MARGIN = 1e-3
Replies = tuple[list[list[int]], list[float]]


def examine(buffer_bytes: int = 256 << 20) -> dict[str, Any]:
    """Collect all facts, run the checks and judge them.

    Args:
        buffer_bytes: memory that the bandwidth probe reads; must be far larger than the caches.

    Returns:
        JSON-compatible facts, with the keys "problems", "notes" and "verdict".
    """
    cpu, memory, kernels = _cpu(), _memory(), _kernels()
    found: dict[str, Any] = {
        "lamoe": __version__,
        "cpu": cpu,
        "memory": memory,
        "devices": _devices(),
        "backend": _backend(kernels),
        "kernels": kernels,
        "variables": {v: os.environ.get(v) for v in VARIABLES},
        "versions": {
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            **{name: _version(name) for name in _requirements(None)},
        },
        "extras": {
            extra: {"for": purpose, "missing": _missing(extra)} for extra, purpose in EXTRAS.items()
        },
        "hub": {"folder": constants.HF_HUB_CACHE, "offline": constants.HF_HUB_OFFLINE},
    }
    enough_memory = memory["available"] is None or memory["available"] > 2 * buffer_bytes
    if kernels["isa"] is not None and enough_memory:
        found["probe"] = _probe(cpu["threads"], buffer_bytes)
    found["checks"] = checks()
    found["problems"], found["notes"] = _judge(found)
    failed = any(not check["passed"] for check in found["checks"])
    found["verdict"] = "broken" if failed else "limited" if found["problems"] else "good"
    return found


def exit_code(found: dict[str, Any]) -> int:
    """Return 0 if there are no problems, else 1."""
    return int(bool(found["problems"]))


# ---- the machine ---------------------------------------------------------------------------------
def _cpu(info: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """Collect facts about the CPU.

    "threads" is what torch uses, and so lamoe without --threads. "quota" is the number of CPUs that
    the control group grants; None means no limit.
    """
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
    flags = set(first.get("flags", "").split())
    cores = {
        (b["physical id"], b["core id"]) for b in blocks if "core id" in b and "physical id" in b
    }
    return {
        "model": first.get("model name", platform.processor() or "unknown"),
        "features": [f for f in FLAGS if f in flags],
        "cores": len(cores) or None,
        "logical": os.cpu_count(),
        "usable": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "quota": _quota(),
        "threads": torch.get_num_threads(),
    }


def _quota(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    try:
        most, period = file.read_text().split()
        return round(int(most) / int(period), 2)
    except (OSError, ValueError):  # no control group, or "max", which means no limit
        return None


def _memory() -> dict[str, Any]:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        total = None
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        setting = ""
    chosen = re.search(r"\[(\w+)\]", setting)
    return {
        "total": total,
        "available": available_memory(),
        "huge_pages": chosen[1] if chosen else None,
    }


def _probe(threads: int, buffer_bytes: int) -> dict[str, float]:
    machine = Machine.probe(threads, torch.zeros(buffer_bytes, dtype=torch.uint8))
    return {
        "read_bytes_per_s": machine.read,
        "int8_ops_per_s": 2 * machine.int8,
        "bf16_flops": 2 * machine.bf16,
        "fp32_flops": 2 * machine.fp32,
    }


# ---- the installation ----------------------------------------------------------------------------
def _requirements(extra: str | None) -> list[str]:
    """Return the names of the packages that lamoe, or one of its extras, requires."""
    try:
        lines = importlib.metadata.requires("lamoe") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder that is not installed
        return []
    names = []
    for line in lines:
        name = re.match(r"[\w.-]+", line)
        belongs_to = re.search(r"extra\s*==\s*['\"]([\w.-]+)", line)
        if name and (belongs_to[1] if belongs_to else None) == extra:
            names.append(name[0])
    return names


def _missing(extra: str) -> list[str]:
    return [name for name in _requirements(extra) if _version(name) is None]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kernels() -> dict[str, Any]:
    """Collect facts about the compiled kernels.

    "isa" is the instruction set that runs; None if the kernels do not run, and "why" says why.
    "could" lists the instruction sets that this CPU supports.
    """
    found: dict[str, Any] = {"isa": None, "why": None, "could": []}
    if native.lib is None:
        return found | {"why": f"they are missing ({native.missing()})"}
    found["could"] = [name.strip() for name in native.lib.features().split(",")]
    if not native.available():
        return found | {"why": native.why_switched_off()}
    try:
        return found | {"isa": native.lib.isa()}
    except ValueError as e:  # LAMOE_ISA names an instruction set that this CPU lacks
        return found | {"why": str(e)}


def _devices() -> list[str]:
    """Return the devices that --device accepts on this machine."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cuda = [f"cuda:{i} ({name})" for i, name in enumerate(names)]
    return ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]


def _backend(kernels: dict[str, Any]) -> dict[str, Any]:
    """Find which backend runs an unquantised model on the CPU, and why.

    Returns:
        {"name": "cpu", "torch" or None, "why": reason}. None means that no backend runs.
    """
    model = _tiny_model()
    try:
        name = backends.load(model).name
    except (ValueError, RuntimeError) as e:
        return {"name": None, "why": str(e)}
    if name == "cpu":
        isa = kernels["isa"]
        why = f"the compiled kernels run here (instruction set {isa})"
        if isa == "scalar":
            why += (
                ", without vector instructions. They are faster than torch ops on a CPU that has "
                "none either (docs/BENCHMARKS.md). Where torch has vectors, as on Arm, "
                "LAMOE_BACKEND=torch reads prompts faster and decodes slower"
            )
        return {"name": name, "why": why}
    if kernels["why"]:
        return {"name": name, "why": f"the compiled kernels do not run: {kernels['why']}"}
    return {"name": name, "why": why_torch(model.config, model.embed.weight.dtype)}


# ---- whether the results are right ---------------------------------------------------------------
def checks() -> list[dict[str, Any]]:
    """Run the checks on a tiny random DeepSeek-V2.

    The torch ops must run. If the compiled kernels run, their matrix products must agree with torch
    for every weight format and instruction set, and their replies with those of the torch ops.

    Returns:
        [{"name", "passed", "says"}]
    """
    expected = _replies("torch")
    out = [
        _check(
            "the torch ops run a tiny random model", lambda: f"{sum(map(len, expected[0]))} tokens"
        )
    ]
    kernels = _kernels()
    if kernels["isa"] is None:
        return out
    for isa in kernels["could"]:
        out.append(_check(f"products of {isa} equal torch's", _products, isa))
    name = "compiled kernels and torch ops give the same replies"
    return [*out, _check(name, lambda: _same(_replies("cpu"), expected))]


def _check(name: str, work: Callable[..., str], *args) -> dict[str, Any]:
    try:
        return {"name": name, "passed": True, "says": work(*args)}
    except Exception as e:  # doctor reports any failure
        says = str(e) if isinstance(e, ArithmeticError) else f"{type(e).__name__}: {e}"
        return {"name": name, "passed": False, "says": says}


def _products(isa: str) -> str:
    generator, worst = torch.Generator().manual_seed(0), 0.0
    w = torch.randn(48, 192, generator=generator) * 0.02
    x = torch.randn(5, 192, generator=generator)
    # The inputs are rounded too: to bfloat16, or to 8 bits for int8 and int4.
    for fmt, limit in (("fp32", MARGIN), ("bf16", 0.02), ("int8", 0.03), ("int4", 0.03)):
        data, scale = native.pack(fmt, w, isa=isa)
        want = x @ native.unpack(fmt, data, 48, 192, scale, isa).T
        got = native.linear(fmt, data, scale, 48, x, isa)
        error = float((got - want).abs().max() / want.abs().max())
        if not error <= limit:
            raise ArithmeticError(
                f"{fmt} weights: off by {error:.2g} of the largest value; rounding explains at "
                f"most {limit:g}"
            )
        worst = max(worst, error)
    return f"fp32, bf16, int8, int4; at most {worst:.1g} off, which rounding explains"


def _replies(backend: str) -> Replies:
    """Generate greedily from three prompts; return the tokens and their log-probabilities."""
    llm = LLM(_tiny_model(), cache="fp32", backend=backend, cache_memory=1 << 22)
    prompts: list[str | list[int]] = [
        [(7 * i + j) % 128 for i in range(n)] for j, n in enumerate((1, 19, 64))
    ]
    params = SamplingParams(temperature=0.0, max_tokens=24, logprobs=0, ignore_eos=True)
    outs = llm.generate(prompts, params)
    logprobs = [found[t] for o in outs for t, found in zip(o.token_ids, o.logprobs)]
    return [o.token_ids for o in outs], logprobs


def _tiny_model() -> Transformer:
    """Make a small DeepSeek-V2 with random weights."""
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
    return Transformer(config).init_weights(1).eval()


def _same(a: Replies, b: Replies) -> str:
    if a[0] != b[0]:
        raise ArithmeticError("their greedy tokens differ")
    off = max(abs(x - y) for x, y in zip(a[1], b[1]))
    if not off <= MARGIN:
        raise ArithmeticError(f"log-probabilities differ by up to {off:.2g}")
    return f"{len(a[1])} greedy tokens, log-probabilities within {off:.1g}"


# ---- the judgement -------------------------------------------------------------------------------
def _judge(found: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return (problems, notes)."""
    problems = [f"{c['name']}: NO. {c['says']}" for c in found["checks"] if not c["passed"]]
    problems += [
        f"{name} is not installed; install lamoe again with pip"
        for name, version in found["versions"].items()
        if version is None
    ]
    kernel_problems, notes = _judge_kernels(found["kernels"])
    notes += _judge_threads(found["cpu"])
    if found["extras"]["serve"]["missing"]:
        notes.append("lamoe serve needs pip install 'lamoe[serve]'")
    if "probe" not in found and found["kernels"]["isa"]:
        notes.append("the speed was not measured, because too little memory is available")
    return problems + kernel_problems, notes


def _judge_kernels(kernels: dict[str, Any]) -> tuple[list[str], list[str]]:
    isa, why, could = kernels["isa"], kernels["why"], kernels["could"]
    if isa is not None:
        if could and isa != could[0]:
            return [], [f"LAMOE_ISA={isa} disables {could[0]}, which is faster"]
        return [], []
    if native.available():  # LAMOE_ISA names an unsupported instruction set
        return [f"{why}. No model runs with this setting; unset LAMOE_ISA"], []
    said = (
        f"the compiled kernels do not run: {why}. Everything except quantised weights works on "
        "torch ops, many times slower"
    )
    if native.lib is None:
        said += "; install lamoe with a C++ compiler"
    return ([], [said]) if native.switched_off() else ([said], [])


def _judge_threads(cpu: dict[str, Any]) -> list[str]:
    quota = max(1, int(cpu["quota"])) if cpu["quota"] else None
    granted = min(filter(None, (cpu["usable"], quota)), default=None)
    if not granted or cpu["threads"] <= granted:
        return []
    return [
        f"{cpu['threads']} threads for {granted} CPU{'s' * (granted != 1)} will wait for each "
        f"other; set --threads {granted} or OMP_NUM_THREADS={granted}"
    ]


# ---- the output ----------------------------------------------------------------------------------
def render(found: dict[str, Any]) -> str:
    """Format the facts as lines of text. The last line is the verdict."""
    rows = [
        *_machine_rows(found),
        *_installation_rows(found),
        *(("check", f"{'ok ' if c['passed'] else 'NO '} {c['name']}: {c['says']}")
          for c in found["checks"]),
        *(("note", n) for n in found["notes"]),
        *(("problem", p) for p in found["problems"]),
        ("verdict", _verdict(found)),
    ]  # fmt: skip
    return "\n".join(f"{name:9} {text}" for name, text in rows)


def _machine_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, memory, variables = found["cpu"], found["memory"], found["variables"]
    total, available = (
        "unknown" if memory[k] is None else human_bytes(memory[k]) for k in ("total", "available")
    )
    limited = f", limited to {cpu['quota']:g}" if cpu["quota"] else ""
    rows = [
        ("cpu", cpu["model"]),
        ("features", " ".join(cpu["features"]) or "none that the kernels can use"),
        (
            "cores",
            f"{cpu['cores'] or '?'} cores, {cpu['logical']} logical CPUs, {cpu['usable']} usable"
            f"{limited}",
        ),
        (
            "threads",
            f"{cpu['threads']} (OMP_NUM_THREADS {variables['OMP_NUM_THREADS'] or 'not set'}; "
            "--threads overrides it)",
        ),
        (
            "memory",
            f"{total}, {available} available; transparent huge pages: "
            f"{memory['huge_pages'] or 'unknown'}",
        ),
    ]
    if probe := found.get("probe"):
        rows.append(
            (
                "measured",
                f"{probe['read_bytes_per_s'] / 1e9:.1f} GB/s read, "
                f"{probe['int8_ops_per_s'] / 1e9:.0f} Gop/s int8, "
                f"{probe['bf16_flops'] / 1e9:.0f} GFLOP/s bf16, "
                f"{probe['fp32_flops'] / 1e9:.0f} GFLOP/s fp32, "
                f"with {cpu['threads']} thread{'s' * (cpu['threads'] > 1)}",
            )
        )
    return rows


def _installation_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    kernels, variables, hub = found["kernels"], found["variables"], found["hub"]
    if kernels["isa"]:
        runs = f"{kernels['isa']} (this CPU supports {', '.join(kernels['could'])})"
    else:
        runs = f"they do not run: {kernels['why']}"
    settings = [f"{v} {variables[v] or 'not set'}" for v in CHOICES]
    versions = {"lamoe": found["lamoe"], **found["versions"]}
    backend = found["backend"]
    rows = [
        ("devices", ", ".join(found["devices"])),
        ("backend", f"{backend['name'] or 'none'}: {backend['why']}"),
        ("kernels", runs),
        ("", ", ".join(settings)),
        ("versions", ", ".join(f"{name} {v or 'MISSING'}" for name, v in versions.items())),
    ]
    for extra, x in found["extras"].items():
        state = f"missing {', '.join(x['missing'])}" if x["missing"] else "present"
        rows.append((f"[{extra}]", f"{state}; for {x['for']}"))
    access = (
        "offline: only what is there already"
        if hub["offline"]
        else "downloads allowed (HF_HUB_OFFLINE=1 forbids them)"
    )
    return [*rows, ("models", f"from the hub into {hub['folder']}, {access}")]


def _verdict(found: dict[str, Any]) -> str:
    if found["verdict"] == "broken":
        return "broken: a check failed; please report the lines above"
    if found["verdict"] == "limited":
        return "limited: see the problems above"
    if found["backend"]["name"] == "cpu":
        isa = found["kernels"]["isa"]
        return f"good: the compiled kernels ({isa}) run and compute what the torch ops do"
    return f"good: the torch backend runs, because {found['backend']['why']}"
