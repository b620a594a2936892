"""Make a data set from drawn shapes, emoji, a folder, a table or webdataset tars.

Writes data.json and shards, report.txt and report.html, and rejected.csv, which names everything left out.
`make_dataset SOURCE --help` lists the options of a source.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqt2i.config import build_config
from vqt2i.errors import DataError

if TYPE_CHECKING:
    from vqt2i.data.build import BuildConfig
    from vqt2i.data.report import TokenCount

DEFAULT_TEXT_LENGTH = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    everywhere, drawn, found, files = (argparse.ArgumentParser(add_help=False) for _ in range(4))
    add = everywhere.add_argument
    add("--caption-pattern", metavar="REGEX", help="leave out captions in which this is found nowhere, and pictures "
        "left without any")  # fmt: skip
    add("--shard-size", type=int, metavar="N", help="samples in a shard (default 1000)")
    add("--tokenizer", type=Path, metavar="PATH", help="report the share of captions that this .model would truncate")
    add("--text-length", type=int, metavar="N", help=f"ids a caption may have (default {DEFAULT_TEXT_LENGTH})")

    add = found.add_argument
    add("--val-share", type=float, metavar="S", help="share of the pictures that goes to val (default 0.02)")
    add("--drop-duplicates", choices=("exact", "near", "none"), help="repeated pictures to leave out (default exact)")

    drawn.add_argument("--out", type=Path, metavar="DIR", help="default data/SOURCE")

    add = files.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where the data set goes; must not exist yet")
    add("--size", type=int, dest="size_px", metavar="N", help="crop to a centred square of N px (default: keep sizes)")
    add("--format", choices=("png", "jpg"), dest="image_format", help="of the stored pictures (default png)")
    add("--language", dest="primary_language", metavar="LANG", help="of captions not marked otherwise (default en)")
    add("--no-captions", dest="captions_required", action="store_false", default=None,
        help="keep pictures that have no caption")  # fmt: skip
    add("--min-side", type=int, dest="min_side_px", metavar="N", help="leave out pictures with a shorter side")
    add("--max-aspect", type=float, metavar="R", help="leave out pictures longer than R times their shorter side")
    add("--max-pixels", type=int, metavar="N", help="leave out pictures of more pixels (default 64 million)")
    add("--min-caption-chars", type=int, metavar="N", help="leave out shorter captions")
    add("--max-caption-chars", type=int, metavar="N", help="leave out longer captions")

    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    shapes = sources.add_parser("shapes", parents=[drawn, everywhere], help="the embedded set: scenes of flat shapes")
    shapes.add_argument("--size", type=int, dest="size_px", metavar="N", help="32 (default), 64 or 128 px")
    shapes.add_argument("--n-train", type=int, metavar="N", help="pictures for training (default 30000)")
    shapes.add_argument("--n-val", type=int, metavar="N", help="pictures of the same kind, to validate (default 1000)")
    shapes.add_argument("--n-unseen", type=int, metavar="N", help="pictures of combinations train lacks (default 1000)")
    shapes.add_argument("--seed", type=int, default=0)
    shapes.add_argument("--style", choices=("plain", "beach"), default="plain", help="beach: one or two objects "
                        "between sky and sand, by default 20 of each split, to teach a model a style with")  # fmt: skip
    shapes.add_argument("--labels", choices=("shape", "colour"), help="a data set of classes: pictures of one object "
                        "each, whose class is its shape or its colour")  # fmt: skip

    emoji = sources.add_parser("emoji", parents=[drawn, found, everywhere], help="colour emoji and their names")
    emoji.add_argument("--languages", default="en", metavar="LANG,LANG", help="of the names (default en)")
    emoji.add_argument("--size", type=int, default=64, dest="size_px", metavar="N", help="default 64 px")
    emoji.add_argument("--font", type=Path, metavar="PATH", help="default: the installed NotoColorEmoji.ttf")

    folder = sources.add_parser("folder", parents=[files, found, everywhere], help="images beside .txt files")
    folder.add_argument("folder", type=Path, metavar="DIR", help="NAME.jpg beside NAME.txt and NAME.LANG.txt, nested")
    folder.add_argument("--labels", dest="labelled", action="store_true", default=None, help="a data set of classes: "
                        "DIR/CLASS/NAME.jpg, captions or not")  # fmt: skip

    table = sources.add_parser("table", parents=[files, found, everywhere], help="CSV, TSV, JSONL or Parquet")
    table.add_argument("table", type=Path, metavar="FILE", help="paths in it are relative to it")
    table.add_argument("--image-column", default="image", metavar="NAME", help="default image")
    table.add_argument("--caption-column", action="append", metavar="[LANG=]NAME", help="default caption; repeatable")
    table.add_argument("--label-column", metavar="NAME", help="a data set of classes: of each image's class; captions "
                       "or not")  # fmt: skip

    tars = sources.add_parser("webdataset", parents=[files, found, everywhere], help="existing tars, local or http")
    tars.add_argument("urls", nargs="+", metavar="URL", help="path or address; patterns like data-{0000..0003}.tar")
    tars.add_argument("--labels", dest="labelled", action="store_true", default=None, help="a data set of "
                      "classes: KEY.cls, or else the \"label\" in KEY.json; captions or not")  # fmt: skip
    tars.add_argument("--val", nargs="+", metavar="URL", help="tars of the val split; the others are then all train")


def run(args: argparse.Namespace) -> None:
    from vqt2i.data.build import SHAPES_CONFIG, BuildConfig

    given = {key: value for key, value in vars(args).items() if key in BuildConfig.model_fields and value is not None}
    defaults = SHAPES_CONFIG.model_dump() if args.source == "shapes" else {}
    if given.get("labelled") or getattr(args, "label_column", None):
        defaults |= {"labelled": True, "captions_required": False}
    config = build_config(BuildConfig, defaults | given, "make_dataset")
    runners = {
        "shapes": _run_shapes,
        "emoji": _run_emoji,
        "folder": _run_folder,
        "table": _run_table,
        "webdataset": _run_tars,
    }
    runners[args.source](args, config, _token_count(args))


def _run_shapes(args: argparse.Namespace, config: "BuildConfig", token_count: "TokenCount | None") -> None:
    from vqt2i.data.build import DEFAULT_COUNTS, STYLE_COUNTS, build_shapes

    given = {"train": args.n_train, "val": args.n_val, "unseen": args.n_unseen}
    default = DEFAULT_COUNTS if args.style == "plain" else STYLE_COUNTS
    counts = {split: default[split] if count is None else count for split, count in given.items()}
    for split, count in counts.items():
        if count < (split == "train"):
            raise DataError(f"--n-{split} {count}: expected {'at least 1' if split == 'train' else '0 or more'}")
    name = "shapes" if args.style == "plain" else args.style
    out = args.out or Path("data") / (f"{args.labels}-classes" if args.labels else name)
    build_shapes(
        out, config=config, counts=counts, seed=args.seed, style=args.style, labels=args.labels, token_count=token_count
    )


def _run_emoji(args: argparse.Namespace, config: "BuildConfig", token_count: "TokenCount | None") -> None:
    from vqt2i.data.build import build_dataset
    from vqt2i.data.emoji import emoji_items

    languages = [language.strip() for language in args.languages.split(",")]
    build_dataset(
        args.out or Path("data/emoji"),
        emoji_items(languages, args.font),
        config.model_copy(update={"primary_language": languages[0]}),
        source={"kind": "emoji", "languages": languages},
        token_count=token_count,
    )


def _run_folder(args: argparse.Namespace, config: "BuildConfig", token_count: "TokenCount | None") -> None:
    from vqt2i.data.build import build_dataset
    from vqt2i.data.sources import folder_items

    entries = folder_items(args.folder, language=config.primary_language, labelled=config.labelled)
    build_dataset(args.out, entries, config, source=_described(args, config, str(args.folder)), token_count=token_count)


def _run_table(args: argparse.Namespace, config: "BuildConfig", token_count: "TokenCount | None") -> None:
    from vqt2i.data.build import build_dataset
    from vqt2i.data.sources import table_items

    wanted = args.caption_column or (["caption"] if config.captions_required else [])
    columns = _caption_columns(wanted, config.primary_language)
    entries = table_items(
        args.table, image_column=args.image_column, caption_columns=columns, label_column=args.label_column
    )
    config = config.model_copy(update={"primary_language": next(iter(columns), config.primary_language)})
    build_dataset(args.out, entries, config, source=_described(args, config, str(args.table)), token_count=token_count)


def _run_tars(args: argparse.Namespace, config: "BuildConfig", token_count: "TokenCount | None") -> None:
    from itertools import chain

    from vqt2i.data.build import build_dataset
    from vqt2i.data.tars import expand, tar_items

    if args.val and args.val_share is not None:
        raise DataError("--val and --val-share both say what val is; give one of them")
    language = config.primary_language
    options = {"language": language, "labelled": config.labelled}
    entries = tar_items(expand(args.urls), split="train" if args.val else None, **options)
    if args.val:
        entries = chain(entries, tar_items(expand(args.val), split="val", **options))
    source = _described(args, config, [*args.urls, *(args.val or [])])
    build_dataset(args.out, entries, config, source=source, token_count=token_count)


def _described(args: argparse.Namespace, config: "BuildConfig", origin: str | list[str]) -> dict[str, Any]:
    return {"kind": args.source, "origin": origin, "options": config.model_dump(mode="json", exclude_defaults=True)}


def _caption_columns(wanted: list[str], language: str) -> dict[str, str]:
    """Language to column, from `NAME` and `LANG=NAME`."""
    from vqt2i.data.shards import is_language

    columns: dict[str, str] = {}
    for text in wanted:
        code, equals, name = text.partition("=")
        if not (equals and is_language(code)):
            code, name = language, text
        if code in columns:
            raise DataError(f"--caption-column {text}: '{code}' has '{columns[code]}' already; give LANG=NAME")
        columns[code] = name
    return columns


def _token_count(args: argparse.Namespace) -> "TokenCount | None":
    if args.tokenizer is None:
        if args.text_length is not None:
            raise DataError("--text-length needs --tokenizer PATH to count with")
        return None
    from vqt2i.data.report import TokenCount
    from vqt2i.text import TextTokenizer

    tokenizer = TextTokenizer.load(args.tokenizer)
    length = DEFAULT_TEXT_LENGTH if args.text_length is None else args.text_length
    if length < 1:
        raise DataError(f"--text-length {length}: expected 1 or more")
    return TokenCount(args.tokenizer.name, lambda text: len(tokenizer.encode(text)), length)
