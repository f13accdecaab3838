#!/usr/bin/env bash
# math-verify 0.9.0 reads three common ways to write a number as another number, and says nothing:
# - a repeating decimal loses its repeating part: 0.\overline{3} is 0, so the right answer 1/3 is wrong and 0 is right,
# and so is any other repeating decimal such as 0.\overline{72};
# - a number in another base loses its base: 1011_2 (eleven) equals 1011_8 (five hundred and twenty-one) and 1011;
# - degrees inside of a function are radians: \sin 30^\circ is sin(30), about -0.988, and not 1/2.
# Follows: where the answers of a dataset hold these, a reward pays the wrong answer and not the right one. Write such
# answers as fractions, and in base ten, before they are compared.
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
    (r"$0.\overline{3}$", r"$\frac{1}{3}$", True),
    (r"$0.\overline{3}$", "$0$", False),
    (r"$0.\overline{3}$", r"$0.\overline{72}$", False),
    (r"$2.\overline{6}$", "$2$", False),
    ("$1011_2$", "$11$", True),
    ("$1011_2$", "$1011_8$", False),
    ("$1011_2$", "$1011$", False),
    (r"$\sin 30^\circ$", r"$\frac{1}{2}$", True),
    (r"$\sin 30^\circ$", r"$\sin 30$", False),
)
for truth, answer, right in pairs:
    told = verify(parse(truth), parse(answer))
    print(f"{truth:20} = {answer:20} truly {right!s:5} verify {told!s:5} read as {parse(truth)[0]} and {parse(answer)[0]}")
    assert told is not right, "the fault is mended"
assert verify(parse("$1/3$"), parse("$1/3$")) and not verify(parse("$1/3$"), parse("$1/2$"))
print("seen: bars, bases and degrees are dropped, and every one of these comparisons comes out the wrong way round")
PYTHON
