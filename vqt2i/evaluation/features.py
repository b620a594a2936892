"""How far apart two sets of pictures are, through torch-fidelity: FID, KID, IS, precision and recall.

Two extractors of features: Inception with torch-fidelity's own weights, from a local file, whose distances are those
that papers tell; and the image tower of a CLIP, which needs no file that we do not have. The latter's distances are
called after it: they are no FID, and comparable by the same CLIP only.

N pictures, B of them at once, E width of features, C classes
"""

import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from vqt2i.checkpoint import load_model
from vqt2i.clip import CLIP, CLIPConfig, embed_images
from vqt2i.data.images import to_tensor
from vqt2i.errors import CheckpointError, DataError
from vqt2i.evaluation.statistics import Estimate, estimate_by_halves
from vqt2i.files import sha256_of_file

CLIP_TOWER = "vqt2i-clip-image-tower"  # what it is called in torch-fidelity's registry
LEAST = 20  # pictures: ten splits of IS, each of two at least
_SUBSETS, _SUBSET_SIZE = 100, 1000  # of KID: torch-fidelity's own
_SEED = 2020  # torch-fidelity's own
_NEIGHBOURS = 3  # of precision and recall: torch-fidelity's own


class ClipTower(FeatureExtractorBase):
    """The image tower of a CLIP for torch-fidelity: its unit vectors, of uint8 images (B, 3, H, W)."""

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        clip: CLIP | None = None,
        **_: object,
    ) -> None:
        """feature_extractor_weights_path: the scorer's folder, where `clip` is not given."""
        super().__init__(name, features_list)
        self.clip = clip or load_model(Path(feature_extractor_weights_path), CLIPConfig, CLIP)

    def forward(self, image_B3HW: Tensor) -> tuple[Tensor]:
        return (embed_images(self.clip, to_tensor(image_B3HW.movedim(1, -1))),)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("embedding",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The same for all but IS, which needs classes."""
        if metric == "isc":
            raise ValueError("a CLIP's image tower knows no classes, so that there is no inception score by it")
        return "embedding"

    @staticmethod
    def can_be_compiled() -> bool:
        return False


def register_clip_tower() -> None:
    """Let torch-fidelity find `ClipTower` by its name, CLIP_TOWER, with a scorer's folder as weights path."""
    if CLIP_TOWER not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(CLIP_TOWER, ClipTower)


class Features(NamedTuple):
    """features_NE: of each picture, fp32 on the CPU. logits_NC: of Inception's classes; None of a CLIP."""

    features_NE: Tensor
    logits_NC: Tensor | None

    @classmethod
    def joined(cls, parts: Sequence["Features"]) -> "Features":
        """All of the parts' pictures."""
        features, logits = zip(*parts, strict=True)
        return cls(torch.cat(features), None if logits[0] is None else torch.cat(logits))

    def of(self, indices: np.ndarray) -> "Features":
        """Those of some pictures."""
        return Features(self.features_NE[indices], None if self.logits_NC is None else self.logits_NC[indices])


@dataclass(frozen=True, eq=False)
class Extractor:
    """module: torch-fidelity's. prefix: what its distances are called by. fingerprint: of its weights."""

    module: FeatureExtractorBase
    prefix: str
    fingerprint: str

    @classmethod
    def inception(cls, weights: Path, device: str) -> "Extractor":
        """Inception v3 with torch-fidelity's weights from a local file.

        Raises:
            CheckpointError: no such file, or other weights.
        """
        hint = f"expected torch-fidelity's Inception ({URL_INCEPTION_V3}) as a local file; nothing is downloaded"
        try:
            # torch-fidelity would run what a pickle says: a file that passes this holds tensors only
            torch.load(weights, map_location="meta", weights_only=True)
            module = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
            )
        except FileNotFoundError:
            raise CheckpointError(f"{weights}: no such file; {hint}") from None
        except (OSError, EOFError, RuntimeError, TypeError, ValueError, AttributeError, pickle.UnpicklingError,
                zipfile.BadZipFile) as error:  # fmt: skip
            raise CheckpointError(f"{weights}: cannot be loaded ({str(error).splitlines()[0]}); {hint}") from None
        return cls(module.to(device), "", sha256_of_file(weights))

    @classmethod
    def clip_tower(cls, clip: CLIP) -> "Extractor":
        return cls(ClipTower(CLIP_TOWER, ["embedding"], clip=clip), "clip_", clip.fingerprint)

    @property
    def protocol(self) -> dict[str, str]:
        return {"extractor": self.module.get_name(), "weights": self.fingerprint}

    @torch.inference_mode()
    def __call__(self, image_BHW3: np.ndarray) -> Features:
        """Features of uint8 pictures (B, H, W, 3)."""
        device = next(self.module.parameters()).device
        found = self.module(torch.from_numpy(image_BHW3).movedim(-1, 1).contiguous().to(device))
        features_BE, *logits = (values.float().cpu() for values in found)
        return Features(features_BE, logits[0] if logits else None)


