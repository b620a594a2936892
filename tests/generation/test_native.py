"""The compiled step against PyTorch's."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vqt2i.clip import CLIP
from vqt2i.errors import ConfigError
from vqt2i.generation.decode import Job, decode_image_ids
from vqt2i.generation.native import NativeGPT, native_clip
from vqt2i.generation.rerank import caption_scores, clip_scores
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import GPT, Sequences
from vqt2i.nn import compiler
from vqt2i.nn.cache import BranchedCache, Branches, PrefixCache
from vqt2i.text import pad_texts

PRECISIONS = ("fp32", "bf16", "int8")
# a padded text and a longer one with three images each, a third with one
GROUPS = [(pad_texts([[1, 2], [3, 4, 5]], 4), 3), (pad_texts([[]], 1), 1)]
N_ROWS = 7
SIZES = {"n_image_ids": 70, "grid_height": 4, "grid_width": 3}


@pytest.fixture
def gpt(gpt_kind: dict, make_gpt: Callable[..., GPT]) -> GPT:
    return make_gpt(**gpt_kind, **SIZES)


@pytest.fixture
def two_way_gpt(two_way_kind: dict, make_gpt: Callable[..., GPT]) -> GPT:
    return make_gpt(**two_way_kind, **SIZES)


def ids(gpt: GPT, n_rows: int = N_ROWS) -> Tensor:
    config = gpt.layout.config
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.n_image_ids, (n_rows, gpt.layout.image_length), generator=generator)


@torch.inference_mode()
def stepped(engine: GPT | NativeGPT, image_BI: Tensor, cuts: list[int], groups=GROUPS) -> Tensor:
    """The logits after every token but the last, by prefill and steps of so many tokens."""
    branches = []
    for text, n_each in groups:
        prefix = engine.layout.text_prefix(text)
        _, cache = engine.prefill(prefix)
        branches.append(Branches(cache, prefix.real_BL, n_each, engine.layout.image_length - 1))
    cache = BranchedCache(branches)
    parts = image_BI[:, : sum(cuts)].split(cuts, dim=1)
    return torch.cat([engine.step(part, cache, part.shape[1]).float() for part in parts], dim=1)


@pytest.mark.parametrize("method", ["join", "join_reversed"])
@torch.inference_mode()
def test_whole_sequences_have_the_gpts_states_in_either_order(two_way_gpt: GPT, method: str) -> None:
    text = pad_texts([[1, 2, 3, 4, 5], [5, 1, 4, 2, 3]], 5)
    sequences = getattr(two_way_gpt.layout, method)(text, ids(two_way_gpt, 2))
    torch.testing.assert_close(NativeGPT(two_way_gpt, "fp32")(sequences), two_way_gpt(sequences))


@pytest.mark.parametrize("cuts", [[1] * 11, [4, 1, 6], [11]], ids=str)
def test_fp32_logits_are_the_gpts_for_ragged_padded_shared_prefixes_whatever_the_cut(gpt: GPT, cuts) -> None:
    torch.testing.assert_close(stepped(NativeGPT(gpt, "fp32"), ids(gpt), cuts), stepped(gpt, ids(gpt), [1] * 11))


def test_only_the_scored_tokens_are_scored_and_what_is_taken_back_can_be_stepped_again(gpt: GPT) -> None:
    native, image_BI = NativeGPT(gpt, "fp32"), ids(gpt, 2)
    prefix = gpt.layout.text_prefix(pad_texts([[1, 2]], 2))
    cache = BranchedCache([Branches(native.prefill(prefix)[1], prefix.real_BL, 2, 11)])
    whole = native.step(image_BI[:, :9], cache, 9)
    for n_scored in (1, 3):
        cache.rewind(5)
        assert torch.equal(native.step(image_BI[:, 4:9], cache, n_scored), whole[:, 9 - n_scored :])
    assert cache.n_filled == 9


def rounded(rows: Tensor, precision: str) -> Tensor:
    if precision == "bf16":
        return rows.bfloat16().float()
    scale = rows.abs().amax(-1, keepdim=True).clamp_min(1e-20) / 127
    return (rows / scale).round() * scale


class RoundedLinear(nn.Module):
    """The product of a rounded matrix and rounded inputs, in PyTorch."""

    def __init__(self, weight_OI: Tensor, precision: str) -> None:
        super().__init__()
        self.weight, self.precision = nn.Parameter(rounded(weight_OI, precision)), precision

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        return rounded(x, self.precision) @ self.weight[rows].T


def rounded_twin(gpt: GPT, precision: str) -> GPT:
    """The GPT with rounded products in its steps; it reads prefixes exactly, and keeps them in bf16."""
    twin = copy.deepcopy(gpt)
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, RoundedLinear(child.weight.detach(), precision))

    def prefill(prefix: Sequences) -> tuple[Tensor, PrefixCache]:
        logits, cache = gpt.prefill(prefix)
        cache.kv = cache.kv.bfloat16().float()
        return logits, cache

    twin.prefill = prefill
    return twin


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_lower_precisions_have_the_logits_of_rounded_products_keys_and_values(gpt, precision: str, monkeypatch) -> None:
    exact, found = (stepped(model, ids(gpt), [1] * 11) for model in (gpt, NativeGPT(gpt, precision)))
    attend = Branches.attend
    monkeypatch.setattr(Branches, "attend", lambda self, layer, q, k, v, *args, **how: attend(
        self, layer, q, k.bfloat16().float(), v.bfloat16().float(), *args, **how
    ))  # fmt: skip
    expected = stepped(rounded_twin(gpt, precision), ids(gpt), [1] * 11)
    # left: where sums or the error function differ in their last bit an input may round to the number beside
    assert (found - expected).std() < 0.25 * (exact - expected).std() < 0.01 * exact.std()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_rows_logits_depend_on_no_other_row_bit_by_bit(gpt: GPT, precision: str) -> None:
    native, image_BI = NativeGPT(gpt, precision), ids(gpt)
    together = stepped(native, image_BI, [1] * 11)
    texts = [0, 0, 0, 1, 1, 1]
    for row, text in enumerate(texts):
        one = pad_texts([[[1, 2], [3, 4, 5]][text]], 4)  # padded alike: the GPT reads the prefix
        torch.testing.assert_close(stepped(native, image_BI[row : row + 1], [1] * 11, [(one, 1)])[0], together[row])
        same_text = stepped(native, image_BI[[row, 6, 6, row]], [3, 1, 7], [(one, 4)])
        assert torch.equal(same_text[0], same_text[3])
    for n_rows in range(1, 8):  # every size of tile
        some = stepped(native, image_BI[:n_rows], [1] * 11, [(pad_texts([[1, 2]], 2), n_rows)])
        assert torch.equal(some[0], stepped(native, image_BI[:1], [1] * 11, [(pad_texts([[1, 2]], 2), 1)])[0])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_number_of_threads_changes_no_bit(gpt: GPT, precision: str) -> None:
    native = NativeGPT(gpt, precision)
    prefix = gpt.layout.text_prefix(GROUPS[0][0])
    with torch.inference_mode():
        _, cache = native.prefill(prefix)
        found = []
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            try:
                branches = BranchedCache([Branches(cache, prefix.real_BL, 1, 11)])
                found.append(native.step(ids(gpt, 2)[:, :11], branches, 11))
            finally:
                torch.set_num_threads(1)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


JOBS = [Job(text, prompt, image) for prompt, text in enumerate([(1, 2, 3), (), (9, 8)]) for image in range(3)]


@pytest.mark.parametrize("sampling", [
    SamplingConfig(guidance=1.0), SamplingConfig(guidance=3.0, top_k=5), SamplingConfig(guidance=2.0, top_k=1),
    SamplingConfig(guidance=3.0, guidance_interval=(0.3, 0.8), top_p=0.9), SamplingConfig(jacobi_window=4),
], ids=str)  # fmt: skip
def test_fp32_images_are_the_gpts(gpt: GPT, sampling: SamplingConfig) -> None:
    expected = decode_image_ids(gpt, JOBS, sampling, seed=5)
    native = NativeGPT(gpt, "fp32")
    for rows in (4, 64):
        assert torch.equal(decode_image_ids(native, JOBS, sampling, seed=5, rows_at_once=rows), expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_of_the_gpt_changes(gpt: GPT, precision: str) -> None:
    before = {name: value.clone() for name, value in gpt.state_dict().items()}
    decode_image_ids(NativeGPT(gpt, precision), JOBS, SamplingConfig(), seed=5)
    assert all(torch.equal(value, before[name]) for name, value in gpt.state_dict().items())


TEXTS = [[1, 2], [], [3, 4, 5, 6, 7], [8]]


def test_fp32_captions_are_scored_as_the_gpt_scores_them(two_way_gpt: GPT) -> None:
    image_BHW = ids(two_way_gpt, 4).unflatten(1, (4, 3))
    expected = caption_scores(two_way_gpt, image_BHW, TEXTS)
    torch.testing.assert_close(caption_scores(NativeGPT(two_way_gpt, "fp32"), image_BHW, TEXTS), expected)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_captions_scored_in_lower_precisions_stay_close_and_depend_on_no_neighbour(two_way_gpt, precision) -> None:
    image_BHW, native = ids(two_way_gpt, 4).unflatten(1, (4, 3)), NativeGPT(two_way_gpt, precision)
    found, exact = (caption_scores(model, image_BHW, TEXTS) for model in (native, two_way_gpt))
    assert (found - exact).abs().max() < 0.1 and found.argsort().equal(exact.argsort())
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(caption_scores(native, image_BHW[row : row + 1], [text])[0], found[row])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_native_clip_scores_as_the_clip_does(tiny_clip: CLIP, precision: str) -> None:
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    texts = [(1, 2), (3,), (), (1, 2), (4, 5, 6)]
    before = {name: value.clone() for name, value in tiny_clip.state_dict().items()}
    expected = clip_scores(tiny_clip, images, texts)
    found = clip_scores(native_clip(tiny_clip, precision), images, texts)
    tolerance = {"fp32": 1e-5, "bf16": 0.01, "int8": 0.03}[precision]
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert all(torch.equal(value, before[name]) for name, value in tiny_clip.state_dict().items())


def test_code_for_any_cpu_gives_the_same_logits(gpt: GPT, monkeypatch, tmp_path: Path) -> None:
    found = {precision: stepped(NativeGPT(gpt, precision), ids(gpt), [1] * 11) for precision in PRECISIONS}
    monkeypatch.setattr(compiler, "FLAGS", tuple(flag for flag in compiler.FLAGS if flag != "-march=native"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler.load_library.cache_clear()
    try:
        for precision in PRECISIONS:
            portable = stepped(NativeGPT(gpt, precision), ids(gpt), [1] * 11)
            # sums that differ in their last bit may round inputs of the next product to the number beside
            share = 1e-5 if precision == "fp32" else 0.01
            assert (portable - found[precision]).std() < share * found[precision].std()
    finally:
        compiler.load_library.cache_clear()


def test_where_it_cannot_run_the_native_engine_is_refused(make_gpt, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="the model is on meta, expected cpu"):
        NativeGPT(make_gpt().to("meta"), "fp32")
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiler.load_library.cache_clear()
    try:
        with pytest.raises(ConfigError, match="no C\\+\\+ compiler found"):
            NativeGPT(make_gpt(), "fp32")
    finally:
        compiler.load_library.cache_clear()
