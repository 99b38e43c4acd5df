"""Tests of `lamoe doctor`: its facts, its checks of the kernels, its verdict and exit code."""

import json
import os
import re
import tomllib
from pathlib import Path
from unittest import mock

import pytest
import torch

from lamoe import __version__, cli
from lamoe.backends.cpu import native
from lamoe.measure import doctor

ROOT = Path(__file__).resolve().parents[2]
SMALL = 1 << 20
compiled = pytest.mark.skipif(native.lib is None, reason="the compiled kernels are not there")


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in doctor.VARIABLES:
        monkeypatch.delenv(name, raising=False)


@compiled
def test_a_healthy_machine(capsys):
    with mock.patch.object(doctor, "examine", lambda real=doctor.examine: real(SMALL)):
        assert cli.main(["doctor", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert (
        text.splitlines()[-1]
        == f"verdict   good: the compiled kernels ({native.lib.isa()}) run and compute what the "
        "torch ops do"
    )
    assert found["problems"] == [] and found["verdict"] == "good" and found["lamoe"] == __version__
    assert found["kernels"] == {
        "isa": native.lib.isa(),
        "why": None,
        "could": native.lib.features().split(", "),
    }
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert found["cpu"]["logical"] == os.cpu_count()
    assert found["devices"][0] == "cpu" and found["backend"]["name"] == "cpu"
    assert native.lib.isa() in found["backend"]["why"]
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(found["versions"]) == {"python", "system", *doctor._requirements(None)}
    assert None not in found["versions"].values()
    probe = found["probe"]
    assert set(probe) == {"read_bytes_per_s", "int8_ops_per_s", "bf16_flops", "fp32_flops"}
    assert all(v > 1e6 for v in probe.values())
    names = [c["name"] for c in found["checks"]]
    assert len(names) == len(found["kernels"]["could"]) + 2
    assert all(c["passed"] for c in found["checks"])
    for word in (
        "GB/s read",
        "LAMOE_IMPL not set",
        "OMP_NUM_THREADS not set",
        *(f"[{e}]" for e in doctor.EXTRAS),
        *names,
    ):
        assert word in text


def test_every_extra_is_listed_with_its_missing_packages():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert set(doctor.EXTRAS) == set(extras)
    for extra, lines in extras.items():
        assert doctor._requirements(extra) == [re.match(r"[\w.-]+", line)[0] for line in lines]
    with mock.patch.object(doctor, "_version", lambda name: None if name == "uvicorn" else "1"):
        found = doctor.examine(SMALL)
    assert found["extras"]["serve"]["missing"] == ["uvicorn"]
    assert any("lamoe[serve]" in n for n in found["notes"])
    assert not found["problems"]
    with mock.patch.object(doctor, "_version", lambda name: None if name == "tokenizers" else "1"):
        assert any("tokenizers is not installed" in p for p in doctor.examine(SMALL)["problems"])


@compiled
@pytest.mark.parametrize("fmt,by", [("fp32", 1.01), ("bf16", 1.05), ("int4", 1.05)])
def test_a_slightly_wrong_kernel_is_found(monkeypatch, fmt, by):
    right = native.linear
    monkeypatch.setattr(
        native, "linear", lambda f, *args: right(f, *args) * (by if f == fmt else 1.0)
    )
    found = doctor.examine(SMALL)
    assert found["verdict"] == "broken" and doctor.exit_code(found) == 1
    assert any(f"{fmt} weights: off by" in p for p in found["problems"])
    assert doctor.render(found).splitlines()[-1].startswith("verdict   broken")


@compiled
def test_different_replies_of_the_backends_are_found(monkeypatch):
    right = doctor._replies
    for wrong, says in (
        (lambda t, p: ([t[0][::-1], *t[1:]], p), "greedy tokens differ"),
        (lambda t, p: (t, [x + 0.01 for x in p]), "log-probabilities differ"),
    ):
        monkeypatch.setattr(
            doctor,
            "_replies",
            lambda impl, wrong=wrong: wrong(*right(impl)) if impl == "cpu" else right(impl),
        )
        found = doctor.examine(SMALL)
        assert found["verdict"] == "broken" and any(says in p for p in found["problems"])


def test_missing_kernels_are_a_problem_and_disabled_kernels_a_note(monkeypatch):
    monkeypatch.setenv("LAMOE_IMPL", "fused")
    found = doctor.examine(SMALL)
    assert found["verdict"] == "good"
    assert doctor.exit_code(found) == 0
    assert "probe" not in found
    assert len(found["checks"]) == 1
    assert found["backend"]["name"] == "torch"
    assert "because the compiled kernels do not run" in doctor.render(found)
    if native.lib is not None:
        assert any("LAMOE_IMPL=fused" in n for n in found["notes"])
    monkeypatch.delenv("LAMOE_IMPL")
    monkeypatch.setattr(native, "lib", None)
    monkeypatch.setattr(native, "_why", "no such module")
    found = doctor.examine(SMALL)
    assert found["verdict"] == "limited"
    assert doctor.exit_code(found) == 1
    assert "C++ compiler" in found["problems"][0]
    assert "no such module" in found["problems"][0]
    assert doctor.render(found).splitlines()[-1] == "verdict   limited: see the problems above"


@compiled
def test_an_unsupported_instruction_set_is_named(monkeypatch):
    def isa():
        raise ValueError("LAMOE_ISA is 'neon'; this CPU runs: scalar")

    monkeypatch.setattr(native, "lib", mock.Mock(wraps=native.lib, isa=isa))
    found = doctor.examine(SMALL)
    assert found["verdict"] == "limited" and "LAMOE_ISA is 'neon'" in found["problems"][0]
    monkeypatch.setattr(
        native,
        "lib",
        mock.Mock(wraps=native.lib, isa=lambda: "scalar", features=lambda: "avx2, scalar"),
    )
    with mock.patch.object(doctor, "checks", list):
        assert any("disables avx2" in n for n in doctor.examine(SMALL)["notes"])


def test_cpu_facts_and_systems_without_them(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text(
        "".join(
            f"processor\t: {i}\nmodel name\t: A CPU @ 2: fast\nphysical id\t: 0\ncore id\t\t: "
            f"{i // 2}\nflags\t\t: fpu avx2 fma avx512f\n\n"
            for i in range(8)
        )
    )
    cpu = doctor._cpu(file)
    assert cpu["cores"] == 4
    assert cpu["model"] == "A CPU @ 2: fast"
    assert cpu["features"] == ["avx2", "fma", "avx512f"]
    assert doctor._cpu(tmp_path / "none")["cores"] is None
    assert doctor._cpu(tmp_path / "none")["features"] == []
    (tmp_path / "max").write_text("150000 100000\n")
    assert doctor._quota(tmp_path / "max") == 1.5 and doctor._quota(tmp_path / "none") is None
    (tmp_path / "max").write_text("max 100000\n")
    assert doctor._quota(tmp_path / "max") is None


def test_more_threads_than_cpus_is_a_note(monkeypatch):
    cpu = doctor._cpu() | {"usable": 8, "quota": 2.5, "threads": 4}
    monkeypatch.setattr(doctor, "_cpu", lambda: cpu)
    with (
        mock.patch.object(doctor, "checks", list),
        mock.patch.object(doctor.Machine, "probe", lambda *_: doctor.Machine(1e9, 1e9, 1e9, 1e9)),
    ):
        assert any(n.startswith("4 threads for 2 CPUs") for n in doctor.examine(SMALL)["notes"])
        cpu |= {"quota": None}
        assert not any("threads for" in n for n in doctor.examine(SMALL)["notes"])
