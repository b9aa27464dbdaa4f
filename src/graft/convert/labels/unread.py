"""Tools whose weights are not read: what they are, so that whoever has them knows the way out."""

from __future__ import annotations

from graft.convert.folder import ForeignFolder

_BY_METHOD = {
    "aqlm": "AQLM, sums of vectors from codebooks",
    "quip": "QuIP#, vectors from a codebook, rotated",
    "quip_sharp": "QuIP#, vectors from a codebook, rotated",
    "spqr": "SpQR, integers with scattered outliers",
    "vptq": "VPTQ, vectors from codebooks",
    "eetq": "EETQ, bytes laid out for a GPU's kernels",
    "quanto": "quanto",
    "fp_quant": "FP-Quant, rotated small floats",
    "higgs": "HIGGS, vectors from a codebook, rotated",
    "bitnet": "BitNet, ternary weights that its own kernels multiply",
    "quark": "AMD's Quark",
    "sinq": "SINQ, integers with scales along both sides",
    "exl2": "ExLlamaV2, integers of mixed widths",
    "exl3": "ExLlamaV3, a trellis of codes, rotated",
    "marlin": "Marlin, GPTQ laid out for a GPU's kernels",
    "metal": "Transformers' kernels for Apple's GPUs",
    "fouroversix": "Four over Six, NVFP4 with two ranges",
    "nvfp4": "Transformers' NVFP4, which is not stored",
}
_BY_TENSOR = {
    ".Qidxs": _BY_METHOD["quip"],
    ".trellis": _BY_METHOD["exl3"],
    ".q_invperm": _BY_METHOD["exl2"],
    ".codebooks": _BY_METHOD["aqlm"],
}
"""What the tensors of tools are called that say nothing in config.json."""


def unread_tool(folder: ForeignFolder) -> str | None:
    """Return in words the tool that wrote a folder which no reader takes; None for an unknown one.

    Raises GraftError when its files are damaged.
    """
    method = folder.settings.get("quant_method")
    if isinstance(method, str) and method.lower() in _BY_METHOD:
        return _BY_METHOD[method.lower()]
    if folder.settings or not any(folder.folder.glob("*.safetensors")):
        return None
    for key in folder.files():
        for ending, words in _BY_TENSOR.items():
            if key.endswith(ending):
                return words
    return None
