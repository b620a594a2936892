"""Samples out of webdataset tars, on this machine or over http.

Brace patterns and the rule which files make one sample are webdataset's own. Its reader is not used: it takes damage in
the middle of a tar for the end of it and says nothing, and it starts a shell for some addresses.
"""

import http.client
import json
import tarfile
import urllib.request
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any

from vqt2i.data.shards import is_language
from vqt2i.data.sources import IMAGE_SUFFIXES, MAX_FILE_BYTES, Entries, Item, Rejection
from vqt2i.errors import DataError

TIMEOUT_S = 30.0
UNOPENED, DAMAGED = "shard cannot be opened", "damaged shard"  # reasons that concern a whole tar
_READ_ERRORS = (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, http.client.HTTPException)


def expand(patterns: Iterable[str]) -> list[str]:
    """Addresses from patterns such as `data-{000000..000003}.tar`.

    Raises:
        DataError: braces that do not close.
    """
    from webdataset.shardlists import expand_urls

    urls: list[str] = []
    for pattern in patterns:
        try:
            urls += expand_urls(pattern)
        except ValueError as error:
            raise DataError(f"{pattern}: no pattern of addresses ({error}); "
                            "expected one like data-{0000..0003}.tar") from None  # fmt: skip
    return urls


def is_remote(url: str) -> bool:
    """Whether reading it may fail now and succeed later."""
    return url.startswith(("http://", "https://"))


def tar_items(
    urls: Iterable[str], *, language: str, split: str | None, labelled: bool = False, timeout_s: float = TIMEOUT_S
) -> Entries:
    """The samples of webdataset tars, in order; `KEY.txt` is in `language`, `KEY.LANG.txt` in LANG, `KEY.json` is meta.

    labelled: read the class of each too, from `KEY.cls` or else the "label" in `KEY.json`.

    A tar that cannot be opened, ends early, is damaged or sends nothing for `timeout_s` costs what lies behind and is
    named: a rejection as `UNOPENED` or `DAMAGED`.
    """
    for url in urls:
        try:
            stream = _open(url, timeout_s)
        except _READ_ERRORS as error:
            yield Rejection(url, UNOPENED, str(error))
            continue
        with closing(stream):
            for entry in _samples(stream, url):
                yield entry if isinstance(entry, Rejection) else _item(*entry, url, language, split, labelled)


def _open(url: str, timeout_s: float) -> IO[bytes]:
    scheme, separator, path = url.partition("://")
    if not separator or scheme == "file":
        return open(path if separator else url, "rb")
    if scheme not in ("http", "https"):
        raise ValueError(f"'{scheme}' addresses are not read; download the tar, or give a path or an http(s) address")
    return urllib.request.urlopen(url, timeout=timeout_s)


class _WatchedTarInfo(tarfile.TarInfo):
    """Tells the tar how its headers ended: tarfile passes over damage behind the first header as if it were the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            tar.ending = error
            raise


def _samples(stream: IO[bytes], url: str) -> Iterator[tuple[str, dict[str, bytes]] | Rejection]:
    """(key, suffix to content) of each sample: members in a row that share the name up to the first dot."""
    from webdataset.tariterators import base_plus_ext

    key, files, n_members = None, {}, 0
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_WatchedTarInfo) as tar:
            for member in tar:
                tar.members = []  # or the list of all headers stays in memory
                n_members += 1
                base, suffix = base_plus_ext(member.name)
                if member.isdir():
                    continue
                if not member.isreg() or base is None or member.size > MAX_FILE_BYTES:
                    why = "not a file" if not member.isreg() else "no suffix" if base is None else "too large"
                    yield Rejection(f"{url} {member.name}", "unusable member", why)
                    continue
                content = tar.extractfile(member).read()
                if base != key or suffix.lower() in files:
                    if files:
                        yield key, files
                    key, files = base, {}
                files[suffix.lower()] = content
            if files:
                yield key, files
            files = {}
            if not isinstance(tar.ending, tarfile.EOFHeaderError):
                raise tarfile.ReadError(str(tar.ending))
    except _READ_ERRORS as error:
        if files:
            yield key, files
        yield Rejection(url, DAMAGED, f"after {n_members} members: {error}; what lies behind is lost")


def _item(
    key: str, files: dict[str, bytes], url: str, language: str, split: str | None, labelled: bool
) -> Item | Rejection:
    name = f"{url} {key}"
    images = [suffix for suffix in files if f".{suffix}" in IMAGE_SUFFIXES]
    if not images:
        return Rejection(name, "missing image", f"only {', '.join(files)}")
    captions: dict[str, list[bytes | str]] = {}
    notes = []
    meta: dict[str, Any] = {}
    label = None
    for suffix, content in files.items():
        stem, _, last = suffix.rpartition(".")
        if suffix == "json":
            meta, problem = _meta(content)
            notes += problem
        elif last == "txt" and (not stem or is_language(stem)):
            captions[stem or language] = [content]
        elif suffix == "cls" and labelled:
            label = content.decode("utf-8", "replace")
        elif suffix != images[0]:
            notes.append(f"unused member .{suffix}")
    if labelled and label is None and "label" in meta:
        label = str(meta["label"])
    return Item(name, Path(key).as_posix(), files[images[0]], captions, meta, split, tuple(notes), label)


def _meta(content: bytes) -> tuple[dict[str, Any], list[str]]:
    try:
        value = json.loads(content)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return {}, ["json damaged: left out"]
    return (value, []) if isinstance(value, dict) else ({"json": value}, [])
