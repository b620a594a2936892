import copy
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from vqt2i.training.batches import Batch
from vqt2i.training.optim import OptimizerConfig
from vqt2i.training.vqgan import VQGANModule, VQGANTrainingConfig
from vqt2i.vq.autoencoder import ImageTokenizer, VQOutput
from vqt2i.vq.config import ImageTokenizerConfig, VQConfig
from vqt2i.vq.discriminator import AdversarialConfig
from vqt2i.vq.losses import VQGANLossConfig

MODEL = ImageTokenizerConfig(image_size_px=16, channels=(8, 16), quantizer=VQConfig(codebook_size=16, code_dim=4))
OPTIMIZER = OptimizerConfig(learning_rate=4e-3, warmup_steps=2)
CRITIC = AdversarialConfig(channels=4, n_layers=2, start_share=0.5)


def _stack(batches: list[Batch]) -> Batch:
    return Batch(torch.stack([batch.image for batch in batches]), None, None, torch.zeros(len(batches)))


def make(max_steps: int, adversarial: AdversarialConfig | None = None, **changes) -> VQGANModule:
    torch.manual_seed(0)
    config = VQGANTrainingConfig(optimizer=OPTIMIZER, loss=VQGANLossConfig(adversarial=adversarial), **changes)
    return VQGANModule(ImageTokenizer(MODEL), config, max_steps)


def loader(n: int = 16, batch_size: int = 4) -> DataLoader:
    blocks = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures = torch.nn.functional.interpolate(blocks, scale_factor=4.0)
    samples = [Batch(picture, None, None, None) for picture in pictures]
    return DataLoader(samples, batch_size=batch_size, collate_fn=_stack)


def make_trainer(max_steps: int, devices: int = 1, **settings) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", devices=devices, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, max_steps=max_steps, **settings,
    )  # fmt: skip


class Record(L.Callback):
    """Metrics and a copy of the critic's first weights, after every step."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.critics: list[Tensor] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        if module.discriminator is not None:
            self.critics.append(module.discriminator.conv_in.weight.detach().clone())


def states_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("adversarial", [None, CRITIC])
def test_training_improves_validation_and_logs_every_measure(adversarial):
    module, data = make(60, adversarial), loader()
    before = make_trainer(60).validate(module, data, verbose=False)[0]
    trainer = make_trainer(60)
    trainer.fit(module, data, data)
    after = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    names = {"loss", "psnr", "ssim", "usage", "perplexity", "dead_codes"}
    assert after.keys() == before.keys() == {f"val/{name}" for name in names}
    assert after["val/psnr"] > before["val/psnr"] + 3
    assert after["val/dead_codes"] == round((1 - after["val/usage"]) * 16)


@pytest.mark.parametrize("adversarial", [None, CRITIC])
def test_one_batch_is_one_global_step(adversarial):
    trainer = make_trainer(7)
    record = Record()
    trainer.callbacks.append(record)
    trainer.fit(make(7, adversarial), loader())
    assert trainer.global_step == len(record.metrics) == 7


def test_critic_counts_and_learns_from_its_share_of_the_steps_on():
    record = Record()
    trainer = make_trainer(8, callbacks=[record])
    module = make(8, CRITIC)
    first = module.discriminator.conv_in.weight.detach().clone()
    trainer.fit(module, loader())
    changed = [not torch.equal(a, b) for a, b in zip([first, *record.critics], record.critics, strict=False)]
    assert changed == [False] * 4 + [True] * 4
    assert ["train/discriminator" in metrics for metrics in record.metrics] == changed
    assert ["train/adaptive_weight" in metrics for metrics in record.metrics] == changed


def test_steps_before_the_critic_equal_steps_without_one():
    states = []
    for adversarial in (None, CRITIC):
        module = make(8, adversarial)
        make_trainer(4).fit(module, loader())
        states.append(module.model.state_dict())
    assert states_equal(*states)


def test_learning_rate_follows_the_schedule_of_both_optimizers():
    record = Record()
    module = make(6, CRITIC)
    trainer = make_trainer(6, callbacks=[record])
    trainer.fit(module, loader())
    rates = [metrics["train/lr"] for metrics in record.metrics]
    assert rates[:3] == pytest.approx([2e-3, 4e-3, 4e-3])
    assert rates[2] > rates[3] > rates[5] > 0
    last = [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]
    assert last == [pytest.approx(rates[-1])] * 2


def test_gradients_are_clipped_to_the_norm():
    module = make(1, max_gradient_norm=1e-3)
    module.reconstruction_loss.forward = lambda out, x: 1e6 * (out.reconstruction_B3HW - x).square().mean()
    make_trainer(1).fit(module, loader())
    norm = torch.stack([p.grad.norm() for p in module.model.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_exported_weights_are_the_running_average():
    module = make(3, ema_decay=0.15)
    seen = []

    class Weights(L.Callback):
        def on_train_batch_end(self, *_) -> None:
            seen.append(module.model.encoder.conv_in.weight.detach().clone())

    make_trainer(3, callbacks=[Weights()]).fit(module, loader())
    expected = seen[0]  # the first update is a copy
    for weight in seen[1:]:
        expected = 0.15 * expected + 0.85 * weight
    exported = module.export_model()
    torch.testing.assert_close(exported.encoder.conv_in.weight, expected)
    assert torch.equal(exported.quantizer.codebook, module.model.quantizer.codebook)
    assert not any(part.training for part in exported.modules())


@pytest.mark.parametrize("adversarial", [None, CRITIC])
def test_resumed_training_equals_uninterrupted_training(adversarial, tmp_path):
    data = loader(n=4)  # one batch over and over: which one comes after a resume is the data loader's matter
    whole = make(8, adversarial)
    make_trainer(8).fit(whole, data)

    trainer = make_trainer(5)
    trainer.fit(make(8, adversarial), data)
    trainer.save_checkpoint(tmp_path / "five.ckpt")
    resumed = make(8, adversarial)
    make_trainer(8).fit(resumed, data, ckpt_path=tmp_path / "five.ckpt")
    assert states_equal(whole.state_dict(), resumed.state_dict())


class Ids(L.Callback):
    """The ids of every training batch, and what was logged of the codebook at every step."""

    def __init__(self, module: VQGANModule) -> None:
        self.ids: list[Tensor] = []
        self.logged: list[dict[str, float]] = []
        module.model.register_forward_hook(self._keep)

    def _keep(self, model: ImageTokenizer, inputs: tuple, out: VQOutput) -> None:
        if model.training:
            self.ids.append(out.ids_BHW)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        names = ("train/usage", "train/perplexity", "train/restarted_codes")
        found = trainer.callback_metrics
        self.logged.append({name: float(found[name]) for name in names if name in found})


def test_how_codes_are_used_is_told_over_all_steps_since_the_last_row():
    module = make(6)
    seen = Ids(module)
    make_trainer(6, callbacks=[seen], log_every_n_steps=3).fit(module, loader())
    assert seen.logged[0] == seen.logged[1] == {}
    assert seen.logged[2]["train/restarted_codes"] >= 16, "all start from the first batch"
    for first in (0, 3):
        shares = torch.cat(seen.ids[first : first + 3]).flatten().bincount(minlength=16).double()
        shares /= shares.sum()
        told = seen.logged[first + 2]
        assert told["train/usage"] == pytest.approx((shares > 0).double().mean().item())
        assert told["train/perplexity"] == pytest.approx(torch.special.entr(shares).sum().exp().item())


def test_how_codes_are_used_is_told_over_a_resume_too(tmp_path):
    data = loader(n=4)
    whole, half, resumed = make(6), make(6), make(6)
    seen, after = Ids(whole), Ids(resumed)
    make_trainer(6, callbacks=[seen], log_every_n_steps=6).fit(whole, data)
    trainer = make_trainer(4, log_every_n_steps=6)
    trainer.fit(half, data)
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    resumer = make_trainer(6, callbacks=[after], log_every_n_steps=6)
    resumer.fit(resumed, data, ckpt_path=tmp_path / "four.ckpt", weights_only=True)
    assert after.logged[-1] == seen.logged[-1] != {}


def test_sample_picture_holds_inputs_over_reconstructions():
    module = make(1)
    batch = next(iter(loader()))
    kept = copy.deepcopy(batch)
    picture = module.sample_images(batch, max_images=3)
    assert picture.shape == (3, 2 * 16, 3 * 16)
    assert torch.equal(picture[:, :16, 16:32], batch.image[1])
    torch.testing.assert_close(picture[:, 16:, 16:32], module.export_model().decode(
        module.export_model().encode(batch.image))[1])  # fmt: skip
    assert torch.equal(batch.image, kept.image)


class FirstGradients(L.Callback):
    """Gradients and codebook after the first step: later, rounding in near-zero ones grows through AdamW."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        if trainer.global_step == 1:
            trained = (*module.model.named_parameters(prefix="model"), *critic_parameters(module))
            self.found = {name: p.grad.clone() for name, p in trained}
            self.found["codebook"] = module.model.quantizer.codebook.clone()


