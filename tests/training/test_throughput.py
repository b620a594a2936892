import copy
import io
import re

import pytest
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from vqt2i import runtime
from vqt2i.clip import CLIPConfig
from vqt2i.gpt import LossWeights, gpt_loss
from vqt2i.nn.transformer import TransformerConfig
from vqt2i.text import TextBatch
from vqt2i.training import throughput
from vqt2i.training.clip import clip_flops
from vqt2i.training.plan import training_flops
from vqt2i.training.throughput import Meter, Rate, count_flops
from vqt2i.training.vqgan import VQGANModule, VQGANTrainingConfig
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig
from vqt2i.vq.config import VQConfig
from vqt2i.vq.discriminator import AdversarialConfig
from vqt2i.vq.losses import VQGANLossConfig

ADVERSARIAL = "training.loss.adversarial={channels: 4, n_layers: 2, start_share: 0.3}"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that a meter reads, to be set."""
    seconds = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: seconds[0])
    return seconds


def end_batches(meter: Meter, clock: list[float], *seconds: float) -> None:
    for each in seconds:
        clock[0] += each
        meter.batch_ended()


def test_the_first_batch_and_batches_with_a_pause_are_not_counted(clock: list[float]) -> None:
    meter = Meter()
    end_batches(meter, clock, 9.0, 0.5, 0.25)
    meter.pause()
    end_batches(meter, clock, 30.0, 0.25)
    assert (meter.n_batches, meter.seconds) == (3, 1.0)


def test_a_rate_is_that_since_it_was_read_and_readers_do_not_disturb_each_other(clock: list[float]) -> None:
    meter = Meter()
    often, once = Rate(meter), Rate(meter)
    assert often.read() is None
    end_batches(meter, clock, 1.0, 0.5, 0.5)
    assert often.read() == 2.0 and often.read() is None
    end_batches(meter, clock, 2.0)
    assert often.read() == 0.5 and once.read() == 1.0


@pytest.mark.parametrize("changes", [{}, {"mlp": "gelu", "pb_relax": True, "norm_placement": "sandwich"}], ids=str)
def test_the_flops_of_a_gpt_are_those_that_are_planned_with(make_gpt, changes: dict) -> None:
    t = TransformerConfig(width=32, n_layers=2, n_heads=2, mlp_width=48, **changes)
    gpt = make_gpt("learned", transformer=t)  # rotary angles are a small product of their own
    layout = gpt.layout.config
    text = TextBatch(torch.zeros(2, layout.text_length, dtype=torch.long), torch.tensor([1, 3]))
    image_BI = torch.zeros(2, gpt.layout.image_length, dtype=torch.long)
    counted = count_flops(lambda: gpt_loss(gpt, text, image_BI, 1, LossWeights()).total.backward())
    assert counted == 2 * training_flops(gpt.config)


def test_the_flops_of_a_scorer_are_those_of_its_matrices() -> None:
    vision = TransformerConfig(width=32, n_layers=2, n_heads=2, mlp_width=48)
    text = TransformerConfig(width=16, n_layers=1, n_heads=2, mlp_width=24)
    config = CLIPConfig(
        image_size_px=16, patch_size_px=4, text_length=7, n_text_ids=9, vision=vision, text=text, embedding_width=12,
        text_tokenizer="t",
    )  # fmt: skip
    forward = 0
    for tower, length in ((vision, 16), (text, 8)):  # a learned vector stands before the text
        block = 2 * length * (4 * tower.width**2 + 3 * tower.width * tower.mlp_width) + 4 * length**2 * tower.width
        forward += tower.n_layers * block + 2 * tower.width * 12
    patches, drawn = 2 * 16 * (3 * 4**2) * 32, torch.get_rng_state()
    assert clip_flops(config) == 3 * forward + 2 * patches  # pictures need no gradient
    assert torch.equal(torch.get_rng_state(), drawn)


def test_counting_the_flops_of_an_image_tokenizer_changes_nothing() -> None:
    torch.manual_seed(0)
    model = ImageTokenizerConfig(image_size_px=16, channels=(8, 16), quantizer=VQConfig(codebook_size=16, code_dim=4))
    loss = VQGANLossConfig(adversarial=AdversarialConfig(channels=4, n_layers=2))
    module = VQGANModule(ImageTokenizer(model), VQGANTrainingConfig(loss=loss), 10)
    before, drawn = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    module.on_train_start()
    without, with_critic = module._flops
    assert 0 < without < with_critic
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert module.model.training and all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize(("stage", "rates"), [("gpt", "samples tokens"), ("vqgan", "images"), ("clip", "images")])
def test_the_last_step_is_told_with_losses_rate_mfu_memory_and_time_left(stage: str, rates: str, train, capsys) -> None:
    train(stage, "trainer.max_steps=3")
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("step 3/3"))
    units = "  ".join(rf"[\d,]+ {unit}/s" for unit in rates.split())
    assert re.search(rf"(loss|total) \d.*  {units}  MFU \d+%  \d+\.\d\d GB  0:00:00 left$", line), line


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is shown on a terminal of 60 columns."""
    file = io.StringIO()
    monkeypatch.setattr(runtime, "_console", Console(file=file, force_terminal=True, width=60, soft_wrap=True))
    return file


def test_on_a_terminal_a_bar_shows_the_steps_and_folds_what_they_came_to(train, terminal: io.StringIO) -> None:
    train("gpt", "trainer.max_steps=3")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert re.search(r"gpt ━+ 3/3", shown)
    facts = shown.split("3/3")[-1].split("done in")[0]
    assert "total" in facts and "tokens/s" in facts and "left" in facts, "nothing is cut off"
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h"), "the cursor is back"


def test_the_bar_goes_with_an_error_and_other_ranks_show_none(terminal: io.StringIO, monkeypatch) -> None:
    with pytest.raises(KeyError), runtime.step_bar("run", 5) as show:
        show(2, "loss 1")
        raise KeyError
    assert terminal.getvalue().endswith("\x1b[2K") and "\x1b[?25h" in terminal.getvalue()
    monkeypatch.setenv("LOCAL_RANK", "1")
    with runtime.step_bar("run", 5) as show:
        assert show is None


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: values that are read, and shapes that follow from values."""

    WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.bincount", "aten.unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith(self.WAITS):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("stage", "more"), [("gpt", []), ("clip", []), ("vqgan", []), ("vqgan", [ADVERSARIAL])])
def test_a_step_that_reports_nothing_makes_no_gpu_wait(stage: str, more: list[str], train, monkeypatch) -> None:
    advance, reads = _TrainingEpochLoop.advance, Reads()
    watched = []

    def advance_watched(self, data_fetcher) -> None:
        step = self.global_step + 1
        if step <= 2 or step == 10:  # the first ones prepare, the last one reports the losses
            return advance(self, data_fetcher)
        watched.append(step)
        with reads:
            advance(self, data_fetcher)

    monkeypatch.setattr(_TrainingEpochLoop, "advance", advance_watched)
    train(stage, "trainer.log_every_steps=100", *more)
    assert watched == list(range(3, 10))
    # the quantizer asks which codes are dead
    assert reads.found == (["aten.nonzero.default"] * len(watched) if stage == "vqgan" else [])
