"""What lies where in the folder of a run; imports nothing, so that runs are listed quickly.

RUN/: config.yaml (resolved), prompt.json, inputs.json (the SHA-256 of data and model), status.json
(how it stands), skipped.jsonl (bad rows that --skip-bad-rows passed over), base/ (packed) or
base.json (a path with its fingerprint), tokenizer/ (where an adopted adapter brought
another than that base's), adapter/ or model/ (method full), start/ (the adapter
before the first step, where it was a part of the weights), metrics.jsonl, checkpoints/ (the last
two, that of the end among them), report.json, report.md, plots/loss.png, export/;
failed-batch.safetensors where a loss or gradient was not finite; best/ (the parameters of the best
evaluation, where it was not the last), general.safetensors (what the base said of the general
text), reference.safetensors (what it said of rows of preferences), samples.jsonl and tensorboard/
where they were asked for. `PARTS` are all of them.
"""

from __future__ import annotations

CONFIG = "config.yaml"
PROMPT = "prompt.json"
BASE = "base"
BASE_REFERENCE = "base.json"
TOKENIZER = "tokenizer"
ADAPTER = "adapter"
START = "start"
MODEL = "model"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
REPORT = "report.json"
REPORT_TEXT = "report.md"
PLOTS = "plots"
INPUTS = "inputs.json"
STATUS = "status.json"
FAILED_BATCH = "failed-batch.safetensors"
EXPORTS = "export"
BEST = "best"
GENERAL = "general.safetensors"
SAMPLES = "samples.jsonl"
REFERENCE = "reference.safetensors"
SKIPPED = "skipped.jsonl"
TENSORBOARD = "tensorboard"

WATCHED = (BEST, GENERAL, REFERENCE, SAMPLES, TENSORBOARD)
"""What is kept beside the training itself."""
PARTS = frozenset(
    {
        *(CONFIG, PROMPT, INPUTS, STATUS, BASE, BASE_REFERENCE, START, METRICS, CHECKPOINTS),
        TOKENIZER,
        *(SKIPPED, ADAPTER, MODEL, REPORT, REPORT_TEXT, PLOTS, FAILED_BATCH, EXPORTS, *WATCHED),
    }
)
