#!/usr/bin/env bash
# math-verify 0.9.0 (latex2sympy2-extended 1.11.0): what it cannot read it skips, and takes a number that stands behind for
# the answer. \bmod, \pmod without braces and \lg are such: 17 \bmod 5, which is 2, is read as 5; x \equiv 2 \pmod 5 as 5,
# and so is x \equiv 3 \pmod 5; \lg 100, which is 2, as 100. With braces, \pmod{5}, or \mod, congruences are compared.
# Nothing is raised or logged, and what is parsed looks like any other answer.
# Follows: with such golds the modulus alone is rewarded, and any residue passes for any other. Print parse() of all golds
# before training and look for those whose value is not the data set's.
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
    gold_read, answer_read = parse(f"${gold}$"), parse(f"${answer}$")
    verdict = verify(gold_read, answer_read)
    print(f"{gold} (read as {gold_read[0]}) = {answer} (read as {answer_read[0]}): {verdict}")
    return verdict


wrong = [
    (r"x \equiv 2 \pmod 5", r"x \equiv 3 \pmod 5"), (r"x \equiv 2 \pmod 5", "5"), (r"17 \bmod 5", "5"),
    (r"17 \bmod 5", r"18 \bmod 5"), (r"\lg 100", "100"),
]
assert all([equal(*pair) for pair in wrong])
assert not any([equal(*pair) for pair in ((r"17 \bmod 5", "2"), (r"\lg 100", "2"))])
assert not equal(r"x \equiv 2 \pmod{5}", r"x \equiv 3 \pmod{5}") and equal(r"\log_{10} 100", "2")
print("seen: 2 and 3 modulo 5 are the same answer, which is 5; the logarithm of 100 is 100")
PYTHON
