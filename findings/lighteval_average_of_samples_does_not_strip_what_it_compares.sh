#!/usr/bin/env bash
# lighteval 0.13.0 has pass@k and avg@n for several sampled answers; with k=1 both estimate the same thing, the share of
# right answers, and both are declared with strip_strings=True and take a `normalize`. pass@k uses them. avg@n, whose
# documentation says that it "applies normalisation (if needed) to model prediction and gold", never calls either: it
# compares the raw texts. So four answers, all right, three of which have a space or a line break beside them, have a
# pass@1 of 1 and an avg@4 of 0.25. With a `normalize` of lower case too, "paris" is right in one and wrong in the other.
# Nothing is said. (Scoring functions that are given, such as the mathematical one, look for the answer themselves.)
# Follows: avg@n is lower than pass@1 of the same answers, and falls with a template that puts a space before them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check lighteval==0.13.0 transformers==5.23.0 torch==2.13.0
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

from lighteval.metrics.metrics import Metrics
from lighteval.metrics.metrics_sample import AvgAtN, PassAtK
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.requests import Doc

print({name: version(name) for name in ("lighteval",)})
doc = Doc(query="Where?", choices=["Paris"], gold_index=0)
found = {}
for told, texts in (("as they are", ["Paris"] * 4), ("with spaces", ["Paris", " Paris", "Paris\n", " Paris"])):
    for name, metric in (
        ("pass@1", Metrics.pass_at_k(sample_params={"k": 1, "n": 4})),
        ("avg@4", Metrics.avg_at_n(sample_params={"n": 4})),
    ):
        score = next(iter(metric.compute_sample(doc=doc, model_response=ModelResponse(text=texts)).values()))
        found[told, name] = float(score)
        print(f"four right answers {told}: {name} {score:.2f}, strip_strings={metric.sample_level_fn.strip_strings}")
texts = ModelResponse(text=["paris", "Paris", "paris", "PARIS"])
pass_at_1 = PassAtK(k=1, n=4, normalize=str.lower).compute(doc=doc, model_response=texts)
average = AvgAtN(n=4, normalize=str.lower).compute(doc=doc, model_response=texts)
print(f"normalize=str.lower, answers in other cases: pass@1 {pass_at_1:.2f}, avg@4 {average:.2f}")
assert found["as they are", "pass@1"] == found["as they are", "avg@4"] == found["with spaces", "pass@1"] == 1
assert found["with spaces", "avg@4"] == 0.25 and pass_at_1 == 1 and average == 0.25
print("seen: avg@n compares the texts as they are, whatever it is told")
PYTHON
