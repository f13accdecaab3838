#!/usr/bin/env bash
# lighteval 0.13.0's F1 of answers (`f1`, and the F1 for question answering in many languages) is described as "computed
# over the bag of words". A bag counts how often a word is there, as SQuAD's F1 does, so that each needless repetition
# costs precision. lighteval makes a set of the words. A model that is caught in a loop and says "Paris" 200 times has an
# F1 of 1 (SQuAD: 0.01); one that says "the" where two are asked for loses nothing either. Nothing is said.
# Follows: the score does not see the most common way in which small, quantised or over-trained models break. It is not
# SQuAD's F1, and is higher than a published one. Look at lengths too, or compute F1 with counts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check lighteval==0.13.0 transformers==5.23.0 torch==2.13.0
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from collections import Counter
from importlib.metadata import version

from lighteval.metrics.metrics import Metrics
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.requests import Doc

print({name: version(name) for name in ("lighteval",)})


def bag(reference, answer):
    """F1 over counted words, as SQuAD's script has it."""
    wanted, given = Counter(reference.split()), Counter(answer.split())
    both = sum((wanted & given).values())
    return 2 * both / (sum(wanted.values()) + sum(given.values()))


found = {}
for told, reference, answer in (
    ("the same", "Paris", "Paris"),
    ("200 times", "Paris", " ".join(["Paris"] * 200)),
    ("a sentence in a loop", "the river runs to the sea", " ".join(["the river runs to the sea"] * 40)),
    ("one more word", "Paris", "Paris France"),
):
    doc = Doc(query="", choices=[reference], gold_index=0)
    score = Metrics.f1_score.value.compute_sample(doc=doc, model_response=ModelResponse(text=[answer]))["f1"]
    found[told] = float(score), bag(reference, answer)
    print(f"{told}: lighteval {found[told][0]:.3f}, over counted words {found[told][1]:.3f}")
assert found["the same"] == (1, 1) and found["one more word"][0] == found["one more word"][1]
assert all(found[told][0] == 1 and found[told][1] < 0.06 for told in ("200 times", "a sentence in a loop"))
print("seen: an answer in a loop has an F1 of 1")
PYTHON
