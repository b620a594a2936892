"""How many images fit in memory together: calculated from the models, checked by what the first batch takes.

Bytes are those of the tensors that are alive at once, beside the weights. B batch, P prefix, I image ids, K keys,
V vocabulary
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqt2i.clip import CLIP
from vqt2i.errors import ResourceError
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import GPT
from vqt2i.nn.transformer import TransformerConfig
from vqt2i.runtime import free_memory, measured_peak, say
from vqt2i.vq import AnyImageTokenizer, PaletteTokenizer

ROWS_AT_ONCE = 64  # images decoded together at the most: more take as long for each
FINISHED_AT_ONCE = 16  # candidates of a prompt that become pictures and are scored together
SHARE = 0.8  # of the free memory: the rest is for fragments, kernels' own buffers and other programs
FIRST_SHARE = 0.25  # of that for the first batch, which tells whether the calculation holds
FP32 = 4


class Needs(NamedTuple):
    """Bytes of a piece of work: whatever the batch, and for each image of it."""

    fixed: int
    per_image: int

    def of(self, n_images: int) -> int:
        return self.fixed + n_images * self.per_image

    def most(self, room: int) -> int:
        """How many images `room` bytes are enough for."""
        return (room - self.fixed) // self.per_image


def decoding_needs(
    gpt: GPT, sampling: SamplingConfig, count: int, text_length: int | None = None, *, mixed: bool = False
) -> Needs:
    """Of decoding images, `count` of each text: keys and values of all branches, and the largest step.

    Args:
        text_length: of the longest text; None is the longest that the model can read.
        mixed: whether a second text is mixed into each.
    """
    config, layout = gpt.config.transformer, gpt.layout.config
    element = gpt.embedding.weight.element_size()
    kept = FP32 if gpt.device.type == "cpu" else element  # as in Branches
    n = gpt.layout.image_length
    prefix = gpt.layout.prefix_length if text_length is None or layout.padding != "masked" else 3 + text_length
    guided = sampling.guided_tokens(n)
    branches = 1 + bool(guided) + mixed
    position = 2 * config.n_layers * config.width * kept

    reading = prefix * _activations(config, element) + prefix**2  # with its mask
    # scores of the keys in two parts, joined, and their softmax; then the logits of this step beside those of the last
    attending = 3 * config.n_heads * (prefix + n) * FP32
    stepping = branches * (max(attending, _activations(config, element)) + 2 * layout.n_image_ids * FP32)
    picking = (branches + 6) * layout.n_image_ids * FP32
    catching_up = 0
    if guided and guided.start > 0:  # the null rows read all tokens so far at once
        scores = 3 * config.n_heads * (prefix + guided.start) * FP32
        catching_up = guided.start * max(scores + 5 * config.width * element, _activations(config, element))
        catching_up += branches * layout.n_image_ids * FP32  # the others' logits wait meanwhile

    added = branches * (n - 1)
    if guided and layout.null_condition == "image_first":  # the rows for guidance go on to the text
        added += gpt.layout.length - 2 - (n - 1)
    of_image = added * position + prefix * position // count + 3 * n * 8  # ids and random numbers
    # a batch may begin and end within a prompt's candidates; the null condition has a prefix too
    fixed = branches * prefix * position + reading
    return Needs(fixed, of_image + max(stepping, picking, catching_up, reading // count))


def finishing_needs(vq: AnyImageTokenizer, gpt: GPT, clip: CLIP | None, captioned: bool) -> Needs:
    """Of turning ids into pictures and scoring these with `clip`, and by the caption score where `captioned`."""
    layout = gpt.layout
    height, width = layout.config.grid_height, layout.config.grid_width // vq.config.ids_per_cell
    picture = 3 * FP32 * height * width * vq.config.downsample**2
    steps = [_decoder_needs(vq, height, width)]
    if clip is not None:
        vision, text = clip.config.vision, clip.config.text
        element = next(clip.parameters()).element_size()
        pixels = 3 * 3 * FP32 * clip.config.image_size_px**2  # as drawn, as read, in patches
        per_image = pixels + len(clip.patch_positions) * _activations(vision, element)
        steps.append(Needs((clip.config.text_length + 1) * _activations(text, element), per_image))
    if captioned:
        element = gpt.embedding.weight.element_size()
        logits = 3 * (layout.config.text_length + 1) * layout.config.n_text_ids * FP32
        reading = layout.length * _activations(gpt.config.transformer, element) + layout.length**2
        steps.append(Needs(0, max(reading, logits)))
    return Needs(max(step.fixed for step in steps), picture + max(step.per_image for step in steps))


def _activations(config: TransformerConfig, element: int) -> int:
    """Bytes of a position in a block at its largest: the stream, its norm, and either attention or MLP."""
    return element * (3 * config.width + max(6 * config.width, 4 * config.mlp_width))


def _decoder_needs(vq: AnyImageTokenizer, height: int, width: int) -> Needs:
    """By running the decoder without data, for one image and for two."""
    if isinstance(vq, PaletteTokenizer):
        return Needs(0, (3 + 3 * FP32) * height * width)  # 8-bit colours, and these as numbers
    element = next(vq.decoder.parameters()).element_size()
    one, two = (
        tracked_peak(_on_meta(vq.decoder), torch.empty(
            n, vq.config.latent_width, height, width, device="meta", dtype=next(vq.decoder.parameters()).dtype
        )) + n * element * vq.config.latent_width * height * width
        for n in (1, 2)
    )  # fmt: skip
    return Needs(2 * one - two, two - one)


def _on_meta(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module without the values of its weights: computes shapes only, on the device "meta"."""
    tensors = {name: tensor.to("meta") for name, tensor in module.state_dict(keep_vars=True).items()}
    return lambda x: functional_call(module, tensors, (x,))


