"""Does stock software get the same numbers from an adapter as we do?

    .venv/bin/python scripts/parity/stock_peft.py ARTIFACT [--base FOLDER] [--data FILE.jsonl] [--json]

Makes (once) a second environment that holds only torch, transformers and peft at the versions of constraints.txt, and
compares: the adapter's keys, logits on the same dequantised base, held-out loss of our int8 base against the original
base, and the way back, an adapter saved by stock PEFT in ours. Exit status 0 where all agree, else 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

__all__ = ["Line", "compare", "encode_rows", "main"]

LOGITS_WITHIN = 1e-4  # largest absolute difference, fp32
LOSS_WITHIN = 0.005  # relative; the int8 base against the original one
PROMPTS = (
    "Which category is it: fern - a flowerless plant with feathery leaves?",
    "Explain in one sentence why the sky is blue.",
    "It is a truth universally acknowledged, that",
    "1 2 3 4 5 6 7 8 9 10 11 12 13",
)
MOST_TOKENS = 512


@dataclass(frozen=True)
class Line:
    """One line of the table: what was compared, the figure found, the bound, and whether it holds."""

    what: str
    found: str
    wanted: str
    ok: bool


def main(arguments: list[str] | None = None) -> int:
    """Run the whole comparison; returns the exit status."""
    options = _options(arguments)
    from toolkit.errors import OnecardError

    try:
        lines = _check(options)
    except OnecardError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps([asdict(line) for line in lines], indent=2))
    else:
        width = max(len(line.what) for line in lines)
        for line in lines:
            print(f"{'ok' if line.ok else 'FAILED':6}  {line.what:{width}}  {line.found}  (wanted {line.wanted})")
    return 0 if all(line.ok for line in lines) else 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="the adapter folder of a run")
    parser.add_argument("--base", help="folder or repository of the base; else what the manifest names")
    parser.add_argument(
        "--data", type=Path, help="held-out rows with `messages`, a .jsonl file; else the fixed prompts"
    )
    parser.add_argument("--most-rows", type=int, default=100, help="held-out rows used (default 100)")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-parity", help="the second environment")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def _check(options: argparse.Namespace) -> list[Line]:
    from safetensors.torch import load_file, save_file
    from stock_side import logits, loss
    from transformers import AutoTokenizer

    from toolkit.adapters import load_adapter
    from toolkit.artifact import read_manifest, verify_artifact
    from toolkit.errors import ModelError
    from toolkit.quant import dequantize_state, load_int8

    named = read_manifest(options.artifact)["base"]
    if not options.base and named["revision"] is None:
        raise ModelError(f"{options.artifact}: its base {named['name']!r} was a local folder: give it with --base")
    base, revision = options.base or named["name"], "main" if options.base else named["revision"]
    verify_artifact(options.artifact, base=base, revision=revision, strict=True)
    tokenizer = AutoTokenizer.from_pretrained(options.artifact)
    prompts, rows = _encode_prompts(tokenizer), _read_rows(tokenizer, options.data, options.most_rows)
    python = _stock_python(options.venv)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        model, _ = load_int8(base, revision=revision)
        state = dequantize_state(model)
        save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, out / "weights.safetensors")
        ours = load_adapter(model, options.artifact)
        ours_logits, ours_loss = logits(ours, prompts), loss(ours, rows)
        job = {
            "base": str(Path(base).resolve()) if Path(base).is_dir() else base,
            "revision": revision,
            "weights": str(out / "weights.safetensors"),
            "adapter": str(options.artifact.resolve()),
            "made": str(out / "made"),
            "prompts": prompts,
            "rows": rows,
            "out": scratch,
        }
        report = _run_stock(python, job)
        theirs = load_file(out / "logits.safetensors")
        model, _ = load_int8(base, revision=revision)
        made_logits = logits(load_adapter(model, out / "made"), prompts)
    return compare(report, theirs, ours_logits, made_logits, ours_loss)


def compare(
    report: dict[str, Any], theirs: dict[str, Any], ours: list[Any], made: list[Any], ours_loss: float
) -> list[Line]:
    """The table, from stock's report, its logits (`theirs.N`, `plain.N`, `made.N`) and ours ([T, V] each)."""
    keys = report["keys"]
    relative = abs(ours_loss - report["loss"]) / report["loss"]
    return [
        Line(
            "environment without onecard", ", ".join(report["strangers"]) or "clean", "clean", not report["strangers"]
        ),
        Line("keys the adapter lacks", str(len(keys["missing"])), "0", not keys["missing"]),
        Line(
            "keys stock PEFT does not know",
            f"{len(keys['unexpected'])} beside {len(keys['matched'])}",
            "0",
            not keys["unexpected"] and bool(keys["matched"]),
        ),
        _effect_line(theirs, len(ours)),
        _logits_line("logits, our adapter in stock PEFT", theirs, "theirs", ours),
        _logits_line("logits, stock PEFT's adapter in ours", theirs, "made", made),
        Line(
            "held-out loss, int8 and original base",
            f"{ours_loss:.4f} and {report['loss']:.4f} ({relative:.3%})",
            f"within {LOSS_WITHIN:.1%}",
            relative <= LOSS_WITHIN,
        ),
    ]


