"""Memory, time and cost as planned, held to what is measured where a CPU can."""

import gc
import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from vqt2i.checkpoint import load_model
from vqt2i.cli import main
from vqt2i.config import load_config
from vqt2i.errors import ConfigError
from vqt2i.gpt import GPT, GPTConfig, LayoutConfig, LossWeights, gpt_loss
from vqt2i.nn.transformer import TransformerConfig
from vqt2i.text import TextBatch
from vqt2i.training.gpt_config import GPTRunConfig, TokenizerSizes
from vqt2i.training.optim import OptimizerConfig, build_optimizer
from vqt2i.training.plan import (
    GB,
    SETTINGS,
    Hardware,
    Setting,
    cost,
    count_activations,
    count_parameters,
    estimate,
    estimate_all,
    hardware_of,
    require_fits,
    setting_of,
)
from vqt2i.training.strategy import DeepSpeedConfig, deepspeed_json

ROOT = Path(__file__).parents[2]
PUBLISHED = {
    "mindalle_1_3b": 1.3e9,
    "igpt": 76e6,
    "llamagen_b": 111e6,
    "llamagen_l": 343e6,
    "llamagen_xl": 775e6,
    "llamagen_xxl": 1.4e9,
    "llamagen_3b": 3.1e9,
}
BILLIONS = {"cogview_4b": 4, "dalle_12b": 12}  # built as published, whose counts are told in words only
SHAPES = {  # width, layers, heads, MLP, text ids, image ids, text length, grid side, batch
    "base": (64, 4, 4, 176, 200, 256, 12, 8, 8),
    "wide": (256, 2, 4, 640, 200, 256, 12, 8, 4),
    "deep": (64, 12, 2, 176, 200, 256, 12, 8, 4),
    "large batch": (64, 4, 4, 176, 200, 256, 12, 8, 48),
    "large vocabulary": (64, 2, 4, 176, 3000, 8192, 12, 8, 8),
    "long": (64, 2, 4, 176, 200, 256, 40, 16, 4),
    "weights only": (256, 4, 4, 640, 2000, 4096, 4, 2, 1),
}
CHANGES = [
    {},
    {"qk_norm": False},
    {"positions": "learned"},
    {"positions": "learned", "qk_norm": False},
    {"norm": "layer", "mlp": "gelu"},
    {"norm": "scaled_layer", "mlp": "gelu_quick", "norm_placement": "sandwich"},
    {"norm_placement": "sandwich", "bias": True},
    {"pb_relax": True},
    {"pb_relax": True, "qk_norm": False, "norm": "scaled_layer", "norm_placement": "sandwich", "mlp": "gelu_tanh"},
]


def model_of(shape: str, **changes: object) -> tuple[GPTConfig, int]:
    width, n_layers, n_heads, mlp, n_text, n_image, text_length, grid, batch = SHAPES[shape]
    positions = changes.pop("positions", "rotary")
    sizes = {"width": width, "n_layers": n_layers, "n_heads": n_heads, "mlp_width": mlp} | changes
    layout = LayoutConfig(
        n_text_ids=n_text, n_image_ids=n_image, text_length=text_length, grid_height=grid, grid_width=grid
    )
    return GPTConfig(
        transformer=TransformerConfig(**sizes), layout=layout, positions=positions, text_tokenizer="t",
        image_tokenizer="i",
    ), batch  # fmt: skip


