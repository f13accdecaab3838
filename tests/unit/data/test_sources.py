"""Files, folders and names: what is read, and the one line that says why something is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from toolkit.data import build_batches, read_chat_template
from toolkit.data.files import read_rows
from toolkit.data.sources import open_source
from toolkit.errors import DataError

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
PAIR = {"prompt": "a ", "completion": "b"}


def one_line(error: pytest.ExceptionInfo[DataError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


BROKEN = [
    (b'{"messages": [', r":2: not JSON"),
    (b"\xff\xfe{}", r":2: not UTF-8"),
    (b"[1, 2]", r":2: a row is a JSON object"),
    (b"null", r":2: a row is a JSON object"),
    (b'{"n": 1' + b"0" * 5000 + b"}", r":2: not usable JSON: a number"),
    (b"[" * 100_000, r":2: not usable JSON: nested too deeply"),
    (b'{"messages": []}', r":2: messages: a non-empty list"),
    (b'{"messages": "hi"}', r":2: messages: text that is not JSON"),
    (b'{"messages": ["hi"]}', r":2: messages\[0\]: a message is an object"),
    (b'{"messages": [{"role": "asistant", "content": "a"}]}', r":2: .*unknown role 'asistant'; did you mean assistant"),
    (b'{"messages": [{"rol": "user", "content": "a"}]}', r":2: .*no role.*did you mean rol"),
    (b'{"messages": [{"role": ["user"], "content": "a"}]}', r":2: .*unknown role"),
    (b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}', r":2: messages\[0\]: no content"),
    (b'{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "b"}]}', r"no content"),
    (b'{"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "b"}]}', r"content is int 3"),
    (b'{"messages": [{"role": "user", "content": "a"}]}', r":2: no assistant turn"),
    (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}', r"turn 2 .* is empty"),
    (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\\ud800"}]}', r"surrogate"),
    (b'{"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}', r"a tool call needs"),
    (b'{"messages": [{"role": "assistant", "content": "a"}], "tools": "x"}', r"tools: text that is not JSON"),
    (b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}', r":2: the key 'content' stands twice"),
    (b'{"messages": "[{\\"role\\": \\"user\\", \\"role\\": \\"tool\\"}]"}', r":2: the key 'role' stands twice"),
    (b'{"messages": null}', r":2: messages is null; fill it in"),
    (b'{"text": "other columns"}', r":2: no messages; the row has text"),
]


def test_a_key_twice_leaves_the_other_rows_of_a_list(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"text": "a"},\n{"text": "b", "text": "c"},\n{"text": "d"}]')
    first, twice, last = read_rows(path)
    assert (first.values, last.values) == ({"text": "a"}, {"text": "d"})
    assert "'text' stands twice" in str(twice.values)
    assert twice.place == f"{path}:2 (item 2)"


def test_a_key_twice_in_lines_and_in_one_object_of_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"text": "b", "text": "c"}\n{"text": "d"}\n')
    twice, last = read_rows(path)
    assert "'text' stands twice" in str(twice.values)
    assert last.values == {"text": "d"}
    path.write_text('{\n "data": [{"text": "b"}],\n "data": []\n}')
    (only,) = read_rows(path)
    assert "'data' stands twice" in str(only.values)


@pytest.mark.parametrize(("line", "message"), BROKEN)
def test_a_bad_row_is_refused_with_its_line_and_dropped_on_request(line: bytes, message: str, build: Any) -> None:
    rows = [GOOD, line, GOOD, line]
    with pytest.raises(DataError, match=message) as error:
        build(rows)
    assert "the first of 2 unusable rows of 4" in one_line(error)
    assert error.value.exit_code == 3
    report = build(rows, on_invalid="drop").report.splits["train"]
    assert (report.rows, report.kept, list(report.drops.values())) == (4, 2, [2])


def test_bom_crlf_blank_lines_and_line_separators(build: Any, tokenizer: Any, trained: Any) -> None:
    text = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\u2028c"}]})
    raw = "\ufeff" + text.replace("\\u2028", "\u2028") + "\r\n\r\n   \r\n" + json.dumps(GOOD)
    batches = build([raw.encode()])
    assert trained(batches) == ["b\u2028c<|im_end|>"]
    assert batches.report.examples[1].endswith(":4")


def test_an_empty_file_is_refused(build: Any) -> None:
    for rows in ([], [b"", b"  "]):
        with pytest.raises(DataError, match=r"data\.jsonl: empty"):
            build(rows)


def outcome(tokenizer: Any, path: Path, on_invalid: Any) -> tuple[int, str]:
    """Examples kept, or the error's message."""
    try:
        return len(build_batches(tokenizer, train=str(path), on_invalid=on_invalid).train), ""
    except DataError as error:
        return 0, str(error)


