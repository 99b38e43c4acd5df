"""Tests of the kinds of text files: records, other encodings, tables, archives, markup."""

import gzip
import io
import json
import lzma
import re
import sys
import tarfile
import warnings
import zipfile

import pytest

from lamoe.train import sources, text_files
from lamoe.train.sources import read_documents

ROWS = [{"text": "a"}, {"text": "b \u4e2d"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1).encode()


def read(*paths, counts=None) -> list[str]:
    return [d.text for d in read_documents([str(p) for p in paths], counts)]


def refused(path) -> str:
    with pytest.raises(ValueError) as e:
        read(path)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize(
    "name, content",
    [
        ("x.ndjson", LINES),
        ("UP.JSONL", LINES),
        ("x.Jsonl", LINES.replace(b"\n", b"\r\n")),
        ("x.jsonlines", b"\xef\xbb\xbf" + LINES),
        ("x.JSONL.GZ", gzip.compress(LINES)),
        ("x.ndjson.xz", lzma.compress(LINES)),
        ("compressed.jsonl", gzip.compress(LINES)),  # the content decides, not the name
        ("arr.json", ARRAY),
        ("arr.JSON", b"\xef\xbb\xbf \n" + ARRAY + b"\n"),
        ("arr.json.gz", gzip.compress(ARRAY)),
        ("lines.json", LINES),  # as many data sets name them
        ("pretty.json", b"\n".join(json.dumps(row, indent=2).encode() for row in ROWS)),
    ],
)
def test_records_by_any_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path / name) == read(tmp_path) == ["a", "b \u4e2d"]
        assert read(tmp_path / "*") == ["a", "b \u4e2d"]


def test_another_field_of_any_source(tmp_path):
    for name in ("a.ndjson", "b.json", "c.txt"):
        (tmp_path / name).write_text(json.dumps({"body": name}))
    for name in ("a.ndjson", "b.json", "c.txt"):  # naming a field says that it holds records
        assert read(f"{tmp_path / name}:body") == [name]
    assert read(f"{tmp_path}/*.ndjson:body") == ["a.ndjson"]
    with pytest.warns(UserWarning, match=r"1 file\(s\) begin with a JSON object"):
        assert read(f"{tmp_path}:body") == ["a.ndjson", "b.json", '{"body": "c.txt"}']
    assert "no field 'bod', did you mean 'body'?" in refused(f"{tmp_path / 'a.ndjson'}:bod")


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b'[{"text": "a"}, {"txt": "b"}]', "record 2: no field 'text', did you mean 'txt'?"),
        (b'[{"text": "a"}', "record 1: not valid JSON"),
        (b'[{"text": "a"} {"text": "b"}]', "record 1: not valid JSON (expected , or ]"),
        (b'[{"text": "a"},', "must end with ]"),
        (b'[{"text": "a"}] x', "must end with ]"),
        (b'["a"]', "record 1: expected an object with the field 'text', found str"),
        (b"[" * 100_000, "record 1: not valid JSON"),
        (b'{"data": [{"text": "a"}], "n": 1}', "jq -c '.data[]' FILE > FILE.jsonl"),
        (b'{"name": "x"}', "is one JSON object without the field 'text'"),
        (b"[]", "gives no text (1 empty)"),
        (b"", "gives no text (1 empty)"),
        (b'[{"instruction": "i", "input": "", "output": "o"}]', "in the Alpaca format"),
        (b'[{"conversations": [{"from": "human", "value": "v"}]}]', "in the ShareGPT format"),
        (b'{"messages": []}', "a conversation ('messages')"),
        (b'{"prompt": "p", "completion": "c"}', "a prompt with its completion"),
    ],
)
def test_json_that_is_no_list_of_texts(tmp_path, content, complaint):
    (tmp_path / "x.json").write_bytes(content)
    assert complaint in refused(tmp_path / "x.json")


def test_a_large_array_is_read_in_linear_time(tmp_path, monkeypatch):
    """Counts the parsed characters: each record is parsed once, and only its own text."""
    parsed, scan = [], json.JSONDecoder.raw_decode

    def counting(self, text, at=0):
        value, end = scan(self, text, at)
        parsed.append(end - at)
        return value, end

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", counting)
    content = json.dumps([{"text": f"text {i}"} for i in range(2000)])
    (tmp_path / "x.json").write_text(content)
    assert len(read(tmp_path / "x.json")) == 2000
    assert len(parsed) == 2000 and sum(parsed) < len(content)


