"""What merge_aware needs between the last dense step and the first one inside the rounding."""

from __future__ import annotations

from graft.adapters.config import AdapterConfig
from graft.formats.registry import make_format
from graft.plan.memory import plan_memory


def plan(folder, dense_fraction, checkpointing):
    return plan_memory(
        str(folder),
        weight_format=make_format("latent", {"bits": 4, "rounds": False}),
        adapter=AdapterConfig(method="merge_aware", rank=4, dense_fraction=dense_fraction),
        dtype="auto",
        device="cuda",  # without a heap, whose gaps are larger than this model
        batch_size=1,
        sequence_length=1,
        checkpointing=checkpointing,
    )


def test_where_rounding_is_the_peak_recomputing_saves_nothing(model_folder):
    assert plan(model_folder("llama"), 0.0, "auto").checkpointing == "layers"
    assert plan(model_folder("llama"), 0.5, "auto").checkpointing == "none"


def test_rounding_takes_a_float32_copy_of_the_adapted_weights(model_folder):
    plans = [plan(model_folder("llama"), fraction, "none") for fraction in (0.0, 0.5)]
    always, later = ({row.name: row.bytes for row in plan.rows} for plan in plans)
    assert always["rounding"] == 0
    largest, weights = 48 * 172, 3 * (2 * 48 * 48 + 2 * 24 * 48 + 3 * 48 * 172)
    hessians = 8 * (6 * 48**2 + 172**2 + 4 * 172**2)
    assert later["rounding"] == 4 * weights + 36 * largest + hessians
    # One token's step needs less than the rounding between two steps.
    names = ("frozen weights", "other weights", "trained weights", "optimizer", "rounding")
    assert plans[0].training_bytes < plans[1].training_bytes == sum(later[name] for name in names)
