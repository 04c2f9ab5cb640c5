"""The encoding of a text file: as given, else UTF-8, UTF-16, or what it surely is; never a guess. No torch."""

import codecs
import contextlib
import io
import itertools
import re
from functools import partial
from pathlib import Path

import charset_normalizer
import numpy as np

from vqa_sft.errors import InputError, explains

_CHUNK = 2**20
# What a text may be that is neither UTF-8 nor surely Korean. Of several that read it alike the first is named.
ENCODINGS = (
    *("cp949", "gb18030", "cp950", "cp932", "euc_jp", "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255"),
    *("cp1256", "cp1257", "cp1258", "cp874", "koi8_r", "iso8859_2", "iso8859_5", "cp866", "cp850", "mac_roman"),
)
# Those of which charset-normalizer can be believed where it is sure. The alphabets of one byte a letter differ in few
# letters (a Polish text reads well as Turkish), so that they are always asked for.
_BELIEVED = ("gb18030", "cp950", "cp932", "euc_jp")
_MIN_KINDS = 50  # different letters in a text that charset-normalizer is believed of
# Common syllables of Korean: about 0.7 of those of any text, and under 0.2 of what other encodings read as in CP949.
_COMMON = (
    "이다는의에을가고기지하은로서한를시도사자리어정인대나해아그라과수보주부들있전장일제것구동으성상원신만조마"
    "여유우게스비안니선면연물거오중소경미무영공적발세모생화양진학용방개위년문분교계관러실음내국요없말때당행까"
    "터두너람와반색슨엇몇명왼쪽른강산차집호저회재입단간트달본외심민김박남북운건노빨파란초록검흰갈큰작더많높낮"
    "길알답각식품목습합할션않옵값함드력름치형되데버업바프표설출령크패변된야블번디료환열키테렉메필십했려"
)
_COMMON_SYLLABLES = [ord(syllable) for syllable in _COMMON]
_SYLLABLES = [ord(bytes((first, last)).decode("cp949")) for first in range(0xB0, 0xC9) for last in range(0xA1, 0xFF)]
_SAMPLE = 2**16  # bytes that are shown to charset-normalizer


def find_encoding(path: Path, encoding: str | None = None) -> str:
    """The encoding in which the whole file is text: the given one, else UTF-8, UTF-16, or what it surely is in another
    encoding of Korean, Chinese or Japanese. Raises InputError where that is not sure, with what it may be, and for a
    text that holds a null byte."""
    if encoding is not None:
        with explains((LookupError, ValueError), f"encoding {encoding!r} is not known"):
            io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        found = _first_undecodable(path, encoding)
        if found is not None:
            raise InputError(
                f"{path} is not {encoding} text (byte {found:,}). Set another `encoding`, or save it as UTF-8."
            )
        return encoding
    with path.open("rb") as file:
        expected, is_marked = _find_unicode(file.read(2**16))
    offset = _first_undecodable(path, expected)
    if offset is None:
        return expected
    problem = f"{path} is not {expected.upper()} text (byte {offset:,})"
    lines = [] if is_marked else _sample_lines(path)
    sample = b"\n".join(lines)
    damaged = sample.decode("utf-8", "replace")
    if is_marked or 2 * damaged.count("\ufffd") < sum(char > "\x7f" for char in damaged):  # mostly UTF-8
        raise InputError(f"{problem}: the file is damaged there. Save it as UTF-8, or set `encoding`.")
    if _first_undecodable(path, "cp949") is None and _is_korean(_count_file(path, "cp949")):
        return "cp949"
    candidates, sure = _rank_encodings(sample)
    # Files in two encodings that were put together are neither.
    some_korean = any(_is_korean(_count_letters(line.decode("cp949", "ignore"))) for line in lines)
    if sure is not None and not some_korean and _first_undecodable(path, sure) is None:
        return sure
    readings: dict[str, str] = {}
    for candidate in [*candidates[:4], "cp949", *_BELIEVED, "cp1252"]:  # the commonest in any case
        with contextlib.suppress(UnicodeDecodeError):
            readings.setdefault(sample.decode(candidate), candidate)
    shown = "; ".join(f"{name} reads {_show_letters(text)!r}" for text, name in readings.items())
    hint = f" to the one that reads right: {shown}. Or save it as UTF-8." if shown else ", or save it as UTF-8."
    raise InputError(f"{problem}, and what it is instead is not sure. Set `encoding`{hint}")