def _effect_line(theirs: dict[str, Any], prompts: int) -> Line:
    """Adapters that change nothing would agree everywhere: ours must move each prompt by far more than the bound."""
    moved = min(_difference(theirs[f"theirs.{i}"], theirs[f"plain.{i}"]) for i in range(prompts))
    bound = 100 * LOGITS_WITHIN
    return Line("logits, moved by the adapter", f"{moved:.2e}", f"over {bound:.0e}", moved > bound)


def _logits_line(what: str, theirs: dict[str, Any], kind: str, ours: list[Any]) -> Line:
    difference = max(_difference(theirs[f"{kind}.{i}"], tensor) for i, tensor in enumerate(ours))
    return Line(what, f"differ by {difference:.2e}", f"at most {LOGITS_WITHIN:.0e}", difference <= LOGITS_WITHIN)


def _difference(a: Any, b: Any) -> float:
    difference = float((a - b).abs().max())
    return difference if math.isfinite(difference) else math.inf


def _encode_prompts(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


def _read_rows(tokenizer: Any, data: Path | None, most: int) -> list[dict[str, list[int]]]:
    if data is None:
        return [{"input_ids": ids, "labels": ids} for ids in _encode_prompts(tokenizer)]
    from toolkit.errors import DataError

    try:
        with data.open(encoding="utf-8") as file:
            conversations = [json.loads(line)["messages"] for line in itertools.islice(file, most)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{data}: no rows with `messages` to read ({error}): give held-out rows as JSON Lines"
        ) from None
    if not conversations:
        raise DataError(f"{data}: empty: give held-out rows as JSON Lines")
    return encode_rows(tokenizer, conversations)


def encode_rows(tokenizer: Any, conversations: list[list[dict[str, str]]]) -> list[dict[str, list[int]]]:
    """Token ids and labels; only assistant turns are labelled where the chat template marks them."""
    rows = []
    for messages in conversations:
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = encoded["input_ids"][:MOST_TOKENS], encoded["assistant_masks"][:MOST_TOKENS]
        marked = any(mask)
        rows.append(
            {"input_ids": ids, "labels": [i if m or not marked else -100 for i, m in zip(ids, mask, strict=True)]}
        )
    return rows


def _stock_python(folder: Path) -> str:
    """The second environment's Python; the environment is made where it is missing, incomplete or of other versions."""
    from toolkit.errors import ModelError

    sys.path.insert(0, str(ROOT / "scripts"))
    from second_environment import python_with

    try:
        return python_with(folder, ("torch", "transformers", "peft"))
    except RuntimeError as error:
        raise ModelError(str(error)) from None


def _run_stock(python: str, job: dict[str, Any]) -> dict[str, Any]:
    out = Path(job["out"])
    (out / "job.json").write_text(json.dumps(job))
    program = Path(__file__).with_name("stock_side.py")
    # From a neutral folder and isolated (-I), so that the repository is not importable over there.
    _call([python, "-I", str(program), str(out / "job.json")], "the stock side failed", cwd=out)
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def _call(command: list[str], what: str, cwd: Path | None = None) -> None:
    from toolkit.errors import ModelError

    done = subprocess.run(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        last = ([line for line in done.stderr.splitlines() if line.strip()] or ["no message"])[-1]
        raise ModelError(f"{what}: {last}")


if __name__ == "__main__":
    sys.exit(main())
