"""Options that several verbs share."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqt2i.generation.sampling import SamplingConfig
    from vqt2i.processes import Place

RUNS = Path("runs")
REPOSITORY = Path(__file__).parents[2]


def add_training_arguments(parser: argparse.ArgumentParser, stage: str) -> None:
    """--config, --set, --runs, --resume."""
    add_config_arguments(parser, stage)
    # the deepspeed launcher gives it to every script; the environment says the same
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("--resume", nargs="?", const="auto", default="never", type=_resume, metavar="auto|never|PATH",
                        help="auto (also without a value): go on with the newest run of this name if it is not "
                             "finished, else start anew; PATH: with this run folder, or from this checkpoint in one; "
                             "never (default): start anew")  # fmt: skip


def add_config_arguments(parser: argparse.ArgumentParser, stage: str) -> None:
    """--config, --set, --runs."""
    default = REPOSITORY / "configs" / stage / "shapes.yaml"
    parser.add_argument("--config", type=Path, default=default, metavar="FILE",
                        help=f"a YAML file (default: configs/{stage}/shapes.yaml, the embedded shapes)")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="override one setting, for example trainer.max_steps=100; may be repeated")  # fmt: skip
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where runs are kept (default: runs)")


def add_number(
    parser: argparse.ArgumentParser, name: str, default: float, help: str = "", *, least: float = 1, metavar: str = "N"
) -> None:
    """An option with a number of `least` or more; its help ends with the default."""
    parser.add_argument(name, type=at_least(least), default=default, metavar=metavar,
                        help=f"{help} (default: {default:g})" if help else f"default: {default:g}")  # fmt: skip


def at_least(least: float) -> Callable[[str], float]:
    """Parses a number of `least` or more, whole if that is."""

    def parse(text: str) -> float:
        value = type(least)(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"found {text}, expected {least:g} or more")
        return value

    parse.__name__ = type(least).__name__  # argparse tells it
    return parse


def _resume(value: str) -> str | Path:
    return value if value in ("auto", "never") else Path(value)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """--sampling, --guidance, --temperature and the other settings of `SamplingConfig`."""
    parser.add_argument("--sampling", type=Path, metavar="FILE", help="settings in a YAML file, such as those in "
                        "configs/sampling; what is given beside it wins (default: the model's own)")  # fmt: skip
    parser.add_argument("--guidance", type=float, metavar="S", help="1 is none (default: the model's own)")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("FROM", "TO"),
                        help="the shares of an image's tokens from and to which guidance acts "
                             "(default: the model's own)")  # fmt: skip
    parser.add_argument("--guidance-schedule", choices=("constant", "linear", "cosine"),
                        help="how guidance comes to its full strength over its interval (default: the model's own)"
                        )  # fmt: skip
    parser.add_argument("--temperature", type=float, metavar="T", help="default: the model's own")
    parser.add_argument("--temperature-end", type=float, metavar="T",
                        help="of an image's last token, to which it goes in equal steps")  # fmt: skip
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest ids only")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest ids of probability P only")
    parser.add_argument("--min-p", type=float, metavar="P",
                        help="draw only from ids at least P times as likely as the likeliest")  # fmt: skip
    parser.add_argument("--jacobi-window", type=int, metavar="W",
                        help="draw image after image, each by passes over W tokens at once: fewer of them, of the same "
                             "distribution (docs/decoding.md)")  # fmt: skip


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """--engine, --precision."""
    parser.add_argument("--engine", choices=("auto", "plain", "native", "compiled"), default="auto", help="how the GPT "
                        "decodes: changes the speed only (default: auto, what ends the job soonest)")  # fmt: skip
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "int8"), default="auto", help="of the GPT's "
                        "products: lower ones are faster and draw other pictures (default: fp32 on CPUs)")  # fmt: skip


def add_part_arguments(parser: argparse.ArgumentParser) -> None:
    """--clip, --prior."""
    parser.add_argument("--clip", type=Path, metavar="DIR", help="score by this one: a run of tools/train_clip.py or "
                        "what tools/import_checkpoint.py made of a published CLIP (default: the model's own)"
                        )  # fmt: skip
    parser.add_argument("--prior", type=Path, metavar="DIR", help="what tools/train_prior.py trained: makes the "
                        "embedding of a prompt that of an image, for a model that reads embeddings (default: the "
                        "model folder's own, if it has one)")  # fmt: skip


def add_grid_argument(parser: argparse.ArgumentParser) -> None:
    """--grid."""
    parser.add_argument("--grid", type=int, nargs=2, metavar=("H", "W"), help="draw pictures of H rows of W cells "
                        "(default: those of the training; docs/editing.md)")  # fmt: skip


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """--devices, --memory, --offload."""
    parser.add_argument("--devices", type=int, metavar="N", help="draw on N GPUs, or without one in N processes; "
                        "changes no picture (default: 1, under torchrun, deepspeed or srun all that it "
                        "started)")  # fmt: skip
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher gives it to every script
    parser.add_argument("--memory", type=float, metavar="GB", help="the most that weights and drawing may take of each "
                        "device (default: four fifths of what is free)")  # fmt: skip
    parser.add_argument("--offload", choices=("auto", "never", "always"), default="auto",
                        help="whether image tokenizer and scorer wait on the CPU while the GPT draws on a GPU "
                             "(default, auto: where not everything fits)")  # fmt: skip


def placement_from(args: argparse.Namespace, place: "Place") -> dict[str, Any]:
    """What `TextToImage.load` takes: this process's device, and its share of the machine's memory.

    Raises:
        ConfigError: --memory is not more than 0.
    """
    from vqt2i.errors import ConfigError
    from vqt2i.generation.memory import memory_share

    if args.memory is not None and not args.memory > 0:
        raise ConfigError(f"--memory: found {args.memory}, expected more than 0")
    memory_gb = memory_share(place.n_sharing) if args.memory is None and place.n_sharing > 1 else args.memory
    return {"device": place.device, "memory_gb": memory_gb, "offload": args.offload}


def sampling_from(args: argparse.Namespace, defaults: "SamplingConfig") -> "SamplingConfig":
    """A model's sampling defaults, or those of --sampling, with what was given on the command line."""
    from vqt2i.config import build_config, load_config

    if args.sampling is not None:
        defaults = load_config(type(defaults), args.sampling)
    given = {name: value for name in type(defaults).model_fields if (value := getattr(args, name)) is not None}
    return build_config(type(defaults), defaults.model_dump() | given, "sampling")


def add_deepspeed_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--deepspeed", nargs="?", type=Path, const=True, default=False, metavar="JSON",
                        help="train with DeepSpeed ZeRO, configured by the settings or by a JSON file")  # fmt: skip