def _find_unicode(head: bytes) -> tuple[str, bool]:
    """UTF-8, or the UTF-16 that a file begins as; and whether it is certain to be that."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16", True
    # Without a mark: a line break and some ASCII, which without their null bytes no other encoding reads as such.
    for encoding in ("utf-16-le", "utf-16-be"):
        text = head.decode(encoding, "ignore")
        if re.search("[\r\n]", text) and len(re.findall("[ -~]", text)) > len(text) / 20:
            return encoding, True
    return "utf-8", head.startswith(codecs.BOM_UTF8)


def _first_undecodable(path: Path, encoding: str) -> int | None:
    """The offset of the first byte that is no text; None when all are. Raises InputError for a null byte."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line, offset = 1, 0
    with path.open("rb") as file:
        for chunk in itertools.chain(iter(partial(file.read, _CHUNK), b""), [b""]):
            offset += len(chunk)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:  # its object begins with what was left of the chunk before
                return offset - len(error.object) + error.start
            except UnicodeError:  # UTF-16 without a mark
                return 0
            if "\0" in text:
                line += text[: text.index("\0")].count("\n")
                raise InputError(
                    f"{path} holds a null byte on line {line}. The file is damaged, or UTF-16: then set its `encoding`."
                )
            if any(mark in text for mark in ("\x1b$", "\x1b(")):
                raise InputError(
                    f"{path} holds the shifts of ISO-2022 (Japanese or Korean mail). Set `encoding: iso2022_jp` (or "
                    "iso2022_kr), or save it as UTF-8."
                )
            line += text.count("\n")
    return None


def _count_file(path: Path, encoding: str) -> np.ndarray:
    with path.open(encoding=encoding, newline="") as file:
        return sum(map(_count_letters, iter(partial(file.read, _CHUNK), "")))


def _count_letters(text: str) -> np.ndarray:
    """How often each character of a text without rare ones comes, by its number."""
    return np.bincount(np.frombuffer(text.encode("utf-16-le"), "<u2"), minlength=2**16)


def _is_korean(counts: np.ndarray) -> bool:
    """Whether what could be decoded as CP949 is Korean: made of the 2,350 syllables that have a block of their own,
    many of them common ones. Others decode as rare syllables, Chinese characters and signs."""
    letters, common = counts[0x3400:0xD7A4].sum(), counts[_COMMON_SYLLABLES]
    return bool(
        counts[_SYLLABLES].sum() >= 0.95 * letters
        and np.count_nonzero(common) >= 6
        and common.sum() >= 0.4 * counts[0x80:].sum()
    )


def _sample_lines(path: Path) -> list[bytes]:
    """Lines of all parts of the file that are not ASCII, each once, cut where they are long."""
    room = max(1_000, _SAMPLE * _CHUNK // path.stat().st_size)  # of each part
    sample: dict[bytes, None] = {}
    with path.open("rb") as file:
        for i, chunk in enumerate(iter(partial(file.read, _CHUNK), b"")):
            lines = re.split(b"[\r\n]+", chunk)
            # A line that two parts share is cut anywhere.
            start = 1 if i > 0 else 0
            end = len(lines) - 1 if len(lines) > 1 and len(chunk) == _CHUNK else len(lines)
            lines = lines[start:end]
            held = 0
            for line in lines:
                if not line.isascii() and held < room:
                    sample[_cut(line)] = None
                    held += min(len(line), 2_000)
    return list(sample)


def _show_letters(text: str) -> str:
    """The first characters that are not ASCII, with their neighbours."""
    start = re.search("[^\0-\x7f]", text).start()
    return text[max(0, start - 10) :].splitlines()[0][:30].strip() if start < 10 else text[start - 10 : start + 20]


def _cut(line: bytes) -> bytes:
    """A line of at most 2,000 bytes; of a longer one those from the first that is not ASCII, cut where no letter is."""
    if len(line) <= 2_000:
        return line
    start = re.search(rb"[\x80-\xff]", line).start()
    piece = line[start : start + 2_000]
    return piece[: max(map(piece.rfind, (b" ", b",", b'"')))] if len(piece) == 2_000 else piece


def _rank_encodings(sample: bytes) -> tuple[list[str], str | None]:
    """What charset-normalizer finds that the text may be, likeliest first; and what it surely is, if anything."""
    found = list(charset_normalizer.from_bytes(sample, steps=20, cp_isolation=list(ENCODINGS)))
    candidates = []
    for match in found:
        candidates += sorted({*match.could_be_from_charset} & {*ENCODINGS}, key=ENCODINGS.index)
    if not found or found[0].encoding not in _BELIEVED or len({*str(found[0])} - {*map(chr, range(128))}) < _MIN_KINDS:
        return candidates, None
    is_sure = found[0].chaos < 0.02 and all(match.chaos >= found[0].chaos + 0.1 for match in found[1:])
    return candidates, found[0].encoding if is_sure else None
