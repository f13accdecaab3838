"""What is typed to the shell: set-up, the main job, the tests, completion, several processes and machines.

The scripts run as they are, in a folder laid out like this repository whose .venv hands on to this very Python; only
pip is played by a stand-in that writes down what it is asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.unit.documentation.commands import ROOT, named_test, shown_in
from tests.unit.documentation.warm import warm_python

INDEX = "https://torch.example/whl"
PYTHON = """\
#!/bin/sh
case "$*" in *-m\\ pip*) echo "$@" >>{asked}; exit 0 ;; esac
exec {python} "$@"
"""
QUICK = ["training.logging_steps=1", "eval.enabled=false"]


@pytest.fixture
def repository(folder: Path) -> Path:
    """The cut recipes in a folder with the shell scripts and a finished environment."""
    (folder / "scripts").mkdir()
    for name in ("setup.sh", "finetune.sh", "test.sh"):
        shutil.copy(ROOT / "scripts" / name, folder / "scripts")
    for name in ("constraints.txt", "constraints-newest.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    make_environment(folder)
    return folder


def make_environment(repository: Path, venv: str = ".venv", pins: str = "constraints.txt") -> None:
    """A finished environment that hands on to this one."""
    folder = repository / venv
    (folder / "bin").mkdir(parents=True)
    hand_on(folder / "bin" / "python", PYTHON.format(asked=folder / "asked", python=sys.executable))
    for name, words in (("onecard", "-m toolkit"), ("ruff", "-m ruff"), ("mypy", "-m mypy")):
        hand_on(folder / "bin" / name, f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} {words} "$@"\n')
    (folder / "onecard-build").write_text("cpu")
    (folder / "onecard-index").write_text(INDEX)
    finish(repository, folder, pins)


def hand_on(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def finish(repository: Path, venv: Path, pins: str) -> None:
    """Stamp the environment as complete at these versions, in this place."""
    content = b"".join((repository / name).read_bytes() for name in (pins, "pyproject.toml"))
    digest = hashlib.sha256(content + bytes(repository.resolve())).hexdigest()
    (venv / "onecard-dev").write_text(f"{digest}  -\n")


def shell(repository: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ONECARD_TORCH_INDEX": INDEX, **variables}
    return subprocess.run(words, cwd=repository, env=environment, capture_output=True, text=True, check=False)


def test_setup_leaves_a_current_environment_alone(repository: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in repository.rglob("*")}
    for extra in ([], ["dev"]):
        done = shell(repository, "bash", "scripts/setup.sh", *extra)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {path: path.stat().st_mtime_ns for path in repository.rglob("*")} == before


def test_setup_installs_where_versions_have_changed(repository: Path) -> None:
    with (repository / "constraints.txt").open("a") as constraints:
        constraints.write("another==1\n")
    done = shell(repository, "bash", "scripts/setup.sh", PATH=f"{repository / '.venv' / 'bin'}:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "onecard: ready"
    asked = (repository / ".venv" / "asked").read_text().splitlines()
    assert len(asked) == 2
    assert all("install" in line and "-c constraints.txt" in line for line in asked)
    assert asked[0].endswith(f"--extra-index-url {INDEX} torch")
    assert asked[1].endswith(("-e .", "-e .[gpu]"))
    assert shell(repository, "bash", "scripts/setup.sh").stderr == ""
    assert len((repository / ".venv" / "asked").read_text().splitlines()) == 2
    assert shell(repository, "bash", "scripts/setup.sh", "all").returncode == 2


def test_the_newest_stack_is_another_environment(repository: Path) -> None:
    before = (repository / ".venv" / "onecard-dev").read_text()
    make_environment(repository, ".venv-newest", "constraints.txt")  # of other versions than are asked for
    for _ in range(2):
        done = shell(
            repository, "bash", "scripts/setup.sh", "dev", "newest", PATH=f"{repository}/.venv/bin:/usr/bin:/bin"
        )
        assert done.returncode == 0, done.stderr
    asked = (repository / ".venv-newest" / "asked").read_text().splitlines()
    assert len(asked) == 2
    assert all("-c constraints-newest.txt" in line for line in asked)
    assert not (repository / ".venv" / "asked").exists()
    assert (repository / ".venv" / "onecard-dev").read_text() == before
    hand_on(repository / ".venv-newest" / "bin" / "ruff", "#!/bin/sh\necho the newest, asked to $1\nexit 9\n")
    done = shell(repository, "bash", "scripts/test.sh", "--stack", "newest")
    assert (done.returncode, done.stdout) == (9, "the newest, asked to check\n")
    assert shell(repository, "bash", "scripts/setup.sh", "dev", "latest").returncode == 2
    for words in (["--stack"], ["--stack", "latest"]):
        done = shell(repository, "bash", "scripts/test.sh", *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert "oldest|newest" in done.stderr


def test_both_stacks_are_within_what_is_declared() -> None:
    """Every package of the project's own list has one version in each file, and the two of transformers differ."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    versions = []
    for name in ("constraints.txt", "constraints-newest.txt"):
        lines = (line for line in (ROOT / name).read_text().splitlines() if "==" in line and not line.startswith("#"))
        pins = {canonicalize_name(package): version for package, _, version in (line.partition("==") for line in lines)}
        for requirement in map(Requirement, declared):
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), (name, requirement)
        versions.append(pins["transformers"])
    assert Version(versions[0]) < Version(versions[1])