@given(lines=st.lists(st.one_of(st.binary(max_size=60), st.sampled_from([json.dumps(GOOD).encode(), *dict(BROKEN)]))))
@example(lines=[b'{"messages":[{"role":"assistant","content":"\\ud800"}]}'])
@example(lines=[b"\x0b", b"a"])
@example(lines=[b'{"\\ud800\\n": 1}'])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_raise_anything_but_a_data_error(lines: list[bytes], tokenizer: Any, tmp_path: Path) -> None:
    for suffix in (".jsonl", ".json", ".csv", ".parquet"):
        path = tmp_path / f"fuzz{suffix}"
        path.write_bytes(b"\n".join(lines))
        for on_invalid in ("error", "drop"):
            kept, said = outcome(tokenizer, path, on_invalid)
            assert (said and said.isprintable()) or kept > 0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "tool_calls", "function", "name", "arguments"]), inner
        )
    ),
    max_leaves=12,
)


@given(
    row=st.dictionaries(
        st.sampled_from(
            ["messages", "conversations", "prompt", "completion", "instruction", "output", "text", "tools"]
        ),
        json_values
        | st.lists(
            st.fixed_dictionaries(
                {"role": st.sampled_from(["user", "assistant"])},
                optional={"content": json_values, "tool_calls": json_values},
            )
        ),
        min_size=1,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_row_raises_anything_but_a_data_error(row: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "fuzz.jsonl"
    path.write_text(json.dumps(row))
    kept, said = outcome(tokenizer, path, "error")
    assert (said and said.isprintable()) or kept == 1


def test_json_lists_containers_and_lines_are_read_alike(tmp_path: Path) -> None:
    texts = {
        "list": "[\n" + ",\n".join([json.dumps(PAIR)] * 2) + "\n]",
        "container": json.dumps({"version": 1, "data": [PAIR, PAIR]}),
        "lines": "\n".join([json.dumps(PAIR)] * 2),
    }
    for name, text in texts.items():
        path = tmp_path / f"{name}.json"
        path.write_text(text)
        assert [row.values for row in read_rows(path)] == [PAIR, PAIR], name
    assert [row.place.removeprefix(str(tmp_path)) for row in read_rows(tmp_path / "list.json")] == [
        "/list.json:2 (item 1)",
        "/list.json:3 (item 2)",
    ]


def test_a_broken_json_list_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text('[\n{"prompt": "a"},\n{"prompt": }\n]')
    with pytest.raises(DataError, match=r"broken\.json:3: not JSON"):
        list(read_rows(path))


def test_csv_values_stay_text_and_rows_have_lines(tmp_path: Path, tokenizer: Any, trained: Any) -> None:
    path = tmp_path / "pairs.csv"
    path.write_bytes('\ufeffprompt,completion\r\n"two\nlines, ",007\r\nx:, 1e5\r\n'.encode())
    batches = build_batches(tokenizer, train=str(path), shuffle=False)
    assert [trained(batches, i) for i in (0, 1)] == [["007<|im_end|>"], [" 1e5<|im_end|>"]]
    assert [place.rpartition(":")[2] for place in batches.report.examples] == ["2", "4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,completion\na,b\na\n", r":3: 1 fields where the header has 2"),
        ('prompt,completion\na,"b\n', r"not CSV"),
        ("prompt,prompt\na,b\n", r":1: a column name stands twice"),
        ("prompt,completion\n", r"empty"),
    ],
)
def test_bad_csv_is_refused_with_its_line(text: str, message: str, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        build_batches(tokenizer, train=str(path))


def test_a_very_long_csv_field_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n")
    [row] = read_rows(path)
    assert isinstance(row.values, dict)
    assert len(row.values["text"]) == 200_000


def test_parquet_structs_lose_the_nulls_that_arrow_adds(tmp_path: Path, tokenizer: Any, trained: Any) -> None:
    rows = [GOOD, {"messages": [{"role": "user", "content": "x", "name": "Jo"}, {"role": "assistant", "content": "y"}]}]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert [row.values for row in read_rows(path)] == rows
    batches = build_batches(tokenizer, train=str(path), shuffle=False)
    assert batches.report.examples[1].endswith("rows.parquet:row 2")


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([PAIR] * 50), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not readable as Parquet") as error:
        list(read_rows(path))
    one_line(error)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("trian.jsonl", r"no such file or folder; did you mean train\.jsonl\?"),
        ("./nothing", r"no such file or folder"),
        ("absent/deep/train.jsonl", r"the folder .*absent/deep does not exist either"),
        ("notes.txt", r"\.txt: not a format read here; use \.csv"),
        ("rows.gz", r"\.gz: not a format read here; use \.csv, .*; text also as \.bz2, \.gz, \.zst"),
        ("rows.parquet.gz", r"\.parquet\.gz: not a format read here"),
        ("rows.jsonl.xz", r"\.xz: not a format read here"),
        ("*.jsonl", r"patterns are not read: give the folder /"),
        ("empty", r"no data file in it"),
        ("trian", r"no such file .*and the Hub gave no such dataset"),
        ("owner/no-such-data-set", r"owner/no-such-data-set\[train\]: .*the Hub gave no such dataset"),
    ],
)
def test_a_missing_source_is_one_line(source: str, message: str, tmp_path: Path, write: Any) -> None:
    write([GOOD], "train.jsonl")
    for name in ("notes.txt", "rows.gz", "rows.parquet.gz", "rows.jsonl.xz"):
        (tmp_path / name).write_text("a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message) as error:
        list(open_source(source, base_folder=tmp_path))
    one_line(error)


def sources_of(folder: Path, **options: Any) -> list[str]:
    return sorted({Path(row.place.split(":")[0]).name for row in open_source("d", base_folder=folder, **options)})


def test_folders_are_split_by_their_file_names(tmp_path: Path, write: Any) -> None:
    for name in ("a.train.jsonl", "b-train-00001.jsonl", "val.jsonl", "train-test.jsonl", ".hidden.jsonl", "x.jsonl"):
        write([GOOD], f"d/{name}")
    assert sources_of(tmp_path) == ["a.train.jsonl", "b-train-00001.jsonl", "train-test.jsonl"]
    assert sources_of(tmp_path, split="validation") == ["val.jsonl"]
    assert sources_of(tmp_path, split="x") == ["x.jsonl"]
    with pytest.raises(DataError, match=r"no file of the split 'test'; its file names carry train, validation"):
        sources_of(tmp_path, split="test")


def test_a_folder_without_split_names_is_read_whole(tmp_path: Path, write: Any) -> None:
    write([GOOD], "d/one.jsonl")
    write([GOOD], "d/two.jsonl")
    assert sources_of(tmp_path) == ["one.jsonl", "two.jsonl"]
    with pytest.raises(DataError, match="carry no split names"):
        sources_of(tmp_path, split="validation")


def test_a_split_of_a_single_file_is_refused(build: Any) -> None:
    with pytest.raises(DataError, match=r"one file has no split 'test'"):
        build([GOOD], validation_split="test")


def test_chat_templates_are_read_or_refused(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    (tmp_path / "empty.jinja").write_text(" \n")
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe\x00")
    assert read_chat_template(tmp_path / "chat.jinja") == "{{ messages }}"
    for name, message in {
        "chat.jinj": "did you mean chat.jinja",
        "empty.jinja": "empty",
        "binary.jinja": "UTF-8",
    }.items():
        with pytest.raises(DataError, match=message) as error:
            read_chat_template(tmp_path / name)
        one_line(error)


def test_a_folder_of_save_to_disk_is_read_by_its_rows(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([PAIR, {**PAIR, "completion": "c"}, {**PAIR, "completion": "d"}])
    rows.with_format("torch").save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train_sft=rows, test=rows.select([0])).save_to_disk(tmp_path / "dict")
    (tmp_path / "dict" / "more.test.jsonl").write_text(json.dumps(PAIR))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "dataset_infos.json").write_text("{}")
    (tmp_path / "plain" / "state.json").write_text(json.dumps([PAIR]))

    def read(name: str, split: str | None = None) -> list[Any]:
        return [(row.place, row.values) for row in open_source(name, split=split, base_folder=tmp_path)]

    one = read("one")
    assert [values for _, values in one] == list(rows)
    assert one[2][0] == f"{tmp_path}/one:row 3"
    assert [values for _, values in read("dict")] == list(rows)
    assert [values for _, values in read("dict", "test")] == [PAIR, PAIR]
    assert [values for _, values in read("plain")] == [PAIR]
    for wrong, message in (
        (("one", "test"), "one saved data set has no split 'test'"),
        (("dict", "dev"), "no file of the split 'dev'; its file names carry test, train"),
        (("one/state.json",), f"save_to_disk wrote; give its folder, {tmp_path}/one"),
        (("one/data-00000-of-00002.arrow",), f"save_to_disk wrote; give its folder, {tmp_path}/one"),
        (("dict/dataset_dict.json",), f"save_to_disk wrote; give its folder, {tmp_path}/dict"),
    ):
        with pytest.raises(DataError, match=message) as error:
            read(*wrong)
        one_line(error)
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"one: not readable as a data set of save_to_disk \(.*; save it again"):
        read("one")


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_files_are_read_as_datasets_caches_them_and_as_feather(kind: str, tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{**PAIR, "tools": [{"a": 1}]}, {**PAIR, "tools": [{"b": 2}]}])
    path = tmp_path / ("rows.arrow" if kind == "stream" else "rows.feather")
    opened = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with opened(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    rows = list(open_source(path.name, base_folder=tmp_path))
    assert [row.values for row in rows] == [{**PAIR, "tools": [{"a": 1}]}, {**PAIR, "tools": [{"b": 2}]}]
    assert rows[1].place == f"{path}:row 2"
    whole = path.read_bytes()
    for broken in (b"", whole[:9], whole[: len(whole) // 2]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="not readable as Arrow; write it again") as error:
            list(open_source(path.name, base_folder=tmp_path))
        one_line(error)
