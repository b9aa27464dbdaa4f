"""What the training benchmark measures, and the ratios that it must reach."""

from __future__ import annotations

from dataclasses import dataclass, replace

WHO = (
    *("peft-lora", "peft-qlora", "graft-lora", "graft-qlora", "graft-qalora", "graft-affine"),
    *("graft-qalora-offsets", "graft-merge_aware", "graft-merge_aware-int8"),
)
CHECKPOINTING = {"peft": ("none", "layers"), "graft": ("none", "products", "half", "layers")}
DTYPES = ("bfloat16", "float32")
TOKENS = {
    "tiny": ("1x32", "2x64"),
    "0.1b": ("4x512",),
    "1.1b": ("1x256", "2x512"),
    "7b": ("1x256",),
    "13b": ("1x256",),
}


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    shape: str
    tokens: str
    who: str
    checkpointing: str = "none"
    malloc: str = "default"
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """How comparisons call it."""
        return f"{self.who} {self.checkpointing} {self.malloc}"

    @property
    def side(self) -> str:
        """Graft or peft."""
        return self.who.partition("-")[0]

    @property
    def method(self) -> str:
        """lora, qlora, qalora (qalora-offsets: its scales stay), affine, merge_aware (-int8)."""
        return self.who.partition("-")[2]

    @property
    def batch(self) -> tuple[int, int]:
        """Rows and tokens in a row."""
        rows, length = self.tokens.split("x")
        return int(rows), int(length)


@dataclass(frozen=True)
class Comparison:
    """A ratio of ours to theirs, with its target where there is one.

    `ours` is a case of default malloc, '*' standing for any checkpointing: graft may keep what it
    likes as long as its peak stays within `peak` times theirs, and `peak_gb`.
    """

    ours: str
    theirs: str
    time: float | None = None
    tokens: str | None = None
    peak: float | None = None
    peak_gb: float | None = None

    def holds_for(self, ours: Case, theirs: Case) -> bool:
        """Return whether it compares these two."""
        who, checkpointing = self.ours.split()
        return (
            ours.who == who
            and checkpointing in ("*", ours.checkpointing)
            and ours.malloc == "default"
            and theirs.name == self.theirs
            and ours.tokens == theirs.tokens
            and self.tokens in (None, ours.tokens)
        )


_COMPARISONS = {
    ("1.1b", "bfloat16"): (
        Comparison("graft-qlora none", "peft-qlora none default", 0.62, "1x256"),
        Comparison("graft-qlora none", "peft-qlora none tuned", 0.73, "1x256"),
        Comparison("graft-qlora *", "peft-qlora layers default", 0.55, "1x256", peak=0.6),
        Comparison("graft-qlora *", "peft-qlora layers default", 0.55, "2x512", peak=0.6),
        Comparison("graft-qlora none", "graft-lora none default", 1.05, "1x256"),
        Comparison("graft-qalora none", "graft-qlora none default", 1.25, "1x256"),
        Comparison("graft-qalora-offsets none", "graft-qlora none default", 1.10, "1x256"),
        Comparison("graft-affine none", "graft-qlora none default", 1.35, "1x256"),
    ),
    ("1.1b", "float32"): (
        Comparison("graft-qlora *", "peft-qlora none default", 0.5, "1x256", peak=0.6),
        Comparison("graft-qlora *", "peft-qlora layers default", 0.45, "2x512", peak=0.6),
        Comparison("graft-qalora none", "graft-qlora none default", 1.25, "1x256"),
    ),
    ("7b", "bfloat16"): (
        Comparison("graft-qlora *", "peft-qlora layers default", 0.5, "1x256", peak_gb=5.0),
        Comparison("graft-qlora *", "peft-qlora layers tuned", 0.75, "1x256", peak_gb=5.0),
    ),
    ("7b", "float32"): (
        Comparison("graft-qlora *", "peft-qlora layers default", 0.5, "1x256", peak_gb=5.0),
    ),
}


def comparisons(shape: str, dtype: str) -> tuple[Comparison, ...]:
    """Return what is compared, without a target where the shape has none of its own."""
    own = _COMPARISONS.get((shape, dtype))
    known = _COMPARISONS["1.1b", dtype]
    return own or tuple(dict.fromkeys(Comparison(one.ours, one.theirs) for one in known))


def own_cases(shape: str, tokens: str) -> list[Case]:
    """Return what the comparisons of a shape need at one batch size.

    The other methods, and no checkpointing, only at the first of the shape's own sizes.
    """
    ours = [Case(shape, tokens, "graft-qlora", kind) for kind in CHECKPOINTING["graft"]]
    peer = Case(shape, tokens, "peft-qlora", "layers")
    if shape == "13b":
        return ours[1:]
    if shape == "7b":
        return [peer, replace(peer, malloc="tuned"), *ours[1:]]
    if tokens in TOKENS[shape][1:]:
        return [peer, *ours[1:]]
    free = replace(peer, checkpointing="none")
    methods = ("lora", "qalora", "qalora-offsets", "affine")
    others = [Case(shape, tokens, f"graft-{method}") for method in methods]
    return [free, replace(free, malloc="tuned"), peer, *ours, *others]
