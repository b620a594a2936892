"""A diagnosis for people: one HTML page that needs no file beside it."""

from collections.abc import Iterator
from html import escape

import numpy as np

from vqt2i.data.report import Section, data_uri, page_html, section_html
from vqt2i.evaluation.diagnosis import Diagnosis, Shown, Stage

_CELL_PX = 24
# of the losses by position: dark blue for the least, over green, to yellow for the most (a few points of viridis)
_COLOURS = np.float32([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])


def write_page(diagnosis: Diagnosis, title: str, facts: str) -> str:
    """The page's text. title: what was diagnosed. facts: with what, in a line."""
    body = [f"<p class={'weak' if diagnosis.weakest else 'fine'} id=verdict>{escape(diagnosis.verdict)}</p>"]
    body += [_stages_html(diagnosis.stages), _shown_html(diagnosis.shown), "<main>"]
    body += map(section_html, _sections(diagnosis))
    body += [_positions_html(diagnosis.by_position), "</main>"]
    return page_html(title, facts, body, _MORE_CSS)


def _stages_html(stages: tuple[Stage, ...]) -> str:
    rows = [
        f"<tr class={'weak' if stage.weak else 'fine'}><td>{escape(stage.name)}<td>{'weak' if stage.weak else 'fine'}"
        f"<td>{escape(stage.reason)}"
        for stage in stages
    ]
    head = "<table id=stages><tr><th>stage<th>found<th>why"
    return "\n".join([head, *rows, "</table><p>A stage stands on those above it: mend the first weak one first.</p>"])


def _shown_html(shown: tuple[Shown, ...]) -> str:
    rows = {
        "validation image": "image",
        "reconstruction: what the image tokenizer keeps": "reconstruction",
        "teacher-forced: the likeliest id at each place, all before it given": "teacher_forced",
        "drawn from the caption alone": "drawn",
    }
    html = ["<h2>What each stage makes of validation samples</h2><div id=shown><table>"]
    for label, name in rows.items():
        cells = "".join(f'<td><img alt="{escape(name)}" src="{data_uri(getattr(one, name))}">' for one in shown)
        html.append(f"<tr><th>{escape(label)}{cells}")
    captions = "".join(f"<td>{escape(one.caption)}" for one in shown)
    return "\n".join([*html, f"<tr><th>caption{captions}", "</table></div>"])


def _sections(diagnosis: Diagnosis) -> Iterator[Section]:
    losses = diagnosis.losses
    yield Section(
        "Loss by modality", ("predicted", "nats per token"),
        [
            ("image, its own caption before it", losses.image),
            ("the same, training samples", losses.train),
            ("caption, before the image", losses.text),
            ("caption, behind the image", losses.text_from_image),
        ],
        bars=True, remark="if training samples cost far less, they were learnt by heart, and more data would help",
    )  # fmt: skip
    yield Section(
        "What a caption is worth", ("image ids predicted", "nats per token"),
        [
            ("with their own caption", losses.image),
            ("with another image's caption", losses.shuffled),
            ("without a caption", losses.unconditional),
            ("by their frequencies alone", losses.frequencies),
        ],
        bars=True, remark=f"another image's caption is worse by {diagnosis.shuffled_z:.1f} standard errors",
    )  # fmt: skip
    every = max(1, (len(diagnosis.overfit) - 1) // 6)
    yield Section(
        "One batch learnt by heart", ("step", "nats per image id"),
        [(str(step), loss) for step, loss in enumerate(diagnosis.overfit) if step % every == 0],
        bars=True, remark="a copy of the GPT trained on one training batch alone: the loss of one that can learn falls",
    )  # fmt: skip
    yield Section(
        "Image tokenizer", ("measure", "value"),
        [
            ("PSNR of reconstructions", f"{diagnosis.psnr:.1f} dB"),
            ("PSNR of patches' mean colours", f"{diagnosis.patch_psnr:.1f} dB"),
            ("codes seen in the samples", f"{diagnosis.code_usage:.1%}"),
        ],
    )  # fmt: skip


def _positions_html(loss_HW: np.ndarray) -> str:
    low, high = float(loss_HW.min()), float(loss_HW.max())
    share_HW = (loss_HW - low) / max(high - low, 1e-9)
    cells = _coloured(share_HW).repeat(_CELL_PX, 0).repeat(_CELL_PX, 1)
    scale = _coloured(np.linspace(0, 1, 128)[None]).repeat(12, 0)
    return (
        "<section id=positions><h2>Loss by position</h2>"
        f'<img alt="loss by position" src="{data_uri(cells)}"><p>{low:.2f} <img class=scale alt="colour scale" '
        f'src="{data_uri(scale)}"> {high:.2f} nats per image id; read in rows from the top left, so that what comes '
        "first has less before it to be predicted from</p></section>"
    )


def _coloured(share_HW: np.ndarray) -> np.ndarray:
    points = np.linspace(0, 1, len(_COLOURS))
    channels = [np.interp(share_HW, points, _COLOURS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


_MORE_CSS = """
#verdict { font-size: 1.1rem; padding: .7rem 1rem; border-left: .4rem solid; color: #222; margin: 1rem 0 }
#verdict.fine { border-color: #3a923a; background: #eef7ee }
#verdict.weak { border-color: #c03d3e; background: #fbeeee }
#stages td { text-align: left; white-space: normal; vertical-align: top } #stages th { text-align: left }
#stages td:nth-child(2) { font-weight: 600 } #stages td:first-child { white-space: nowrap }
.fine td:nth-child(2) { color: #3a923a } .weak td:nth-child(2) { color: #c03d3e }
#shown { overflow-x: auto } #shown table { width: auto }
#shown td { border: 0; text-align: center; white-space: normal }
#shown th { text-align: left; font-weight: 400; min-width: 9rem; vertical-align: middle }
#shown td { font-size: .78rem; line-height: 1.25; min-width: 6.2rem; vertical-align: top; padding: .15rem .25rem }
#shown img { width: 96px; height: 96px }
#positions img { width: auto; height: auto; border: 0 } #positions .scale { vertical-align: middle }
"""
