"""Captions of the web as they were cleaned for LlamaGen's training (and DeepFloyd IF's and PixArt's before it).

What a prompt of plain words meets is lower case, plain quotes and dashes, no brackets, no Chinese characters. Differs:
mojibake is not mended (theirs uses `ftfy`), and phrases of web shops ("free shipping", "click for") are kept.
"""

import html
import re
from urllib.parse import unquote_plus

_DOMAIN = r"[\w.\-]+\.(?:com|co|ru|net|org|edu|gov|it)\b[\w/\-]*"
_FILE = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_RULES = [(re.compile(pattern), to) for pattern, to in (
    ("<person>", "person"),
    (rf"\b(?:(?:https?:|www)\S+|{_DOMAIN})", ""),  # addresses
    (r"<[^<>]*>", ""),  # tags
    (r"@\w+", ""),  # nicknames
    (r"[\u31c0-\u9fff]", ""),  # from the strokes of Chinese characters to the last of the characters
    (r"[\u058a\u05be\u2010-\u2015\u2e3a\u2e3b\u301c\u3030\ufe58\ufe63\uff0d]", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&(?:quot|amp);?", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # addresses of machines
    (r"\\n", " "),
    (r"#\d{1,3}\b|#\d{5,}\b|\b\d{6,}\b", ""),  # numbers of articles
    (rf"\S+\.(?:{_FILE})\b", ""),  # names of files
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)]  # fmt: skip
_LAST = [(re.compile(pattern), to) for pattern, to in (
    (r"\b[a-z]{1,3}\d{3,15}\b|\b[a-z]+\d+[a-z]+\b|\b\d+[a-z]+\d+\b", ""),  # of models: jc6640, 6640vc231
    (rf"\b(?:{_FILE})\b(?: images?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes
    (r"\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)]  # fmt: skip


def clean_web_caption(text: str) -> str:
    """The text, cleaned twice as theirs was: what the first time uncovers the second one meets."""
    return _cleaned(_cleaned(text))


def _cleaned(text: str) -> str:
    text = unquote_plus(text).strip().lower()
    for pattern, to in _RULES:
        text = pattern.sub(to, text)
    if len(re.findall("[-_]", text)) > 3:  # words-joined-like-this
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(text)).strip()
    for pattern, to in _LAST:
        text = pattern.sub(to, text)
    text = re.sub(r"^[\"'](.+)[\"']$", r"\1", text.strip())
    return re.sub(r"^['_,\-:;]|['_,\-:+]$", "", text).strip()
