"""The run's page: small, alone, safe from the data in it, honest about what is missing; and its server."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.unit.report.conftest import ATTACK, STEPS, metrics_line
from toolkit.errors import ModelError
from toolkit.report import charts
from toolkit.report.page import render_page, write_page
from toolkit.report.serve import page_server

MOST_BYTES = 3 * 10**6


class Elements(HTMLParser):
    """Every tag and its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_a_thousand_steps_and_six_thousand_experts_are_a_small_page(finished: Path, page: Path) -> None:
    assert page == finished / "report.html"
    assert page.stat().st_size < MOST_BYTES
    text = page.read_text(encoding="utf-8")
    for words in (
        "finished, step 1,000",
        "60.0%",
        "base 10.0%",
        "Router entropy",
        "96 of 96",
        "1 (3.7; layer.expert)",
        "Held-out token f1, while training",
        "Training stopped early, after 1,000 of 2,000 steps",
        "The adapter is that of step 900",
        "base 10.0%, better",
    ):
        assert words in text, words


def test_nothing_is_fetched_and_no_script_is_there(page: Path) -> None:
    elements = Elements(page.read_text(encoding="utf-8")).found
    tags = Counter(tag for tag, _ in elements)
    assert not tags["script"] + tags["link"] + tags["iframe"]
    for tag, attributes in elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png")), (tag, name)
    policy = next(a["content"] for _, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy


def test_markup_in_the_data_is_text(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert ATTACK not in text
    assert "49" not in re.findall(r"<dd>(.*?)</dd>", text, re.DOTALL)[1]
    assert text.count("&lt;script&gt;window.injected") == 3  # prompt, answer, recipe


def test_every_picture_says_what_it_shows_and_has_its_numbers(page: Path) -> None:
    elements = Elements(page.read_text(encoding="utf-8")).found
    pictures = [a["aria-label"] for _, a in elements if a.get("role") == "img"]
    tags = Counter(tag for tag, _ in elements)
    assert len(pictures) == tags["figure"] == tags["details"] - 1 >= 12  # one for the recipe
    assert all(pictures)
    ids = Counter(a["id"] for _, a in elements if a.get("id"))
    assert not [name for name, times in ids.items() if times > 1]


def test_the_experts_that_compensation_left_worst_are_named(page: Path) -> None:
    text = page.read_text()
    assert "Experts with the largest error" in text
    assert "model.layers.7.mlp.experts.gate_up_proj 5" in text
    assert "1.230%" in text


def test_what_a_run_does_not_have_is_not_shown(unfinished: Path) -> None:
    text = render_page(unfinished)
    assert "running, step 400, about 20 min left" in text
    assert '<progress value="0.4"' in text
    for words in ("Outcome", "What happened to the experts", "Coverage", "refresh", "multi-token"):
        assert words not in text, words
    assert 'http-equiv="refresh" content="5"' in render_page(unfinished, 5)


def test_a_finished_run_loads_itself_no_more(finished: Path) -> None:
    assert 'http-equiv="refresh"' not in render_page(finished, 5)


def test_a_torn_line_and_a_step_written_twice(unfinished: Path) -> None:
    with (unfinished / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({**metrics_line(400), "loss": 1.25}) + "\n" + '{"step": 401, "lo')
    text = render_page(unfinished)
    assert "over 400 logged steps" in text
    assert "last 1.25" in text


def test_a_run_before_its_first_line(unfinished: Path) -> None:
    (unfinished / "metrics.jsonl").unlink()
    (unfinished / "plan.json").unlink()
    assert "running, step 0" in render_page(unfinished)


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no run here"):
        write_page(tmp_path)


def test_thinning_keeps_the_end_and_the_mean() -> None:
    points = [(float(step), float(step)) for step in range(1, STEPS + 1)]
    thin = charts.thin_out(points, 100)
    assert len(thin) == 100
    assert thin[-1][0] == STEPS
    assert sum(y for _, y in thin) / 100 == sum(y for _, y in points) / STEPS


def test_colours_are_the_pages() -> None:
    svg = charts.curves("x", {"a": [(0, 1), (1, 2)]}, "step", "nats", {"base": 3.0})
    assert {"var(--ink)", "var(--adapted)", "var(--base)"} <= set(re.findall(r"var\(--\w+\)", svg))
    assert not re.findall(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]\b", svg)
    assert "<text" in svg, "letters are text, not shapes"


@pytest.fixture
def port(unfinished: Path) -> Iterator[int]:
    with page_server(unfinished) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        assert server.server_address[0] == "127.0.0.1"
        yield server.server_port
        server.shutdown()
        thread.join()


def ask(port: int, path: str = "/", host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body


def test_the_live_page_follows_the_run(port: int, unfinished: Path) -> None:
    assert "step 400" in ask(port)[1]
    with (unfinished / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(metrics_line(401)) + "\n")
    status, text = ask(port)
    assert status == 200
    assert "step 401" in text


def test_the_server_has_one_page_for_this_machine(port: int) -> None:
    assert ask(port, "/summary.json")[0] == 404
    assert ask(port, "/../recipe.yaml")[0] == 404
    assert ask(port, host=f"elsewhere.example:{port}")[0] == 404