def packed(kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as file:
            file.writestr("a.txt", "text")
    else:
        with tarfile.open(fileobj=out, mode="w:gz") as tar:
            tar.addfile(tarfile.TarInfo("a.txt"))
    return out.getvalue()


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("c.csv", b"text,label\nhello,1\n", "is a table; its separators.*csv.DictReader"),
        ("C.TSV", b"text\tlabel\n", r"is a table.*delimiter='\\t'"),
        ("c.csv.gz", gzip.compress(b"text,label\n"), "is a table"),
        ("x.parquet", b"PAR1abc", "x.parquet is damaged after row 0: .*Parquet"),
        ("no-name", b"PAR1abc", "no-name is damaged after row 0: .*Parquet"),
        ("x.parquet.gz", gzip.compress(b"PAR1abc"), "a compressed Parquet file; unpack it first"),
        ("x.xlsx", packed("zip"), "is a table"),
        ("x.docx", packed("zip"), "an office document"),
        ("x.txt", packed("zip"), "an archive.*unpack it first"),
        ("x.tar.gz", packed("tar"), "an archive.*unpack it first"),
        ("x.txt", packed("tar"), "binary"),
        ("x.pdf", b"%PDF-1.7 text", "is a PDF.*pdftotext"),
        ("x.txt", b"%PDF-1.7 text", "is a PDF"),
        ("x.ipynb", b'{"cells": []}', "is a notebook"),
        ("x.txt", "caf\u00e9".encode("utf-16"), r"another encoding.*\(UTF-16\).*iconv -f UTF-16 "),
        ("x.jsonl", LINES.decode().encode("utf-16"), r"another encoding.*\(UTF-16\)"),
        ("x.json", ARRAY.decode().encode("utf-16-be"), r"\(perhaps UTF-16BE\)"),
        ("x.txt", "a text".encode("utf-16-le"), r"\(perhaps UTF-16LE\).*iconv -f UTF-16LE"),
        ("x.txt", "a text".encode("utf-32"), r"\(UTF-32\)"),
        ("x.txt", b"caf\xe9", r"\(byte E9 at position 3\); convert it: iconv -f ISO-8859-1"),
        ("x.json", b'[{"text": "caf\xe9"}]', r"\(byte E9 at position 14\)"),
        ("x.txt", b"a" * 10 + b"\0", r"binary, not UTF-8 text \(byte 00 at position 10\)"),
        ("x.txt.gz", b"plain", "is damaged: its name ends in .gz, but it is not compressed"),
    ],
)
def test_what_is_no_text_is_named_with_the_way_out(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        read(tmp_path / name)


def test_folders_leave_out_what_is_no_text_and_count_it(tmp_path):
    for name, content in {
        "a.txt": b"text",
        "b.csv": b"x,y",
        "c.json": b'{"name": "settings"}',
        "d.json": b'[{"text": "record"}]',
        "e.json": b"not JSON",
        "f.docx": packed("zip"),
        "g.txt": "wide".encode("utf-16"),
        "h.json": b"[1, 2]",
    }.items():
        (tmp_path / name).write_bytes(content)
    counts = {}
    assert read(tmp_path, counts=counts) == ["text", "record"]
    assert counts[str(tmp_path)].skipped == {
        "a table": 1,
        "JSON without records": 3,
        "an office document": 1,
        "in another encoding": 1,
    }


@pytest.mark.parametrize(
    "name, content, remark",
    [
        ("x.txt", '{"text": "a"}\n{"text": "b"}\n', r"1 file\(s\) begin with a JSON object"),
        ("x.txt", '[\n {"text": "a"},\n {"text": "b"}]', r"1 file\(s\) begin with a JSON object"),
        ("x.log", ' {"text": "a"}', "if that is a record, use the name .jsonl"),
        ("x.html", "<p>text", r"1 file\(s\) hold markup"),
        ("x.txt", "<!DOCTYPE html><p>text", r"1 file\(s\) hold markup"),
        ("x.txt", '<?xml version="1.0"?><a/>', r"1 file\(s\) hold markup"),
    ],
)
def test_text_that_looks_like_data_is_read_with_a_warning(tmp_path, name, content, remark):
    (tmp_path / name).write_text(content)
    with pytest.warns(UserWarning, match=remark):
        assert read(tmp_path / name) == [content]


@pytest.mark.parametrize("content", ["{}", "{ x }", "[1, 2]", "a [1]", "{" * 100_000, "<3 you"])
def test_ordinary_text_is_read_without_a_warning(tmp_path, content):
    (tmp_path / "x.md").write_text(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path / "x.md") == [content]


def test_files_that_vanish_or_cannot_be_read(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    listed = sources.list_entries

    def then_remove(*args):
        entries = listed(*args)
        (tmp_path / "a.txt").unlink(missing_ok=True)
        return entries

    monkeypatch.setattr(sources, "list_entries", then_remove)
    counts = {}
    assert read(tmp_path, counts=counts) == ["b.txt"]
    assert counts[str(tmp_path)].skipped == {"gone since the files were listed": 1}
    monkeypatch.setattr(sources, "list_entries", listed)

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(text_files, "_open", denied)
    assert "b.txt may not be used by this user; change its permissions" in refused(tmp_path)


# ---- compressed records and Parquet files ----
TEXTS = [f"text {i} \u4e2d " * (1 + i % 7) for i in range(3000)]  # longer than the sniffed bytes
JSONL = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()


def zstd_frames(data: bytes) -> bytes:
    """Compress with an empty skippable frame first, and each half in a frame of its own."""
    zstd = pytest.importorskip("backports.zstd")
    half = len(data) // 2
    skippable = b"\x50\x2a\x4d\x18\0\0\0\0"
    options = {zstd.CompressionParameter.checksum_flag: 1}  # as the program zstd does
    return skippable + b"".join(
        zstd.compress(part, options=options) for part in (data[:half], data[half:])
    )


PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd_frames}


def write_parquet(path, columns, **options):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, **options)


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_files_have_the_documents_of_the_plain_ones(tmp_path, suffix):
    contents = {"r.jsonl": JSONL, "t.txt": JSONL[:100_000], "a.json": ARRAY}
    for name, content in contents.items():
        (tmp_path / "plain").mkdir(exist_ok=True)
        (tmp_path / "packed").mkdir(exist_ok=True)
        (tmp_path / "plain" / name).write_bytes(content)
        (tmp_path / "packed" / (name + suffix)).write_bytes(PACK[suffix](content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the text looks like records
        plain, packed = (
            [(d.name.replace(suffix, ""), d.text) for d in read_documents([str(tmp_path / folder)])]
            for folder in ("plain", "packed")
        )
    assert plain == packed and len(plain) == 3003


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("content", [JSONL, JSONL[:100]], ids=["long", "short"])
def test_a_truncated_compressed_file_is_refused_with_the_place(tmp_path, suffix, content):
    path = tmp_path / f"r.jsonl{suffix}"
    packed = PACK[suffix](content)
    for cut in (len(packed) - 1, len(packed) * 3 // 4):
        path.write_bytes(packed[:cut])
        text = refused(path)
        assert f"{path} is damaged " in text and "cannot be decompressed" in text
        assert re.search(r"after (line|byte) [\d,]+:|in its first 65,536 bytes:", text)
    changed = bytearray(packed)
    changed[len(packed) // 2] ^= 0xFF
    path.write_bytes(changed)
    # The decompressed garbage may be seen before its checksum.
    assert re.search(rf"{path}( is damaged|, line \d+: not )", refused(path))


def test_zstd_without_its_package_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(zstd_frames(LINES))
    (tmp_path / "b.jsonl").write_bytes(LINES)
    monkeypatch.setattr(text_files, "zstd", None)
    for path in (tmp_path / "a.jsonl.zst", tmp_path):  # never left out of a folder silently
        assert "needs the package backports.zstd; install it: pip install 'lamoe[data]'" in refused(
            path
        )


def test_parquet_rows_are_the_documents_of_the_same_lines(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(JSONL)
    want = [(d.name[2:], d.text) for d in read_documents([str(tmp_path / "r.jsonl")])]
    for name, options in {
        "r.parquet": dict(row_group_size=700),
        "no-suffix": dict(compression="zstd"),
        "d.parquet": dict(use_dictionary=True, write_page_checksum=True),
    }.items():
        path = tmp_path / name
        columns = {"id": list(range(3000)), "text": TEXTS}
        write_parquet(path, columns, **options)
        got = [(d.name.replace(name, ".jsonl"), d.text) for d in read_documents([str(path)])]
        assert [text for _, text in got] == [text for _, text in want]
        assert [n.split(":")[1] for n, _ in got] == [n.split(":")[1] for n, _ in want]


def test_parquet_columns(tmp_path):
    write_parquet(tmp_path / "x.parquet", {"body": ["b", None, "c"], "n": [1, 2, 3]})
    counts = {}
    source = f"{tmp_path / 'x.parquet'}:body"
    assert read(source, counts=counts) == ["b", "c"]
    assert counts[source].skipped == {"empty": 1}
    text = refused(tmp_path / "x.parquet")
    assert "a table without a column 'text'" in text and "it has 'body', 'n'" in text
    assert "did you mean 'body'?" in refused(f"{tmp_path / 'x.parquet'}:boddy")
    assert "x.parquet, row 1: field 'n' must be text, found int" in refused(
        f"{tmp_path / 'x.parquet'}:n"
    )
    (tmp_path / "a.txt").write_text("a")
    assert read(tmp_path, counts=counts) == ["a"]
    assert counts[str(tmp_path)].skipped == {"a table without a column 'text'": 1}
    write_parquet(tmp_path / "y.parquet", {"text": []})
    assert "gives no text (1 empty)" in refused(tmp_path / "y.parquet")


def test_damaged_parquet_is_refused_with_the_place(tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(path, {"text": TEXTS}, row_group_size=500, write_page_checksum=True)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    assert f"{path} is damaged after row 0: " in refused(path)
    changed = bytearray(content)
    changed[len(content) // 2] ^= 0xFF
    path.write_bytes(changed)
    assert re.search(r"x.parquet is damaged after row [\d,]+: .*; fetch or write it", refused(path))


def test_parquet_without_its_package_names_the_extra(tmp_path, monkeypatch):
    write_parquet(tmp_path / "x.parquet", {"text": TEXTS})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "needs the package pyarrow; install it: pip install 'lamoe[data]'" in refused(tmp_path)


def test_pipes_and_standard_input_are_refused(tmp_path):
    assert "is standard input, and text is read more than once" in refused("-")
    assert "/dev/null' is a pipe or device" in refused("/dev/null")
