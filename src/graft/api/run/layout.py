"""What lies where in the folder of a run; imports nothing, so that runs are listed quickly.

RUN/: config.yaml (resolved), prompt.json, base/ (packed) or base.json (a path with its
fingerprint), adapter/ or model/ (method full), start/ (the adapter before the first step, where it
was not zero), metrics.jsonl, checkpoints/, report.json, report.md,
plots/loss.png.
"""

from __future__ import annotations

CONFIG = "config.yaml"
PROMPT = "prompt.json"
BASE = "base"
BASE_REFERENCE = "base.json"
ADAPTER = "adapter"
START = "start"
MODEL = "model"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
REPORT = "report.json"