@torch.inference_mode()
def tracked_peak(work: Callable[..., Any], *arguments: Any) -> int:
    """Bytes of the tensors that `work` makes, at the most of those alive at once."""
    with _LiveBytes() as tracked:
        work(*arguments)
    return tracked.peak


class _LiveBytes(TorchDispatchMode):
    """Follows every storage that an operation makes, from its result until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in given and key not in self._known:  # not a view of what was there
                    self._known.add(key)
                    self.live += size
                    weakref.finalize(storage, self._freed, key, size)
        self.peak = max(self.peak, self.live)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class Budget:
    """How many images of a job are decoded, and how many finished, together on a device.

    Attributes:
        rows, finished: these numbers for the next batch.
    """

    def __init__(self, device: torch.device, decoding: Needs, finishing: Needs, room: int) -> None:
        """room: bytes that may be taken beside the weights that stay on the device.

        Raises:
            ResourceError: not even one image fits.
        """
        self._device, self._decoding, self._room = device, decoding, room
        needed = max(decoding.of(1), finishing.of(1))
        if needed > room:
            raise ResourceError(f"an image needs {gigabytes(needed)} beside the weights, {gigabytes(room)} are free "
                                f"on {device}; free some, allow more (--memory), move idle parts away (--offload "
                                "always), or draw on another device")  # fmt: skip
        self.finished = min(FINISHED_AT_ONCE, finishing.most(room))
        self._most = min(ROWS_AT_ONCE, decoding.most(room))
        self.rows = max(1, min(self._most, decoding.most(int(FIRST_SHARE * room))))
        self._checked = False

    def watch(self, n_images: int, decode: Callable[[], Tensor]) -> Tensor:
        """What `decode` gives of a batch of so many images; the first one's peak corrects what was calculated."""
        if self._checked:
            return decode()
        result, peak = measured_peak(self._device, decode)
        self._checked = True
        per_image = max(self._decoding.per_image, ((peak or 0) - self._decoding.fixed) // n_images)
        self.rows = max(1, min(self._most, self._decoding._replace(per_image=per_image).most(self._room)))
        return result

    def ran_out(self, n_images: int) -> None:
        """Go on with half of the number of images for which the device's memory was not enough.

        Raises:
            ResourceError: it was one.
        """
        self._most = self.rows = self._half(n_images)

    def ran_out_finishing(self, n_images: int) -> None:
        """As `ran_out`, for turning ids into pictures and scoring these."""
        self.finished = self._half(n_images)

    def _half(self, n_images: int) -> int:
        if n_images == 1:
            raise ResourceError(f"{self._device} has too little memory for one image; free some, move idle parts away "
                                "(--offload always), or draw on another device")  # fmt: skip
        say(f"{self._device} has too little memory for {n_images} images at once; going on with {n_images // 2}")
        return n_images // 2


def room_on(device: torch.device, weights: int, limit: int | None) -> int:
    """Bytes that may be taken on a device beside `weights` bytes that lie there, under a limit for both."""
    room = int(SHARE * free_memory(device))
    return room if limit is None else min(room, limit - weights)


def memory_share(n_processes: int) -> float:
    """GB for each of the processes that compute on this machine's CPU."""
    return SHARE * free_memory(torch.device("cpu")) / n_processes / 1e9


def weight_bytes(*modules: nn.Module | None) -> int:
    """Of all parameters and buffers."""
    tensors = (t for m in modules if m is not None for t in (*m.parameters(), *m.buffers()))
    return sum(tensor.nbytes for tensor in tensors)


def gigabytes(n_bytes: int) -> str:
    return f"{max(0, n_bytes) / 1e9:,.2f} GB"
