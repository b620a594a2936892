"""Train a SentencePiece text tokenizer (unigram or BPE, byte fallback).

The corpus is the captions of data sets, lines of text files, or both.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, action="append", default=[], metavar="DIR",
                        help="a data set folder, all captions of its split 'train'; may be repeated "
                             "(default, if no --text either: the embedded shapes)")  # fmt: skip
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FILE",
                        help="a UTF-8 text file, one caption a line; may be repeated")  # fmt: skip
    parser.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram",
                        help="bpe is what BPE-dropout needs (default: unigram)")  # fmt: skip
    parser.add_argument("--vocabulary-size", type=int, default=4096, help="default: 4096")
    parser.add_argument("--character-coverage", type=float, default=0.9995, help="default: 0.9995")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.model", help="where to write it")


def run(args: argparse.Namespace) -> None:
    import shlex
    import sys

    from vqt2i.config import build_config
    from vqt2i.errors import ConfigError
    from vqt2i.runtime import say
    from vqt2i.text.train import TextTokenizerConfig, read_lines, save_text_tokenizer, train_text_tokenizer
    from vqt2i.training.run import DataConfig, open_dataset

    if args.out.suffix != ".model":
        raise ConfigError(f"--out {args.out}: expected a name that ends in .model")
    values = {
        "model_type": args.model_type,
        "vocabulary_size": args.vocabulary_size,
        "character_coverage": args.character_coverage,
    }
    config = build_config(TextTokenizerConfig, values, "train_tokenizer")
    corpora = {str(path): read_lines(path) for path in args.text}
    for path in args.data or ([] if args.text else [DataConfig().path]):
        split = open_dataset(DataConfig(path=path)).split("train")
        corpora[str(path)] = [t for i in range(len(split)) for texts in split.captions(i).values() for t in texts]
    tokenizer = train_text_tokenizer([text for texts in corpora.values() for text in texts], config)
    corpus = {name: len(texts) for name, texts in corpora.items()}
    save_text_tokenizer(tokenizer, args.out, {"corpus_captions": corpus, "command": shlex.join(["python", *sys.argv])})
    say(f"{args.out}: {tokenizer.n_ids:,} ids from {sum(corpus.values()):,} captions")
