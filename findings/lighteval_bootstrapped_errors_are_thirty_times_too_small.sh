#!/usr/bin/env bash
# lighteval 0.13.0 finds the standard error of scores that are not means (BLEU, perplexity and bits per byte, F1, the
# correlation of Matthews) by a bootstrap: it draws the rows anew a thousand times. How much the score varies over these
# draws is the standard error. lighteval then divides it by the root of a thousand, as if it were the error of a mean of a
# thousand scores. So what stands behind the ± is 32 times too small, and the more draws are asked for the smaller it is.
# Accuracies and other means are right. (lm-eval, from which the rest is taken, does not divide.) Nothing is said.
# Follows: any two models differ "significantly" in perplexity or BLEU. Multiply such errors by 31.6, or by the root of the
# number of draws.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check lighteval==0.13.0 transformers==5.23.0 torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > check.py <<'PYTHON'
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
from lighteval.logging.info_loggers import MetricsLogger
from lighteval.metrics.metrics import Metrics
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.requests import Doc

random = np.random.default_rng(0)
names = {"bits per byte": Metrics.bits_per_byte, "accuracy": Metrics.loglikelihood_acc}


def drawn(rows):
    """A data set of rows: log-probabilities of texts, and right or wrong choices."""
    per_byte = random.normal(-0.7, 0.2, rows)
    lengths = random.integers(50, 400, rows)
    return [(float(a * n), int(n), bool(right)) for a, n, right in zip(per_byte, lengths, random.random(rows) < 0.6)]


def scored(rows, draws):
    """The scores of a data set and their standard errors, as lighteval logs them."""
    logger = MetricsLogger()
    for logprob, length, right in rows:
        text = Doc(query="x" * length, choices=["a", "b"], gold_index=0 if right else 1)
        for metric, response in (
            (Metrics.bits_per_byte.value, ModelResponse(logprobs=[logprob])),
            (Metrics.loglikelihood_acc.value, ModelResponse(logprobs=[0.0, -1.0], output_tokens=[[1], [2]])),
        ):
            logger.log("task|0", metric.compute_sample(doc=text, model_response=response))
    ways = {}
    for metric in names.values():
        ways.update(metric.value.get_corpus_aggregations())
    logger.aggregate({"task|0": SimpleNamespace(aggregation=lambda: ways)}, bootstrap_iters=draws)
    return logger.metric_aggregated["task|0"]


if __name__ == "__main__":
    print({name: version(name) for name in ("lighteval", "numpy")})
    size = 200
    sets = [scored(drawn(size), 0) for _ in range(300)]
    rows = drawn(size)
    found = {}
    for draws in (100, 1000):
        logged = scored(rows, draws)
        for told, metric in names.items():
            key = metric.value.metric_name
            true = float(np.std([one[key] for one in sets], ddof=1))
            found[told, draws] = true / logged[f"{key}_stderr"]
            print(
                f"{told}, {draws} draws: {logged[key]:.4f} ± {logged[key + '_stderr']:.5f}; over 300 data sets of {size} rows it "
                f"varies by {true:.5f}, which is {found[told, draws]:.1f} times as much"
            )
    for draws in (100, 1000):
        assert 0.8 < found["accuracy", draws] < 1.25
        assert 0.75 < found["bits per byte", draws] / draws**0.5 < 1.35
    print("seen: the error is divided by the root of the number of draws")
PYTHON
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' LIGHTEVAL_DISABLE_TQDM=1 "$folder/venv/bin/python" -W ignore check.py
