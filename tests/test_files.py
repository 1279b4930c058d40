"""Text in the encodings that editors write, and arrays with their hash, are read correctly; a
damaged file gives one message.
"""

import numpy as np
import pytest

from gear.config import UserError
from gear.files import kept_json, read_array, read_json, read_lines, read_text, write_array

TEXT = "a cat\nein Bär, 猫\nun café\n"
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32")
MARKED = {
    "utf-16-le": b"\xff\xfe",
    "utf-16-be": b"\xfe\xff",
    "utf-32-le": b"\xff\xfe\0\0",
    "utf-32-be": b"\0\0\xfe\xff",
}


@pytest.mark.parametrize("ending", ("\n", "\r\n", "\r"))
@pytest.mark.parametrize("encoding", [*ENCODINGS, *MARKED])
def test_text_of_every_usual_encoding_and_line_ending_is_read(encoding, ending, tmp_path):
    (tmp_path / "text").write_bytes(
        MARKED.get(encoding, b"") + TEXT.replace("\n", ending).encode(encoding)
    )
    assert read_text(tmp_path / "text") == TEXT
    assert read_lines(tmp_path / "text") == ["a cat", "ein Bär, 猫", "un café"]


@pytest.mark.parametrize("character", "\u2028\u2029\x0b\x0c\x1c\x85")
def test_a_line_ends_where_an_editor_ends_it(character, tmp_path):
    (tmp_path / "text").write_text(f"one{character}caption\ntwo\n\n \n")
    assert read_lines(tmp_path / "text") == [f"one{character}caption", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    (
        (
            "ein Bär\nun café".encode("cp1252"),
            r"text is not in UTF-8: byte 0xe4 in line 1\. Save it as UTF-8; .* iconv",
        ),
        ("a\nun café".encode("latin-1"), "not in UTF-8: byte 0xe9 in line 2"),
        (b"\xff\xfea", "not in UTF-16-LE: byte 0x61 in line 1"),
        (
            "a cat".encode("utf-16-le"),
            "not a text file: it holds zero bytes. If it is text in UTF-16, save it as UTF-8",
        ),
        (b"\x89PNG\r\n\x1a\n\0\0", "not a text file: it holds zero bytes"),
        ("a\0b".encode("utf-16"), "not a text file: it holds zero characters"),
    ),
)
def test_another_encoding_and_content_that_is_no_text_are_reported_and_not_guessed(
    content, message, tmp_path
):
    (tmp_path / "text").write_bytes(content)
    for read in (read_text, read_lines):
        with pytest.raises(UserError, match=message):
            read(tmp_path / "text")


def test_an_absent_file_and_a_folder_are_reported(tmp_path):
    for path, message in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(
            UserError, match=f"{path} cannot be read .{message}.*: a text file is expected"
        ):
            read_text(path)
    (tmp_path / "empty").write_bytes(b"")
    assert read_lines(tmp_path / "empty") == []


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_of_every_encoding(encoding, tmp_path):
    (tmp_path / "a.json").write_bytes('{"é": [1, NaN, "\\ud83d\\ude00"]}'.encode(encoding))
    assert read_json(tmp_path / "a.json")["é"][2] == "😀"


@pytest.mark.parametrize(
    "content", (b"", b"{", b"[" * 100_000, b'"\\ud800"', b"\xff", b"1" * 5000, b"\0")
)
def test_content_that_is_no_json_is_refused(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError):
        read_json(tmp_path / "a.json")
    assert kept_json(tmp_path / "a.json") is None and kept_json(tmp_path / "none") is None


@pytest.mark.parametrize(
    "array",
    (np.arange(24, dtype=np.float32).reshape(2, 3, 4), np.zeros((0, 3), np.uint8), np.uint8(3)),
)
def test_an_array_comes_back_unless_a_bit_has_changed(array, tmp_path):
    path = tmp_path / "a.npy"
    write_array(path, array)
    for read in (read_array, lambda path: read_array(path, mapped=array.size > 0), np.load):
        assert read(path).dtype == array.dtype and np.array_equal(read(path), array)
    content = path.read_bytes()
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        assert read_array(path) is None, i
    for damaged in (b"", content[:20], content[:-1], content + b"\0", content[:-32]):
        path.write_bytes(damaged)
        assert read_array(path) is None
    path.unlink()
    assert read_array(path) is None
