"""`make gpu-check` without a GPU: some cases with tiny networks, and how it goes on after one that fails."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import ENVIRONMENT, ROOT, SECONDS

BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))

import gpu_check  # noqa: E402
import gpu_part  # noqa: E402
import gpu_training  # noqa: E402
from gpu_case import Case  # noqa: E402

from dalle.files import write_text  # noqa: E402


def check(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_check.py"), *words],
        env={**ENVIRONMENT, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{BENCHMARKS}"},
        capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would be done")
def test_without_a_gpu_it_says_what_it_would_do(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--only", "dalle"])
    assert gpu_check.main() == 0
    first, *parts = capsys.readouterr().out.splitlines()
    assert "no GPU" in first
    assert [line.split() for line in parts] == [["dalle", "below", *gpu_training.COLUMNS]]


def test_what_is_chosen():
    parts = gpu_part.all_parts()
    names = {
        f"{part}/{case}" for part, cases in gpu_check.chosen(parts, "vae,*/cpu").items() for case in cases
    }
    assert {"vae/bf16", "vae/resume", "clip/cpu"} <= names
    assert "clip/bf16" not in names
    assert gpu_check.chosen(parts, "") == parts
    with pytest.raises(SystemExit, match="no part vea"):
        gpu_check.chosen(parts, "vea")


def test_noise_drawn_on_the_cpu_is_the_cpu_s():
    """And whatever is drawn, in place or not, is what was asked for."""

    def drawn():
        torch.manual_seed(1)
        a = torch.rand(3, dtype=torch.float64)
        b = torch.randn_like(a).bernoulli_(0.5)
        return [a, b, torch.randint(9, (4,)), torch.nn.functional.dropout(torch.ones(8))]

    expected = drawn()
    with gpu_training.DrawnOnCpu():
        found = drawn()
        assert torch.rand(3, device="meta").device.type == "meta"
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


def part(
    tmp_path: Path, act: Callable[[str], None], cases: list[str], limit: float, seconds: float
) -> gpu_part.Part:
    """A part whose cases do what `act` does with their names."""

    def work(names: list[str]) -> None:
        for name in names:
            path = tmp_path / f"p.{name}.json"
            write_text(path, json.dumps({"status": "running", "began": time.time()}))
            act(name)
            write_text(path, json.dumps({"status": "ok"}))

    made = {name: Case(dict, limit=limit) for name in cases}
    return gpu_part.Part("p", made, tmp_path, work, time.time() + seconds)


def statuses(one: gpu_part.Part) -> dict[str, str]:
    gpu_part.run_parts([one], 1, lambda: None)
    return {name: found["status"] for name, found in one.results.items()}


def test_a_case_that_ends_its_process_does_not_stop_the_others(tmp_path):
    def act(name: str) -> None:
        if name == "b":
            os.write(1, b"gone\n")
            os._exit(3)

    one = part(tmp_path, act, ["a", "b", "c"], 60, 60)
    assert statuses(one) == {"a": "ok", "b": "FAIL", "c": "ok"}
    assert one.results["b"]["text"] == "its process ended (3): gone"


def test_a_case_that_takes_too_long_does_not_stop_the_others(tmp_path):
    one = part(tmp_path, lambda name: time.sleep(60 * (name == "b")), ["a", "b", "c"], 0.5, 60)
    assert statuses(one) == {"a": "ok", "b": "FAIL", "c": "ok"}


def test_what_no_longer_fits_is_said_to_be_left_out(tmp_path):
    one = part(tmp_path, lambda name: time.sleep(60), ["a", "b"], 60, 0.5)
    assert statuses(one) == {"a": "skipped", "b": "skipped"}


@pytest.mark.slow
def test_a_short_selection(tmp_path):
    ended = check(
        "--device", "cpu", "--tiny", "--out", str(tmp_path), "--jobs", "1",
        "--only", "vae/cpu,vae/bf16,vae/resume,vae/fp16,speed/card,speed/train prior",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(ended.stdout.splitlines()) <= gpu_check.LINES
    found = json.loads((tmp_path / "results.json").read_text())
    vae = found["results"]["vae"]
    assert [vae[name]["status"] for name in ("cpu", "bf16", "resume", "fp16")] == [
        "ok",
        "ok",
        "ok",
        "refused",
    ]
    assert vae["resume"]["bit_equal"]
    assert len(vae["bf16"]["losses"]) == gpu_training.TINY_STEPS
    trained = found["results"]["speed"]["train prior"]
    assert trained["eager"]["tflops"] > 0
    assert trained["compiled"]["ms"] > 0
    assert (tmp_path / "report.txt").read_text().startswith(ended.stdout.splitlines()[0])