SMI = """\
#!/bin/sh
case "$*" in
    -L) echo "GPU 0: NVIDIA GeForce RTX" ;;
    *compute_cap*) echo "{capability}" ;;
    *) printf '| NVIDIA-SMI 1.2  Driver Version: 1.2  CUDA Version: {cuda}  |\\n' ;;
esac
"""
CUDA_12 = "https://download.pytorch.org/whl/cu126"


@pytest.mark.parametrize(
    ("cuda", "capability", "index", "told"),
    [
        ("13.0", "8.6", None, ""),
        ("12.4", "8.9", CUDA_12, ""),
        ("12.8", "12.0", None, "CUDA 12.8, torch's build for CUDA 12 lacks sm_120; install driver 580 or later"),
        ("11.8", "8.6", None, "for CUDA 11.8, torch needs 12 or 13; install driver 580 or later"),
    ],
)
def test_setup_takes_the_torch_that_the_driver_can_run(
    repository: Path, cuda: str, capability: str, index: str | None, told: str
) -> None:
    venv, own = repository / ".venv", {"ONECARD_TORCH_INDEX": ""}
    hand_on(venv / "bin" / "nvidia-smi", SMI.format(cuda=cuda, capability=capability))
    (venv / "onecard-dev").unlink()
    own["PATH"] = f"{venv / 'bin'}:/usr/bin:/bin"
    done = shell(repository, "bash", "scripts/setup.sh", **own)
    asked = (venv / "asked").read_text() if (venv / "asked").exists() else ""
    if told:
        assert (done.returncode, asked) == (5, "")
        assert told in done.stderr
        assert len(done.stderr.splitlines()) == 1
        return
    assert done.returncode == 0, done.stderr
    assert (f"--extra-index-url {index} torch" in asked) == (index is not None)
    assert ("extra-index-url" in asked) == (index is not None)
    lines = len(asked.splitlines())
    shell(repository, "bash", "scripts/setup.sh", **own)
    assert len((venv / "asked").read_text().splitlines()) == lines  # nothing more to do
    hand_on(venv / "bin" / "nvidia-smi", SMI.format(cuda="12.6" if index is None else "13.1", capability=capability))
    shell(repository, "bash", "scripts/setup.sh", **own)  # another driver
    assert "uninstall -q -y torch" in (venv / "asked").read_text()


def test_finetune_trains(repository: Path) -> None:
    words = ["recipes/quickstart.yaml", "training.seed=1", "training.output_dir=runs/seed1"]
    assert any(each.words[2:] == words for each in shown_in(ROOT / "docs" / "results.md"))
    done = shell(repository, "bash", "scripts/finetune.sh", *words)
    assert done.returncode == 0, done.stderr
    summary = json.loads((repository / "runs" / "seed1" / "summary.json").read_text())
    assert summary["results"]["adapted"]
    assert (repository / "runs" / "seed1" / "adapter" / "adapter_model.safetensors").is_file()
    assert "seed: 1" in (repository / "runs" / "seed1" / "recipe.yaml").read_text()
    assert shell(repository, "bash", "scripts/finetune.sh").returncode == 2


@pytest.fixture
def warm() -> Iterator[None]:
    with warm_python():
        yield


