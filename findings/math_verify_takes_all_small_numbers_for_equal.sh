#!/usr/bin/env bash
# math-verify 0.9.0 compares numbers that are written with a decimal point after rounding both to six places behind it
# (float_rounding=6), whatever their size. So any two numbers below half a millionth are the same to it: the charge of an
# electron, 1.6·10⁻¹⁹, "is" its mass, 9.1·10⁻³¹, and 0.0000001 is 0.0000004. Without a decimal point nothing is rounded:
# 10⁻⁷ and 10⁻⁸ differ, as 6.02·10²³ and 6.03·10²³ do. No message tells.
# Follows: as a reward or a score for questions of physics and chemistry it pays any small number for any other. The
# rounding cannot be asked for in digits: multiply both sides by a power of ten, or compare their ratio.
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
seen = {}
for truth, answer, ratio in (
    (r"$1.6\times10^{-19}$", r"$9.1\times10^{-31}$", 1.6e-19 / 9.1e-31),
    (r"$1.6\times10^{-19}$", r"$1.7\times10^{-19}$", 1.6 / 1.7),
    ("$0.0000001$", "$0.0000004$", 0.25),
    ("$10^{-7}$", "$10^{-8}$", 10),
    (r"$6.02\times10^{23}$", r"$6.03\times10^{23}$", 6.02 / 6.03),
    (r"$1.6$", r"$1.7$", 1.6 / 1.7),
):
    seen[truth, answer] = verify(parse(truth), parse(answer))
    print(f"{truth:22} {answer:22} one is {ratio:.4g} times the other: verify says {seen[truth, answer]}")
assert list(seen.values()) == [True, True, True, False, False, False]
print("seen: numbers below half a millionth are all equal, if one of them has a decimal point")
PYTHON
