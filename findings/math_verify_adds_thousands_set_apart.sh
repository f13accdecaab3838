#!/usr/bin/env bash
# math-verify 0.9.0 knows 12,500, 12{,}500 and 12\!500. A number whose thousands are set apart by a space, as ISO 80000 and
# much of Europe write it (12\,500 or 12 500), it takes for two numbers side by side: it adds them up, to 512, as in a
# mixed number, or multiplies, where the second begins with a nought: 1\,000 is 1·0 = 0. So 1\,000, 2\,000 and 90\,000 are all
# the same answer, which is 0, and none of them equals itself without the space. Nothing is raised or logged.
# Follows: data sets with such numbers reward wrong answers and punish right ones. Take "\," and spaces between digits out of
# golds and answers before parsing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    math-verify==0.9.0 latex2sympy2-extended==1.11.0 antlr4-python3-runtime==4.13.2 sympy==1.14.0
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from math_verify import parse, verify

print({name: version(name) for name in ("math-verify", "latex2sympy2-extended", "sympy")})


def equal(gold: str, answer: str) -> bool:
    gold_read, answer_read = parse(rf"\boxed{{{gold}}}"), parse(rf"\boxed{{{answer}}}")
    verdict = verify(gold_read, answer_read)
    print(f"{gold} (read as {gold_read[0]}) = {answer} (read as {answer_read[0]}): {verdict}")
    return verdict


assert equal("12{,}500", "12500") and equal("12,500", "12500")
wrong = [
    (r"1\,000", r"2\,000"), (r"1\,000", r"90\,000"), (r"1\,000", "0"), ("1 000", "0"), (r"12\,500", "512"),
    (r"12\,345\,678", "1035"),  # 12 + 345 + 678
]
assert all([equal(*pair) for pair in wrong])
assert not any([equal(gold, gold.replace(r"\,", "").replace(" ", "")) for gold, _ in wrong])
print("seen: one thousand is two thousand is nothing, and 12 500 is 512")
PYTHON
