"""Every family that Transformers has a causal language model for, tiny and random, through graft.

    python benchmarks/families.py                      # all of them, a minute or two
    python benchmarks/families.py mamba falcon_h1      # only these, each with what was said of it
    python benchmarks/families.py --dtype bfloat16

Each is written by Transformers and loaded by graft: all buffers and the logits are compared with
`from_pretrained`, the folder that graft writes is read back by it, the layers that graft adapts
get gradients, and what is refused is refused by name. The exit status is 1 where one of these
does not hold. The table names the families by outcome.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from _common import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

sys.path.insert(0, str(ROOT / "tests" / "model"))

from every_family import EVERY_FAMILY, PARAMETERS, tiny_config, write_tiny  # noqa: E402

from graft.adapters.attach import adapter_parameters, attach_adapter  # noqa: E402
from graft.adapters.config import AdapterConfig  # noqa: E402
from graft.errors import GraftError  # noqa: E402
from graft.model.left_out import left_out  # noqa: E402
from graft.model.load import load_model  # noqa: E402
from graft.model.save import save_model  # noqa: E402
from graft.model.targets import freeze_layers, select_targets  # noqa: E402

TOKENS = torch.randint(3, 300, (1, 12), generator=torch.Generator().manual_seed(1))
EQUAL = "equal: buffers and logits bit for bit, and the folder that graft writes"
STILL = "equal likewise; some layers get no gradient from text, which training says in step 1"
UNTOLD = "not comparable: Transformers' own model does not run in this tiny form"
UNBUILT = "not built: no tiny form of it is known here"
REFUSED = "refused by name"
WRONG = "wrong"


@dataclass(frozen=True)
class Outcome:
    """What became of a family."""

    kind: str
    said: str = ""


def main() -> int:
    """Print the table; the exit status is 1 when a family is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", default=EVERY_FAMILY)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    outcomes: dict[str, list[str]] = defaultdict(list)
    told = len(arguments.families) < len(EVERY_FAMILY)
    with tempfile.TemporaryDirectory(prefix="graft-families-") as temporary:
        tokenizer = Path(temporary) / "tokenizer"
        write_tokenizer(tokenizer)
        for family in arguments.families:
            outcome = outcome_of(family, Path(temporary) / family, tokenizer, arguments.dtype)
            outcomes[outcome.kind].append(family)
            if outcome.said and (told or outcome.kind == WRONG):
                print(f"{family}: {outcome.said}", flush=True)
    print("| outcome | families | which |\n|---|---|---|")
    for kind in (EQUAL, STILL, REFUSED, UNTOLD, UNBUILT, WRONG):
        print(f"| {kind} | {len(outcomes[kind])} | {', '.join(outcomes[kind])} |")
    return 1 if outcomes[WRONG] else 0


def outcome_of(family: str, folder: Path, tokenizer: Path, dtype: str) -> Outcome:
    """Build a family, and say what graft makes of it."""
    try:
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(tiny_config(family)).num_parameters()
        if size > PARAMETERS:
            return Outcome(UNBUILT, f"{size:,} parameters")
        write_tiny(family, folder, tokenizer)
    except Exception as error:  # whatever a family's code says of a size that it does not take
        return Outcome(UNBUILT, f"{type(error).__name__}: {error}"[:200])
    try:
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        theirs = logits(expected)
    except Exception as error:
        expected, theirs = None, torch.zeros(0)
        reason = f"{type(error).__name__}: {error}"[:200]
    try:
        found = compared(folder, dtype, expected, theirs)
    except GraftError as error:
        return Outcome(REFUSED, str(error))
    except Exception as error:
        return Outcome(WRONG, f"{type(error).__name__}: {error}"[:300])
    return Outcome(UNTOLD, reason) if expected is None and found.kind == EQUAL else found


def compared(
    folder: Path, dtype: str, expected: PreTrainedModel | None, theirs: torch.Tensor
) -> Outcome:
    """Load a folder by graft and compare it with Transformers' model; raises GraftError."""
    loaded = load_model(str(folder), dtype=dtype, device="cpu")
    model = loaded.model
    if expected is None:
        return Outcome(EQUAL)
    own, buffers = dict(model.named_buffers()), dict(expected.named_buffers())
    other = sorted(own.keys() ^ buffers.keys())
    other += [name for name in own if name in buffers and not same(own[name], buffers[name])]
    if other:
        return Outcome(WRONG, f"buffers differ: {other[:3]}")
    ours = logits(model)
    if not torch.equal(ours, theirs):
        return Outcome(WRONG, f"logits differ by {(ours - theirs).abs().max().item():.3g}")
    save_model(loaded, folder / "saved")
    saved = AutoModelForCausalLM.from_pretrained(folder / "saved", dtype=getattr(torch, dtype))
    again = (logits(saved.eval()) - ours).abs().max().item()
    if again > 1e-6 * max(1.0, ours.abs().max().item()):
        return Outcome(WRONG, f"what graft writes differs by {again:.3g}")
    names = select_targets(model, ())
    rest = left_out(model, names, "adapts")
    freeze_layers(model, names)
    attach_adapter(model, names, AdapterConfig(method="lora", rank=2))
    adapters = adapter_parameters(model, "default")
    for parameter in adapters.values():
        parameter.requires_grad_(True)
    model.train()
    model(input_ids=TOKENS, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    missing = [name for name, parameter in adapters.items() if parameter.grad is None]
    return (
        Outcome(STILL, f"no gradient: {missing}"[:300]) if missing else Outcome(EQUAL, rest or "")
    )


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors agree in dtype, shape and every bit of their values."""
    return one.dtype == other.dtype and torch.equal(one, other)


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits of the tokens."""
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits.float()


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single bytes, as no text is tokenised here."""
    words = {letter: number for number, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