def distances(drawn: Features, real: Features, prefix: str, *, n_subsets: int = _SUBSETS) -> dict[str, float]:
    """By name: `fid`, `kid`, `precision`, `recall` and, of Inception, `inception_score`, each after the prefix.

    As torch-fidelity has them, precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991) too on these features.
    """
    statistics = (fid_features_to_statistics(features.features_NE) for features in (drawn, real))
    values = {"fid": fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]}
    return _named(values | _other_distances(drawn, real, n_subsets), prefix)


def estimate_distances(drawn: Features, real: Features, prefix: str, *, paired: bool = False) -> dict[str, Estimate]:
    """`distances` with intervals. paired: picture i of both belongs together.

    Raises:
        DataError: fewer than LEAST pictures.
    """
    counts = len(drawn.features_NE), len(real.features_NE)
    if min(counts) < LEAST:
        raise DataError(f"distances between {counts[0]} and {counts[1]} pictures: expected {LEAST} or more of each")

    def of_halves(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
        a, b = drawn.of(first), real.of(second)
        values = {"fid": frechet_distance(a.features_NE, b.features_NE)} | _other_distances(a, b, _SUBSETS // 10)
        return _named(values, prefix)

    found = estimate_by_halves(distances(drawn, real, prefix), of_halves, *counts, paired=paired)
    shares = {name: e for name, e in found.items() if name.endswith(("precision", "recall"))}
    return found | {name: e._replace(low=max(0.0, e.low), high=min(1.0, e.high)) for name, e in shares.items()}


def frechet_distance(first_NE: Tensor, second_NE: Tensor) -> float:
    """The Fréchet distance as torch-fidelity has it, by singular values.

    The trace of the root of two covariances' product is the sum of the singular values of X Yᵀ, for X and Y with
    Xᵀ X and Yᵀ Y the covariances: of fewer pictures than features far less work than eigenvalues of that product.
    """
    roots, means = [], []
    for x_NE in (first_NE.double(), second_NE.double()):
        means.append(x_NE.mean(0))
        root = (x_NE - means[-1]) / (len(x_NE) - 1) ** 0.5
        roots.append(root if len(root) <= root.shape[1] else torch.linalg.qr(root, mode="r").R)
    a, b = roots
    traces = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    return float((means[0] - means[1]).square().sum() + traces)


def _other_distances(drawn: Features, real: Features, n_subsets: int) -> dict[str, float]:
    a, b = drawn.features_NE, real.features_NE
    size = min(_SUBSET_SIZE, len(a), len(b))
    kid = kid_features_to_metric(a, b, kid_subsets=n_subsets, kid_subset_size=size, rng_seed=_SEED, verbose=False)
    near = prc_features_to_metric(a, b, prc_neighborhood=_NEIGHBOURS, verbose=False)
    values = {"kid": kid["kernel_inception_distance_mean"], "precision": near["precision"], "recall": near["recall"]}
    if drawn.logits_NC is not None:
        score = isc_features_to_metric(drawn.logits_NC, splits=10, shuffle=True, rng_seed=_SEED)
        values["inception_score"] = score["inception_score_mean"]
    return values


def _named(values: dict[str, float], prefix: str) -> dict[str, float]:
    names = {"fid": "frechet_distance", "kid": "kernel_distance"} if prefix else {}
    return {f"{prefix}{names.get(name, name)}": value for name, value in values.items()}
