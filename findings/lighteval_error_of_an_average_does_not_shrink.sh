#!/usr/bin/env bash
# lighteval 0.13.0 reports an average over the parts of a benchmark (MMLU's 57 subjects, AGIEval, BIG-bench, C-Eval, all tasks
# together) beside the parts, with a standard error. It treats the error as one more metric and takes the mean of the
# parts' errors. The error of a mean of n independent parts is smaller than theirs by the root of n: for 57 subjects of
# 100 questions it should be 0.6 points, and ± 4.6 is printed, the error of a test of a hundred questions. Nothing is said.
# (lm-eval pools the parts' variances.)
# Follows: differences between models that are eight times the true error look like noise on exactly the scores that are
# quoted. Divide the average's error by the root of the number of parts, where parts have about the same size.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check lighteval==0.13.0 transformers==5.23.0 torch==2.13.0 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
from lighteval.logging.info_loggers import MetricsLogger
from lighteval.metrics.metrics import Metrics

print({name: version(name) for name in ("lighteval", "numpy")})
random = np.random.default_rng(0)
metric = Metrics.loglikelihood_acc.value
subjects, questions, share = 57, 100, 0.7
task = SimpleNamespace(aggregation=metric.get_corpus_aggregations)


def run():
    """lighteval's aggregated scores of a model that is right with probability 0.7 on each question."""
    logger = MetricsLogger()
    for subject in range(subjects):
        for right in random.random(questions) < share:
            logger.log(f"mmlu:{subject}|5", {metric.metric_name: int(right)})
    logger.aggregate({f"mmlu:{subject}|5": task for subject in range(subjects)}, bootstrap_iters=1000)
    return logger.metric_aggregated


averages, errors = [], []
for _ in range(200):
    logged = run()
    average = logged["mmlu:_average|5"]
    averages.append(average[metric.metric_name])
    errors.append(average[f"{metric.metric_name}_stderr"])
true = float(np.std(averages, ddof=1))
one = logged["mmlu:0|5"]
print(f"one subject: {one[metric.metric_name]:.3f} ± {one[metric.metric_name + '_stderr']:.4f}")
print(f"the average of {subjects} subjects: {averages[-1]:.4f} ± {errors[-1]:.4f}; over 200 runs it varies by {true:.4f}")
print(f"over all tasks: ± {logged['all'][metric.metric_name + '_stderr']:.4f}")
ratio = float(np.mean(errors)) / true
print(f"the error that is printed is {ratio:.1f} times the true one; the root of {subjects} is {subjects**0.5:.1f}")
assert 0.8 < ratio / subjects**0.5 < 1.25
print("seen: the error of the average is the mean of the errors")
PYTHON
