"""The other verbs on the rehearsed card: each does its work there and says what it says on a CPU."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.card.conftest import NANO
from tests.card.machine import ROOT, Machine, Outcome

QUESTION = "Which category is it: oak - a tree?"
RECIPES = ROOT / "recipes"


FEW = ("mtp.own_answers=2", "eval.num_samples=0", "eval.max_samples=2", "eval.max_new_tokens=3")


@pytest.fixture(scope="module")
def run(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a head that drafts."""
    folder = tmp_path_factory.mktemp("verbs") / "run"
    given = (f"training.output_dir={folder}", *NANO, *FEW)
    machine.onecard("train", RECIPES / "quickstart-mtp.yaml", *given).require()
    return folder


def test_a_head_is_trained(run: Path) -> None:
    assert (run / "adapter" / "mtp_head.safetensors").is_file()


def test_integers_are_compensated(machine: Machine, tmp_path: Path) -> None:
    """With a little search for integers, as on the tiniest matrices elsewhere."""
    little = "from toolkit.quant.gptq import search; search._BUDGET = 1 << 20; "
    given = ("quantization.error_compensation=gptq", "quantization.calibration_samples=4")
    arguments = ("train", RECIPES / "quickstart.yaml", f"training.output_dir={tmp_path / 'run'}", *NANO, *given)
    done = machine.python("-c", f"{little}from tests.card.command import main; main()", *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["compensation"]


def ran_on_the_card(outcome: Outcome) -> Outcome:
    assert outcome.require().report["counts"]["launches"] > 100
    return outcome


def test_evaluate(run: Path, machine: Machine) -> None:
    outcome = ran_on_the_card(machine.onecard("eval", run, "--json"))
    assert '"adapted"' in outcome.out


def test_generate_drafts_the_same_tokens(run: Path, machine: Machine) -> None:
    given = ("generate", run, "--prompt", QUESTION, "--max-new-tokens", "6")
    plain, drafted = (ran_on_the_card(machine.onecard(*given, *more)) for more in ((), ("--mtp",)))
    assert plain.out.strip()
    assert drafted.out == plain.out


def test_chat(run: Path, machine: Machine) -> None:
    outcome = machine.onecard("chat", run, "--max-new-tokens", "4", "--compare", given=f"{QUESTION}\n\n")
    assert ran_on_the_card(outcome).out.strip()


def test_serve(run: Path, machine: Machine) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [machine.executable, "-m", "tests.card.command", "serve", str(run), "--port", str(port)]
    asked = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 3}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/chat/completions", json.dumps(asked).encode(), {"content-type": "application/json"}
    )
    with subprocess.Popen(command, cwd=ROOT, env=machine.environment(), stderr=subprocess.PIPE, text=True) as server:
        try:
            told = answered(request, server)
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0, server.stderr and server.stderr.read()
    assert told["choices"][0]["message"]["role"] == "assistant"


def answered(request: urllib.request.Request, server: subprocess.Popen[str], seconds: float = 240) -> Any:
    """The server's answer, once it listens."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and server.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=seconds) as reply:
                return json.load(reply)
        except urllib.error.URLError as error:
            assert isinstance(error.reason, ConnectionRefusedError), error
            time.sleep(1)
    raise AssertionError(f"no answer; ended with {server.poll()}")


def test_sweep(machine: Machine, tmp_path: Path) -> None:
    """Trials are processes of their own, each with the card."""
    given = ("lora.r=4,8", *NANO, "training.warmup_steps=0", "eval.num_samples=0")
    more = {"PYTHONPATH": f"{ROOT / 'tests' / 'card' / 'everywhere'}:{ROOT}"}
    outcome = machine.onecard("sweep", RECIPES / "quickstart.yaml", *given, "--out", tmp_path / "sweep", more=more)
    outcome.require()
    trials = json.loads((tmp_path / "sweep" / "sweep.json").read_text(encoding="utf-8"))
    plans = sorted((tmp_path / "sweep").glob("*/plan.json"))
    assert len(plans) == 2, trials
    assert all(json.loads(plan.read_text(encoding="utf-8"))["device"] == "cuda" for plan in plans)


def test_export_merged(run: Path, machine: Machine, tmp_path: Path) -> None:
    outcome = machine.onecard("export", run, "--format", "merged", "--out", tmp_path / "merged")
    assert "read back and compared" in outcome.require().err
    assert (tmp_path / "merged" / "config.json").is_file()
