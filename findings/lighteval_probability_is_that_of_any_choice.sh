#!/usr/bin/env bash
# lighteval 0.13.0's ProbabilityMetric ("prob", "prob_norm_token") is described as "the probability of the gold choice", to be
# followed in training where accuracy is too coarse. It never looks at which choice is gold: it takes the largest
# probability among all choices. A model that gives the right choice 0.05 and a wrong one 0.9 scores 0.9, above one that
# gives the right choice 0.6; the better a model is at being sure, the higher it scores. Its sister
# NormalizedMultiChoiceProbMetric takes the gold one, over the sum of all. Nothing is said.
# Follows: a curve that rises may be of a model that grows surer of wrong answers. Use the normalised metric, or the
# accuracy beside it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check lighteval==0.13.0 transformers==5.23.0 torch==2.13.0
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import math
from importlib.metadata import version

from lighteval.metrics.dynamic_metrics import LogLikelihoodAccMetric, NormalizedMultiChoiceProbMetric, ProbabilityMetric
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.requests import Doc

print({name: version(name) for name in ("lighteval",)})
told = (ProbabilityMetric.__init__.__doc__ or "").strip()
print("its documentation:", told)
assert "gold choice" in told
metrics = {"prob": ProbabilityMetric(), "normalised": NormalizedMultiChoiceProbMetric(), "accuracy": LogLikelihoodAccMetric()}
found = {}
for name, probabilities in (
    ("right and fairly sure", [0.6, 0.2, 0.1]), ("wrong and very sure", [0.05, 0.9, 0.01]), ("wrong and unsure", [0.3, 0.35, 0.2]),
):
    doc = Doc(query="", choices=["one", "two", "three"], gold_index=0)
    response = ModelResponse(logprobs=[math.log(p) for p in probabilities], output_tokens=[[1], [2], [3]])
    for label, metric in metrics.items():
        found[name, label] = float(next(iter(metric.compute_sample(doc=doc, model_response=response).values())))
    scores = ", ".join(f"{label} {found[name, label]:.3f}" for label in metrics)
    print(f"{name}, probabilities {probabilities}, the first is gold: {scores}")
    assert abs(found[name, "prob"] - max(probabilities)) < 1e-9
    assert abs(found[name, "normalised"] - probabilities[0] / sum(probabilities)) < 1e-9
assert found["wrong and very sure", "prob"] > found["right and fairly sure", "prob"]
print("seen: the largest probability is the score, whichever choice has it")
PYTHON
