"""JSON that nobody vouches for: read as the library reads it, or refused in one line."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.files.json_text import parse_json, read_json

PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
)


@given(value=VALUES, escaped=st.booleans(), encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32-be"]))
def test_json_is_read_as_the_library_reads_it(value: object, escaped: bool, encoding: str) -> None:
    text = json.dumps(value, ensure_ascii=escaped)
    assert parse_json(text) == json.loads(text) == value
    assert parse_json(text.encode(encoding)) == value


@given(data=st.binary(max_size=40) | st.text(alphabet='[]{}":,1eE+-.\\ud8nulltrue ', max_size=40))
def test_noise_is_refused_in_one_way(data: bytes | str) -> None:
    try:
        value = parse_json(data)
    except ValueError:
        return
    assert json.loads(json.dumps(value, allow_nan=False)) == value


REFUSED = {
    '{"a":1,"a":1}': "'a' stands twice",
    '[{"b":{"a":1,"c":2,"a":3}}]': "'a' stands twice",
    "NaN": "NaN is no JSON",
    "[-Infinity]": "-Infinity is no JSON",
    "1e999": "1e999 is out of range",
    "9" * 301: "out of range",
    "[" * 65 + "]" * 65: "nested too deep",
    "[" * 100_000 + "]" * 100_000: "nested too deep",
    '"\\ud800"': "surrogates not allowed",
    '{"\\uDFFF":1}': "surrogates not allowed",
    "[" + "0," * 2_000_001 + "0]": "more than 2000000 values",
    "": "Expecting value",
    "[1] 2": "Extra data",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:20])
def test_what_is_no_json_is_refused(text: str) -> None:
    for data in (text, text.encode()):
        with pytest.raises(ValueError, match=REFUSED[text]) as caught:
            parse_json(data)
        assert "\n" not in str(caught.value)


def test_what_is_a_character_is_taken() -> None:
    assert parse_json('"\\ud83d\\ude00"') == "\U0001f600"
    assert parse_json("[" * 64 + "]" * 64)
    assert parse_json("1" * 300) == int("1" * 300)


def test_numbers_of_other_programs_need_not_be_finite() -> None:
    assert parse_json('[Infinity, 1e999, {"a": -Infinity}]', finite=False) == json.loads(
        '[Infinity, 1e999, {"a": -Infinity}]'
    )


def test_a_pipe_is_read_to_its_end_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="Expecting value"):  # nobody writes
        read_json(tmp_path / "pipe")
    reading, writing = os.pipe()
    writer = threading.Thread(target=lambda: (os.write(writing, b"[1, "), os.write(writing, b"2]"), os.close(writing)))
    writer.start()
    assert read_json(Path(f"/proc/self/fd/{reading}")) == [1, 2]
    writer.join()
    os.close(reading)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file"):
        read_json(Path("/dev/zero"))
    with pytest.raises(OSError, match="directory"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing")
    (tmp_path / "long").touch()
    os.truncate(tmp_path / "long", 100_000_001)
    with pytest.raises(ValueError, match="longer than 100000000 bytes"):
        read_json(tmp_path / "long")


def test_names_of_files_whose_bytes_are_no_text_are_read_where_names_are_expected() -> None:
    text = json.dumps({"checkpoint": os.fsdecode(b"caf\xe9.safetensors")})
    assert os.fsencode(parse_json(text, names=True)["checkpoint"]) == b"caf\xe9.safetensors"
    with pytest.raises(ValueError, match="surrogates not allowed"):
        parse_json(text)
    with pytest.raises(ValueError, match="surrogates not allowed"):
        parse_json('"\\ud800"', names=True)
