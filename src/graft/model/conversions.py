"""Weight files whose tensors Transformers renames, stacks or cuts while it loads them.

A family's files keep the names of those who published it (one tensor for each expert, say), and
its modules may hold other ones. graft reads tensors as the modules have them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from graft.errors import GraftError
from graft.model.internals import converted_patterns
from graft.text import quoted


def check_names(
    model: PreTrainedModel, missing: Sequence[str], names: Iterable[str], folder: Path
) -> None:
    """Raise GraftError when tensors are missing because Transformers would make them of others.

    missing: tensors of the model that no file holds. names: those that the files hold.
    """
    if not missing:
        return
    patterns = [re.compile(pattern) for pattern in converted_patterns(model)]
    found = [name for name in names if any(pattern.search(name) for pattern in patterns)]
    if found:
        raise GraftError(
            f"{folder} holds its weights as they were published: {len(found):,} tensors such as "
            f"{quoted(found[0])}, of which Transformers makes others while it loads them, and "
            f"graft does not yet ({len(missing):,} are missing, such as {missing[0]})\n"
            "write them in the form that is read, once, with Transformers: AutoModelForCausalLM"
            f".from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER, "
            "save_original_format=False), and copy the tokenizer's files"
        )
