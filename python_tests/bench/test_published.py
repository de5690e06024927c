"""A published table: what is read of it, and what is refused in which words."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from bbfast.bench import read_published
from bbfast.errors import ArtifactError

HEAD = "dataset,backbone,attack_name,defense_name,ratio,test_acc,test_asr,test_ra\n"
LINE = "cifar10,preactresnet18,badnet,no defense,0.1,0.9,0.8,0.1\n"
PLACE = ("cifar10", "preactresnet18", "badnets", 0.1, "none")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "p.csv"


def test_byte_order_mark_crlf_blank_lines_and_spaces(path: Path) -> None:
    text = HEAD + "\n" + LINE.replace(",", " , ")
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read_published(path) == {PLACE: {"c_acc": 0.9, "asr": 0.8, "r_acc": 0.1}}


@pytest.mark.parametrize("figures", [",,", "-1.0,-1.0,-1.0", "-1, ,-1"])
def test_what_was_not_measured_is_no_figure(path: Path, figures: str) -> None:
    """The published table has both: empty cells, and -1 where a run gave nothing."""
    path.write_text(HEAD + LINE.replace("0.9,0.8,0.1", figures))
    assert read_published(path) == {PLACE: dict.fromkeys(("c_acc", "asr", "r_acc"))}


def test_columns_that_are_not_read_are_named(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_text("seed," + HEAD + "7," + LINE)
    with caplog.at_level(logging.WARNING, logger="bbfast"):
        assert set(read_published(path)) == {PLACE}
    assert "these columns are not read: seed" in caplog.text
    caplog.clear()
    path.write_text("," + HEAD + "7," + LINE)  # the index of a data frame
    assert set(read_published(path)) == {PLACE} and not caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"p\.csv: expected the columns dataset, .*missing: \['dataset'"),
        (HEAD.replace("test_asr", "test_ars"), r"missing: \['test_asr'\]; not known: \['test_ars'\]"),
        (HEAD.replace("\n", ",ratio\n"), r"expected each column once, twice: \['ratio'\]"),
        (
            HEAD + LINE.replace("0.8", "nan"),
            r"p\.csv, line 2, column test_asr: expected .* in 0\.\.1, got 'nan'",
        ),
        (HEAD + LINE.replace("0.8", "inf"), r"line 2, column test_asr: .*got 'inf'$"),
        (HEAD + LINE.replace("0.9", "91.5"), r"line 2, column test_acc: .*got '91\.5'; per cent are divided by 100"),
        (HEAD + LINE.replace("0.9", "-0.5"), r"line 2, column test_acc: .*got '-0\.5'$"),
        (HEAD + LINE.replace("0.9", "high"), r"line 2, column test_acc: .*got 'high'$"),
        (HEAD + LINE.replace("0.1,0.9", "nan,0.9"), r"line 2, column ratio: .*got 'nan'$"),
        (HEAD + LINE.replace("0.1,0.9", "10,0.9"), r"line 2, column ratio: .*got '10'; per cent"),
        (HEAD + LINE.replace("0.1,0.9", ",0.9"), r"line 2, column ratio: .*got ''$"),
        (HEAD + LINE.replace("badnet,", ","), r"line 2, column attack_name: expected a name, got nothing"),
        (HEAD + LINE + "cifar10,preactresnet18,lf\n", r"line 3: expected 8 fields, got 3"),
        (HEAD + LINE.replace("\n", ",9\n"), r"line 2: expected 8 fields, got 9"),
        (HEAD + LINE + LINE.replace("badnet", "badnets"), r"line 3: expected each place once, .*in line 2 already"),
        (HEAD + '"' + LINE, r"p\.csv, after line 2: "),
    ],
)
def test_refused_with_file_line_and_column(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(ArtifactError, match=message):
        read_published(path)


def test_files_that_are_no_text_or_not_there(path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot read .*p\.csv: No such file"):
        read_published(path)
    path.write_bytes((HEAD + LINE).encode() + b"\xff\xfe\n")
    with pytest.raises(ArtifactError, match=r"p\.csv, after line \d: .*utf-8"):
        read_published(path)