def critic_parameters(module: VQGANModule) -> list[tuple[str, torch.nn.Parameter]]:
    return [] if module.discriminator is None else list(module.discriminator.named_parameters(prefix="critic"))


def ddp_modules() -> list[VQGANModule]:
    return [make(6), make(6, CRITIC.model_copy(update={"start_share": 0.0}))]


def test_two_ddp_ranks_take_the_step_of_one_process_over_the_joint_batch(tmp_path):
    # Lightning starts the second rank itself, by the same command
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, timeout=180)
    for index, module in enumerate(ddp_modules()):
        first = FirstGradients()
        make_trainer(1, callbacks=[first]).fit(module, loader())
        ranks = [torch.load(tmp_path / f"{index}-{rank}.pt", weights_only=True) for rank in range(2)]
        assert states_equal(ranks[0]["first"], ranks[1]["first"])
        assert states_equal(ranks[0]["last"], ranks[1]["last"])
        for name, expected in first.found.items():
            error = (ranks[0]["first"][name] - expected).norm()
            assert error <= 1e-3 * expected.norm() + 1e-6, (index, name)


def train_one_rank(folder: Path) -> None:
    torch.set_num_threads(1)
    mine = 2 * int(os.environ.get("LOCAL_RANK", "0"))
    pictures = loader().dataset
    halves = [pictures[start + mine + i] for start in range(0, 16, 4) for i in range(2)]  # of the joint batches of 4
    for index, module in enumerate(ddp_modules()):
        strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=module.discriminator is not None)
        first = FirstGradients()
        trainer = make_trainer(6, devices=2, strategy=strategy, callbacks=[first], use_distributed_sampler=False)
        trainer.fit(module, DataLoader(halves, batch_size=2, collate_fn=_stack))
        state = {"first": first.found, "last": module.state_dict()}
        torch.save(state, folder / f"{index}-{trainer.global_rank}.pt")


if __name__ == "__main__":  # a rank of the test above
    train_one_rank(Path(sys.argv[1]))
