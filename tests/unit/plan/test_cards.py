"""The cards' figures against what NVIDIA's white papers and product pages print."""

from __future__ import annotations

import pytest

from toolkit.plan.cards import CARDS

PRINTED = {
    "rtx-3070": (40.6, 162.6),
    "rtx-3080": (59.5, 238),
    "rtx-3090": (71, 284),
    "rtx-4080": (97.5, 389.9),
    "rtx-4090": (165.2, 660.6),
    "rtx-5080": (112.6, 450.2),
    "rtx-5090": (209.5, 838),
}
"""Dense tensor TFLOP/s in FP16 or BF16 with FP32 accumulation, and TOP/s in INT8."""


@pytest.mark.parametrize("name", PRINTED)
def test_peaks_are_those_that_were_printed(name: str) -> None:
    card = CARDS[name]
    assert (card.bf16_tflops, card.int8_tops) == pytest.approx(PRINTED[name], rel=5e-3)


def test_every_card_is_complete_and_found_by_its_name() -> None:
    for name, card in CARDS.items():
        assert card.name == name
        assert card.source.startswith("https://")
        assert card.capability in {(8, 6), (8, 9), (12, 0)}
        assert 0.93 * card.size < card.memory / 2**30 < 0.99 * card.size
        assert card.pcie_rate < card.memory_rate


def test_the_least_time_is_the_slower_of_computing_and_reading() -> None:
    card = CARDS["rtx-4090"]
    assert card.seconds(card.bf16_tflops * 1e12, 0) == pytest.approx(1)
    assert card.seconds(card.int8_tops * 1e12, 0, is_int8=True) == pytest.approx(1)
    assert card.seconds(1, card.memory_rate * 2e9) == pytest.approx(2)
