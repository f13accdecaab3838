"""The benchmark that reads accepted drafts off a finished text counts what decoding counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.conftest import EMBEDDED
from tests.parity.test_mtp_edges import adapted, plain, taught
from toolkit.mtp.build import new_head
from toolkit.mtp.drafts import speculator

SCRIPTS = Path(__file__).parents[2] / "scripts" / "benchmarks"
PROMPTS = [[5 + (7 * n + k) % 900 for k in range(6 + n % 3)] for n in range(5)]
TOKENS = 9


@pytest.mark.parametrize("ends_early", [False, True])
def test_a_replayed_text_has_the_counts_of_decoding(ends_early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from mtp_replay import Texts

    model = adapted(EMBEDDED)
    base: Any = model.get_base_model()
    if ends_early:  # a token that the model does write ends its texts, inside a draft or not
        monkeypatch.setattr(base.generation_config, "eos_token_id", plain(model, PROMPTS[0], TOKENS)[4])
    head = taught(model, new_head(base), PROMPTS[:2], TOKENS).head.eval()
    answers = [plain(model, prompt, TOKENS) for prompt in PROMPTS]
    assert (min(map(len, answers)) < TOKENS) == ends_early
    replayed = Texts(model, PROMPTS, answers, TOKENS, batch=2).replay(head, (1, 3))
    for count, found in replayed.items():
        writer = speculator(model, head, count=count, max_new_tokens=TOKENS, measured=False)
        assert writer.generate(PROMPTS) == answers
        counts = writer.counts
        assert counts.replayed == 0  # a near tie decided the plain way ends its pass early
        assert (found.passes, found.tokens) == (counts.passes, counts.tokens)
        assert dict(enumerate(found.proposed, 1)) == counts.proposed
        assert found.accepted == tuple(counts.accepted[place] for place in counts.proposed)
        assert 1.0 < found.tau < count + 1
        assert torch.isclose(torch.tensor(found.tau), torch.tensor(counts.tokens_per_pass))
