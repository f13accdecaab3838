#!/usr/bin/env bash
# lighteval 0.13.0's two F1 scores of classes are not the F1 that their benchmarks define, and both are too high:
# - `loglikelihood_f1` (GLUE's MRPC and QQP) asks scikit-learn for the F1 of each class and reports the largest. GLUE's is
#   that of class 1, "the same meaning". A model that never says 1 has an F1 of 0 there; here it has that of class 0, which
#   is the more common class in QQP: saying "no" to everything scores 0.77.
# - `mf1` (SuperGLUE's CB), which should be the mean of the F1s of three classes, takes for each class the micro average
#   over the class and all that is not the class: that is an accuracy, in which a class that is never named and not there
#   is right each time. Always one answer scores 0.556 instead of 0.167; a model that is wrong on every row scores 0.333.
# Nothing is said. The accuracy beside them is right.
# Follows: do not compare them with published F1s, nor choose a model by them. Compute F1 from the saved predictions.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check lighteval==0.13.0 scikit-learn transformers==5.23.0 torch==2.13.0
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

from lighteval.metrics.metrics import Metrics
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.requests import Doc
from sklearn.metrics import f1_score

print({name: version(name) for name in ("lighteval", "scikit-learn")})


def scored(metric, truths, answers, classes):
    """lighteval's score of answers, each the choice with the highest log-probability."""
    metric, rows = metric.value, []
    for truth, answer in zip(truths, answers, strict=True):
        doc = Doc(query="", choices=[str(number) for number in range(classes)], gold_index=truth)
        response = ModelResponse(logprobs=[0.0 if number == answer else -9.0 for number in range(classes)])
        rows.append(metric.compute_sample(doc=doc, model_response=response)[metric.metric_name])
    return float(metric.get_corpus_aggregations()[metric.metric_name](rows))


truths = [0] * 63 + [1] * 37  # 37 of 100 pairs have the same meaning, as in QQP
always_no, half_found = [0] * 100, [0] * 45 + [1] * 18 + [1] * 25 + [0] * 12
found = {}
for told, answers in (("always no", always_no), ("25 of 37 found, 18 false", half_found)):
    found[told] = scored(Metrics.loglikelihood_f1, truths, answers, 2)
    true = f1_score(truths, answers, zero_division=0)
    print(f"two classes, {told}: lighteval {found[told]:.3f}, the F1 of class 1 {true:.3f}")
    assert abs(found[told] - max(f1_score(truths, answers, average=None, zero_division=0))) < 1e-9
assert found["always no"] > 0.77 > found["25 of 37 found, 18 false"] > f1_score(truths, half_found) + 0.1
truths = [0, 0, 0, 1, 1, 1, 2, 2, 2]
for told, answers, seen in (("always 0", [0] * 9, 5 / 9), ("all wrong", [1, 1, 1, 2, 2, 2, 0, 0, 0], 1 / 3)):
    score = scored(Metrics.multi_f1_numeric, truths, answers, 3)
    true = f1_score(truths, answers, average="macro", zero_division=0)
    print(f"three classes, {told}: lighteval {score:.3f}, the mean F1 of the classes {true:.3f}")
    assert abs(score - seen) < 1e-9 and true < 0.17
print("seen: the F1s of classes count what is not in the class")
PYTHON
