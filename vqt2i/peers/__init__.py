"""Public checkpoints, opened: one importer per family, by the name that a user gives."""

from vqt2i.peers.clip import CLIPFamily
from vqt2i.peers.clipgen import ClipGenCLIP, ClipGenGPT, ClipGenVQ
from vqt2i.peers.cogview import CogViewCaption, CogViewGPT, CogViewSR, CogViewVQ
from vqt2i.peers.family import Compared, Family, Options
from vqt2i.peers.llamagen import LlamaGenC2I, LlamaGenT2I, LlamaGenVQ
from vqt2i.peers.mindalle import MinDalleGPT, MinDalleVQ
from vqt2i.peers.rudalle import RuDalleGPT
from vqt2i.peers.taming import TamingGumbel, TamingVQGAN

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        TamingVQGAN(),
        TamingGumbel(),
        LlamaGenVQ(),
        LlamaGenC2I(),
        LlamaGenT2I(),
        CLIPFamily(),
        MinDalleVQ(),
        MinDalleGPT(),
        RuDalleGPT(),
        CogViewVQ(),
        CogViewGPT(),
        CogViewCaption(),
        CogViewSR(),
        ClipGenCLIP(),
        ClipGenVQ(),
        ClipGenGPT(),
    )
}

__all__ = ["FAMILIES", "Compared", "Family", "Options"]