def loss_of(gpt: GPT, batch: int) -> torch.Tensor:
    layout, generator = gpt.layout, torch.Generator().manual_seed(0)
    ids_BS = torch.randint(layout.config.n_text_ids, (batch, layout.config.text_length), generator=generator)
    lengths_B = torch.randint(1, layout.config.text_length + 1, (batch,), generator=generator)
    image_BI = torch.randint(layout.config.n_image_ids, (batch, layout.image_length), generator=generator)
    return gpt_loss(gpt, TextBatch(ids_BS, lengths_B), image_BI, batch // 4, LossWeights()).total


def measured_peak(config: GPTConfig, batch: int, *, bf16: bool = False, checkpointed: bool = False) -> int:
    """Bytes that PyTorch's allocator had given out at most, over two steps in the order of Lightning's."""
    gc.collect()  # what other tests left would be let go in between, and counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        gpt = GPT(config)
        if checkpointed:
            for block in gpt.transformer.blocks:
                block.forward = _checkpointed(block.forward)
        optimizer = build_optimizer(gpt, OptimizerConfig())
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = loss_of(gpt, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    # the allocator's own running total before and after each allocation
    totals, nodes = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.tag.name == "Allocation":
            after = node.extra_fields.total_allocated
            totals += [after, after - node.extra_fields.alloc_size]
    return max(totals) - min(totals)


def _checkpointed(forward):
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


def kept_bytes(gpt: GPT, batch: int, *, bf16: bool = False) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass, weights left out, each memory counted once."""
    own = {p.untyped_storage().data_ptr() for p in gpt.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # held, so that no later tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss_of(gpt, batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("bf16", "checkpointed"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_planned_peak_of_a_step_is_within_15_percent_of_the_measured(
    shape: str, bf16: bool, checkpointed: bool
) -> None:
    config, batch = model_of(shape)
    measured = measured_peak(config, batch, bf16=bf16, checkpointed=checkpointed)
    hardware = Hardware(1, 80 * GB, device="cpu")
    setting, precision = Setting(activation_checkpointing=checkpointed), "bf16" if bf16 else "fp32"
    predicted = estimate(config, setting, hardware, batch_per_gpu=batch, precision=precision).total
    # a row of the table in docs/scale.md
    step = f"{precision}, checkpointing" if checkpointed else precision
    print(f"| {shape} | {count_parameters(config).total:,} | {batch} | {step} | {measured / 1e6:.1f} | "
          f"{predicted / 1e6:.1f} | {predicted / measured - 1:+.1%} |")  # fmt: skip
    assert predicted == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("step", ["fp32", "autocast", "bf16 weights"])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_what_a_block_keeps_for_the_backward_pass_is_counted_within_2_percent(changes: dict, step: str) -> None:
    kept, autocast = [], step == "autocast"
    for n_layers in (1, 2):
        config, batch = model_of("base", n_layers=n_layers, **changes)
        gpt = GPT(config).to(torch.bfloat16 if step == "bf16 weights" else torch.float32)
        kept.append(kept_bytes(gpt, batch, bf16=autocast))
    counted = count_activations(config, "fp32" if step == "fp32" else "bf16", autocast=autocast, device="cpu").block
    # autocast's copies of the weights are kept too, and counted with the model states
    copies = 2 * sum(p.numel() for p in gpt.transformer.blocks[0].parameters() if p.ndim == 2) if autocast else 0
    assert batch * counted + copies == pytest.approx(kept[1] - kept[0], rel=0.02)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_has_its_parameters_within_1_percent(name: str) -> None:
    config = load_config(GPTRunConfig, ROOT / "configs" / "gpt" / f"{name}.yaml")
    assert count_parameters(config.model(config.sizes, "t", "i")).total == pytest.approx(PUBLISHED[name], rel=0.01)


@pytest.mark.parametrize("name", BILLIONS)
def test_a_system_built_as_published_has_the_billions_that_are_told(name: str) -> None:
    config = load_config(GPTRunConfig, ROOT / "configs" / "gpt" / f"{name}.yaml")
    assert round(count_parameters(config.model(config.sizes, "t", "i")).total / 1e9) == BILLIONS[name]


@pytest.mark.parametrize("n_gpus", [8, 64])
def test_model_states_are_deepspeeds_own_estimates(n_gpus: int) -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    config, batch = model_of("wide")
    size, nodes = count_parameters(config), n_gpus // 8
    states = {
        s: estimate(config, s, Hardware(n_gpus, 80 * GB), batch_per_gpu=batch, precision="bf16").states
        for s in SETTINGS
    }
    assert states[Setting(2)] == zero2(size.total, 8, nodes, cpu_offload=False)[1]
    assert states[Setting(2, "optimizer")] == zero2(size.total, 8, nodes, cpu_offload=True)[1]
    for offload in ("none", "optimizer", "parameters"):
        optimizer, weights = offload != "none", offload == "parameters"
        expected = zero3(size.total, size.largest, 8, nodes, cpu_offload=optimizer, cpu_offload_params=weights)[1]
        assert states[Setting(3, offload)] == expected
    # weights and gradients whole, master weights and moments sharded
    assert states[Setting(1)] == pytest.approx(4 * size.total + 16 * size.total / n_gpus, abs=2)


def test_zero_in_fp32_holds_20_bytes_per_parameter_too() -> None:
    config, _ = model_of("wide")
    total = count_parameters(config).total
    for stage, whole in ((1, 8), (2, 4)):
        found = estimate(config, Setting(stage), Hardware(8, 80 * GB), batch_per_gpu=1, precision="fp32").states
        assert found == pytest.approx(whole * total + (20 - whole) * total / 8, abs=4)


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    config, _ = model_of("base")
    hardware = Hardware(8, 10 * GB)
    for planned in estimate_all(config, hardware, batch_per_gpu=1, precision="bf16"):
        for batch, fits in ((planned.largest_batch, True), (planned.largest_batch + 1, False)):
            again = estimate(config, planned.setting, hardware, batch_per_gpu=batch, precision="bf16")
            assert again.fits is fits and again.largest_batch == planned.largest_batch


def cogview() -> GPTConfig:
    config = load_config(GPTRunConfig, ROOT / "configs" / "gpt" / "cogview_4b.yaml")
    return config.model(config.sizes, "t", "i")


def test_what_cannot_fit_is_refused_and_what_would_is_named() -> None:
    hardware = Hardware(8, 80 * GB)
    require_fits(cogview(), Setting(2, activation_checkpointing=True), hardware, batch_per_gpu=8, precision="bf16")
    with pytest.raises(ConfigError, match=r"no ZeRO needs .* GB .* what fits: ZeRO 1") as told:
        require_fits(cogview(), Setting(), hardware, batch_per_gpu=1, precision="bf16")
    assert "4,0" in str(told.value) and "72.0 of its 80.0 GB" in str(told.value)
    with pytest.raises(ConfigError, match=r"fits: \d+ samples per device"):
        require_fits(cogview(), Setting(2), hardware, batch_per_gpu=768, precision="bf16")
    with pytest.raises(ConfigError, match=r"fits: ZeRO 1 with \d+ samples per device"):
        require_fits(cogview(), Setting(), hardware, batch_per_gpu=768, precision="bf16")
    with pytest.raises(ConfigError, match="more or larger devices, or a smaller model"):
        require_fits(cogview(), Setting(), Hardware(1, GB), batch_per_gpu=8, precision="bf16")


def test_a_setting_is_read_from_deepspeeds_json() -> None:
    assert setting_of(None, activation_checkpointing=True) == Setting(activation_checkpointing=True)
    assert setting_of(deepspeed_json(DeepSpeedConfig(zero_stage=1), 4), activation_checkpointing=False) == Setting(1)
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    whole = zero | {"offload_param": {"device": "nvme"}}
    for offloaded, expected in ((zero, Setting(3, "optimizer")), (whole, Setting(3, "parameters"))):
        assert setting_of({"zero_optimization": offloaded}, activation_checkpointing=False) == expected


def test_cpu_ranks_share_the_memory_of_the_machine() -> None:
    one, two = (hardware_of(torch.device("cpu"), n) for n in (1, 2))
    assert one.memory // 2 == two.memory > 0 and two.n_nodes == 1


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_small_trainings_fit_this_machine(stage: int) -> None:
    config, batch = model_of("base")
    machine = hardware_of(torch.device("cpu"), 2)
    require_fits(config, Setting(stage), machine, batch_per_gpu=batch, precision="fp32")
    assert estimate(config, Setting(stage), machine, batch_per_gpu=batch, precision="fp32").total < 0.1 * GB


def test_time_follows_from_the_rate_and_gpu_hours_from_the_time() -> None:
    options = {"peak_tflops": 100.0, "mfu": 0.5, "activation_checkpointing": False}
    config, _ = model_of("base")
    given = cost(config, 4, 72_000, tokens_per_second=10.0, **options)
    assert (given.seconds, given.gpu_hours) == (7200, 8)
    assumed = cost(config, 4, 72_000, tokens_per_second=None, **options)
    assert assumed.seconds == pytest.approx(assumed.flops / (4 * 50e12))
    twice = cost(config, 4, 72_000, tokens_per_second=None, **options | {"activation_checkpointing": True})
    assert twice.seconds == pytest.approx(assumed.seconds * 4 / 3) and twice.flops == assumed.flops


def test_sizes_that_the_tokenizers_do_not_have_are_refused() -> None:
    sizes = TokenizerSizes(n_text_ids=10, n_image_ids=6, grid_height=2, grid_width=2)
    config = GPTRunConfig(sizes=sizes)
    assert config.model(sizes, "t", "i").layout.text_length == config.text_length
    with pytest.raises(ConfigError, match=r"n_text_ids=10.*n_text_ids=11"):
        config.model(sizes.model_copy(update={"n_text_ids": 11}), "t", "i")


def test_the_tool_plans_a_published_size_without_its_tokenizers(
    in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "configs" / "gpt" / "cogview_4b.yaml"
    options = ["--gpus", "64", "--batch-per-gpu", "8", "--tokens", "1e12", "--price", "2", "--out", "plan.json"]
    assert main(["plan", "--config", str(path), *options]) == 0
    told, plan = capsys.readouterr().out, json.loads(Path("plan.json").read_text())
    assert f"{plan['parameters']:,} parameters" in told and f"smallest setting that fits: {plan['chosen']}" in told
    assert plan["accumulated"] == 12 and plan["cost"]["tokens"] == 1e12
    assert plan["cost"]["price"] == pytest.approx(2 * plan["cost"]["gpu_hours"])
    assert [e["name"] for e in plan["estimates"]] == list(map(str, SETTINGS))
    assert next(e["name"] for e in plan["estimates"] if e["fits"]) == plan["chosen"]


def test_the_tool_says_what_fits_fewer_samples(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "configs" / "gpt" / "cogview_4b.yaml"
    assert main(["plan", "--config", str(path), "--gpus", "8"]) == 0
    assert "fits: none; ZeRO 1 fits 4 samples at once" in capsys.readouterr().out


def test_the_tool_takes_the_sizes_of_tokenizers_on_disk(
    model_folders: Path, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = load_model(model_folders / "gpt", GPTConfig, GPT)
    settings = [
        f"text_tokenizer={model_folders / 'text'}", f"image_tokenizer={model_folders / 'vq'}", "text_length=12",
        "transformer={width: 32, n_layers: 2, n_heads: 2, mlp_width: 48}",
    ]  # fmt: skip
    assert main(["plan", *(part for value in settings for part in ("--set", value))]) == 0
    assert f"{sum(p.numel() for p in trained.parameters()):,} parameters" in capsys.readouterr().out


def test_a_batch_that_the_gpus_cannot_share_is_told(fails, in_empty_folder: Path) -> None:
    path = ROOT / "configs" / "gpt" / "llamagen_b.yaml"
    assert "batch_size 256" in fails("plan", "--config", path, "--gpus", "3")
    assert "3 samples at once" in fails("plan", "--config", path, "--gpus", "8", "--batch-per-gpu", "3")
    assert "nodes of 8" in fails("plan", "--config", path, "--gpus", "12")
    assert "positive int" in fails("plan", "--config", path, "--gpus", "0")