def launch(repository: Path, *words: str) -> subprocess.Popen[str]:
    """`accelerate WORDS`, its processes over gloo on this machine."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=repository, env=environment, stderr=subprocess.PIPE, text=True)


def steps(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line["step"] for line in map(json.loads, lines) if "loss" in line]


def test_finetune_in_two_processes(repository: Path, warm: None) -> None:
    """finetune.sh up to accelerate, which is then begun with the very words it was given."""
    hand_on(repository / ".venv" / "bin" / "accelerate", '#!/bin/sh\nprintf "%s\\n" "$@" >launched\n')
    done = shell(repository, "bash", "scripts/finetune.sh", "--processes", "2", "recipes/quickstart.yaml", *QUICK)
    assert done.returncode == 0, done.stderr
    launched = launch(repository, *(repository / "launched").read_text().splitlines())
    _, err = launched.communicate()
    assert launched.returncode == 0, err
    assert "processes: 2" in err
    assert steps(repository / "runs" / "quickstart") == [1, 2]
    for wrong in ("x", "0", ""):
        assert shell(repository, "bash", "scripts/finetune.sh", "--processes", wrong, "r.yaml").returncode == 2


def test_two_machines(repository: Path, warm: None) -> None:
    """The command that is shown for each of several machines: two of one process each, both of them this one."""
    shown = next(each for each in shown_in(ROOT / "docs" / "several-cards.md") if "--num_machines" in each.text)
    assert str(named_test(shown)).endswith("::test_two_machines")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    machines = []
    for rank in range(2):
        given = {"--num_processes": "2", "--machine_rank": str(rank), "--main_process_ip": "127.0.0.1"}
        given["--main_process_port"] = port
        words = [given.get(before, word) for before, word in zip(shown.words, shown.words[1:], strict=False)]
        machines.append(launch(repository, *words, *QUICK))
    said = [machine.communicate()[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "processes: 2" in said[0]
    assert steps(repository / "runs" / "quickstart") == [1, 2]


def test_the_checks_run_and_take_arguments(repository: Path) -> None:
    """ruff, its formatter, mypy and pytest on a package of one file; each is able to stop what follows."""
    (repository / "toolkit").mkdir()
    (repository / "toolkit" / "__init__.py").write_text('"""One file."""\n')
    (repository / "tests").mkdir()
    (repository / "tests" / "test_one.py").write_text("def test_triton():\n    pass\n\n\ndef test_other():\n    pass\n")
    (repository / "metric.py").unlink()
    words, variables = ("bash", "scripts/test.sh", "tests", "-k", "triton"), {"ONECARD_TEST_WORKERS": "1"}
    done = shell(repository, *words, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All checks passed" in done.stdout
    assert "no issues found in 1 source file" in done.stdout
    assert "1 passed" in done.stdout
    wrong = {"unused": "import os\n", "badly set": "x = 1;  y = 2\n", "untyped": "def f(x):\n    return x\n"}
    for why, text in wrong.items():
        (repository / "toolkit" / "__init__.py").write_text(f'"""One file."""\n\n{text}')
        done = shell(repository, *words, **variables)
        assert done.returncode != 0, why
        assert "passed in" not in done.stdout, why


def test_the_tests_on_a_card_say_what_is_missing(repository: Path) -> None:
    """In order: the compiler, and the build of torch, which pip's stand-in does not bring."""
    shutil.copy(ROOT / "scripts" / "setup_card.sh", repository / "scripts")
    tools = repository / "tools"
    tools.mkdir()
    for name in ("bash", "cat", "dirname", "env", "grep", "rm", "sha256sum"):
        (tools / name).symlink_to(shutil.which(name) or "")
    done = shell(repository, "bash", "scripts/test.sh", "--card", PATH=str(tools))
    assert done.returncode == 5
    (line,) = done.stderr.splitlines()
    assert "g++ is missing" in line
    hand_on(tools / "g++", "#!/bin/sh\n")
    done = shell(repository, "bash", "scripts/test.sh", "--card", PATH=str(tools))
    assert done.returncode == 5
    assert "no CUDA build of torch from https://pypi.org/simple" in done.stderr.splitlines()[-1]


def test_completion_is_installed(tmp_path: Path) -> None:
    program = f"{sys.executable} -m toolkit --install-completion; exit $?"
    done = shell(tmp_path, "bash", "-c", program, HOME=str(tmp_path), PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert "bash completion installed" in done.stdout
    assert "complete_bash" in (tmp_path / ".bash_completions" / "onecard.sh").read_text()
    assert "onecard.sh" in (tmp_path / ".bashrc").read_text()
