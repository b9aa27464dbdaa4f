"""What does compression cost? Low-rank factors, plain and for their inputs, with INT4 and tuned.

Perplexity per token on held-out TinyStories (characters on babyllama-361-1m), after:

- factors of the weights' plain SVD, and those that are the best for the layers' inputs on training
  rows, at several ratios, unrounded. The second must be lower at every ratio;
- the second, rounded to INT4 by --solver, beside integers alone of as many bytes: of the 5 bits
  that INT4 takes in groups of 32, 0.8 is what INT3 takes and 0.6 what INT2 takes;
- both tuned for --steps by qalora, whose result has the same bytes, and unrounded factors tuned by
  full --train factors.

    python benchmarks/compress.py [--models mixed-13m] [--steps 150] [--parts rounded]
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import tempfile
from pathlib import Path

from _common import RESULTS, shared, write_csv, write_jsonl
from safetensors.torch import load_file

import graft
from graft.api.compress import Point, compress, drawn
from graft.api.config import CompressConfig, QuantizeConfig
from graft.evaluate.curve import plot_curve

RATIOS = (0.8, 0.6, 0.4, 0.2)
EQUAL = {0.8: 3, 0.6: 2}
"""Of INT4's ratios: the width of integers alone that takes as many bytes."""
LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["babyllama-361-1m", "mixed-13m"])
    parser.add_argument("--rows", type=int, default=64, help="that calibrate")
    parser.add_argument("--eval-rows", type=int, default=60)
    parser.add_argument("--steps", type=int, default=150, help="0: nothing is tuned")
    parser.add_argument("--solver", default="gptq")
    parser.add_argument("--parts", nargs="+", default=["unrounded", "rounded"])
    arguments = parser.parse_args()
    for model in arguments.models:
        folder = Path(tempfile.mkdtemp())
        rows = _Rows(model, folder, arguments)
        for part in arguments.parts:
            {"unrounded": rows.unrounded, "rounded": rows.rounded}[part]()
        print(f"wrote {write_csv(f'compress-{model}', rows.results)}")
        shutil.rmtree(folder)
        worse = [row for row in rows.pairs if row[1] >= row[2]]
        assert not worse, f"(ratio, for the inputs, plain): {worse}"


class _Rows:
    """The measurements of one model."""

    def __init__(self, model: str, folder: Path, arguments: argparse.Namespace) -> None:
        self.model, self.folder, self.arguments = model, folder, arguments
        self.base = str(shared("models", model))
        self.train = str(write_jsonl(folder / "train.jsonl", _stories("train")))
        held_out = _stories("heldout")[: arguments.eval_rows]
        self.held_out = str(write_jsonl(folder / "heldout.jsonl", held_out))
        self.results: list[dict[str, object]] = []
        self.pairs: list[tuple[float, float, float]] = []

    def unrounded(self) -> None:
        plain = compress(self._config("plain", ratio=RATIOS))
        self._note(plain.beside[0], "original")
        aware = compress(self._config("aware", ratio=RATIOS, data=self.train))
        for ratio, one, other in zip(RATIOS, aware.points, plain.points, strict=True):
            self._note(other, "plain SVD", ratio)
            self._note(one, "for the inputs", ratio)
            assert one.perplexity is not None and other.perplexity is not None
            self.pairs.append((ratio, one.perplexity, other.perplexity))
        curves = {"plain SVD": drawn(plain.points), "for the inputs": drawn(aware.points)}
        picture = RESULTS / f"compress-{self.model}.png"
        RESULTS.mkdir(exist_ok=True)
        plot_curve(curves, drawn(plain.beside), picture, f"{self.model}: low-rank factors")
        if self.arguments.steps:
            for ratio in (0.6, 0.4):
                folder = self.folder / "aware" / f"ratio-{ratio:g}"
                tuned = self._tuned(folder, method="full", train=("factors",))
                size = next(p.bytes for p in aware.points if p.name == f"ratio {ratio:g}")
                self._row("for the inputs, factors tuned", ratio, size, tuned)

    def rounded(self) -> None:
        settings = {"data": self.train, "format": "int", "bits": 4, "solver": self.arguments.solver}
        curve = compress(self._config("int4", ratio=tuple(EQUAL), **settings))
        self._note(curve.beside[1], "INT4 alone")
        for ratio, point in zip(EQUAL, curve.points, strict=True):
            self._note(point, "for the inputs, INT4", ratio)
        for ratio, bits in EQUAL.items():
            alone = self.folder / f"int{bits}"
            settings["bits"] = bits
            graft.quantize(
                QuantizeConfig(model=self.base, out=str(alone), **settings, **self._calibration())
            )
            size = _tensor_bytes(alone)
            found = graft.evaluate_model(alone, self.held_out, max_length=LENGTH, eos=False)
            self._row(f"INT{bits} alone", None, size, found["perplexity"])
            if self.arguments.steps:
                self._row(f"INT{bits} alone, tuned", None, size, self._tuned(alone))
                both = self.folder / "int4" / f"ratio-{ratio:g}"
                size = _tensor_bytes(both)
                self._row("for the inputs, INT4, tuned", ratio, size, self._tuned(both))

    def _calibration(self) -> dict[str, int]:
        return {"calibration_rows": self.arguments.rows, "calibration_length": LENGTH}

    def _config(self, name: str, **options: object) -> CompressConfig:
        return CompressConfig(
            model=self.base,
            out=str(self.folder / name),
            eval_data=self.held_out,
            eval_rows=self.arguments.eval_rows,
            **self._calibration(),
            **options,
        )

    def _tuned(self, model: Path, **options: object) -> float:
        """Return the perplexity after a training on the compressed model."""
        run = self.folder / "run"
        report = graft.finetune(
            graft.TrainConfig(
                model=str(model),
                data=self.train,
                eval_data=self.held_out,
                max_length=LENGTH,
                eos=False,
                steps=self.arguments.steps,
                batch_size=8,
                checkpoints=False,
                out=str(run),
                **{"method": "qalora", **options},
            )
        )
        shutil.rmtree(run)
        assert report.perplexity is not None
        return report.perplexity

    def _note(self, point: Point, what: str, ratio: float | None = None) -> None:
        assert point.perplexity is not None
        self._row(what, ratio, point.bytes, point.perplexity, point.weight_error)

    def _row(
        self, what: str, ratio: float | None, size: int, perplexity: float, error: float = 0.0
    ) -> None:
        row = {
            "model": self.model,
            "what": what,
            "ratio": "" if ratio is None else ratio,
            "MB": round(size / 1e6, 3),
            "perplexity": round(perplexity, 4),
            "weight_error": round(error, 4) or "",
        }
        self.results.append(row)
        print(row, flush=True)


def _tensor_bytes(folder: Path) -> int:
    """Return the bytes of a folder's tensors, as a point of a curve counts them."""
    return sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


def _stories(split: str) -> list[dict[str, str]]:
    path = shared("data", "tinystories", f"{split}.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [{"text": json.loads(line)["text"]} for line in file]


if __name__ == "__main__":
    main()
