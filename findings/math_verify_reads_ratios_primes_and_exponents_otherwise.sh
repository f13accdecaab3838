#!/usr/bin/env bash
# math-verify 0.9.0 gives three more ways to write an answer a meaning that nobody has, and says nothing:
# - a ratio of three is divided through: 1:2:3 is (1/2)/3, so it equals 1/6 and 3:2:1 becomes (3/2)/1; 2:4:6, the same
# ratio as 1:2:3, is 1/12 and does not equal it. (Ratios of two are right.)
# - the prime of a derivative is dropped: f'(x) equals f(x), and a' equals a;
# - an exponent as programs print it is Euler's number: 1e-3 is e - 3, about -0.28, and 1.5e3 is 1.5·e·3, about 12.2.
# Follows: rewards for such answers pay wrong ones and do not pay right ones. Ask for ratios as lists and for numbers as
# 10^{-3}, and look at what is parsed before training on it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from math_verify import parse, verify

print({name: version(name) for name in ("math-verify", "latex2sympy2_extended", "sympy")})
pairs = (
    ("$1:2:3$", r"$\frac{1}{6}$", False),
    ("$2:4:6$", "$1:2:3$", True),
    ("$f'(x)$", "$f(x)$", False),
    ("$a'$", "$a$", False),
    ("$1e-3$", "$0.001$", True),
    ("$1.5e3$", "$1500$", True),
)
for truth, answer, right in pairs:
    read, other = parse(truth), parse(answer)
    told = verify(read, other)
    print(f"{truth:8} = {answer:14} truly {right!s:5} verify {told!s:5} read as {read[0]} and {other[0]}")
    assert told is not right, "the fault is mended"
for text in ("$1:2:3$", "$1e-3$", "$1.5e3$"):
    print(f"{text:8} is taken for {float(parse(text)[0].evalf()):.4f}")
assert abs(float(parse("$1e-3$")[0].evalf()) - (2.718281828 - 3)) < 1e-6
assert verify(parse("$2:4$"), parse("$1:2$")) and verify(parse("$10^{-3}$"), parse("$0.001$"))
print("seen: every one of these comparisons comes out the wrong way round")
PYTHON
