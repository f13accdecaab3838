#!/usr/bin/env bash
# lighteval 0.13.0's corpus metrics chrf, chrf++ and ter (its translation tasks, WMT and others, report them beside BLEU) give
# sacrebleu the references row by row, where it wants them as streams: the first references of all rows, then the second
# ones. For BLEU lighteval turns them; for these three it does not. sacrebleu pairs rows with zip, which ends with the
# shortest, and a row with one reference is a stream of length one. So the first translation alone is scored, against the
# references of the whole corpus, whichever fits best. A run of nonsense whose first line is right has chrF 100 and
# TER 0; a right run whose first line is wrong has chrF 0. Nothing is said; the standard error beside it is of no use.
# Follows: chrF and TER from lighteval say nothing of a model. Take BLEU, or score the saved answers with sacrebleu.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check lighteval==0.13.0 sacrebleu==2.6.0 transformers==5.23.0 torch==2.13.0
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import sacrebleu
from lighteval.metrics.metrics import Metrics
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.requests import Doc

print({name: version(name) for name in ("lighteval", "sacrebleu")})
references = ["the cat sat on the mat today", "rain falls in the hills each spring", "she reads old books at night"]
true = {"chrf": sacrebleu.CHRF(), "chrf_plus": sacrebleu.CHRF(word_order=2), "ter": sacrebleu.TER()}


def scored(name, translations):
    """lighteval's own score of a corpus, and sacrebleu's."""
    metric = Metrics[name].value
    rows = []
    for translation, reference in zip(translations, references, strict=True):
        doc = Doc(query="", choices=[reference], gold_index=0)
        row = metric.compute_sample(doc=doc, model_response=ModelResponse(text=[translation]))
        rows.append(row[metric.metric_name])
    found = metric.get_corpus_aggregations()[metric.metric_name](rows)
    return found, true[name].corpus_score(translations, [references]).score


corpora = {
    "all right": references,
    "the first right, the others nonsense": [references[0], "zzz qqq", "xxx"],
    "the first nonsense, the others right": ["zzz", *references[1:]],
    "the first is the second row's translation": [references[1], "zzz qqq", "xxx"],
}
results = {}
for told, translations in corpora.items():
    for name in true:
        results[told, name] = scored(name, translations)
        print(f"{told}: {name} {results[told, name][0]:.1f}, by sacrebleu {results[told, name][1]:.1f}")
for told in list(corpora)[1::2]:
    assert results[told, "chrf"][0] > 99.9 and results[told, "chrf_plus"][0] > 99.9 and results[told, "ter"][0] == 0
    assert results[told, "chrf"][1] < 60 and results[told, "ter"][1] > 50
first = list(corpora)[2]
assert results[first, "chrf"][0] < 1 < 50 < results[first, "chrf"][1]
print("seen: the first translation is the score of the corpus")
PYTHON
