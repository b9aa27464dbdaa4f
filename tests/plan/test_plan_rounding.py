"""What GPTQ needs: before training, or between merge_aware's last dense step and the next."""

from __future__ import annotations

from graft.adapters.config import AdapterConfig
from graft.formats.registry import make_format
from graft.plan.memory import plan_memory


def plan(folder, dense_fraction, checkpointing, rows=1):
    return plan_memory(
        str(folder),
        weight_format=make_format("latent", {"bits": 4, "rounds": False}),
        adapter=AdapterConfig(method="merge_aware", rank=4, dense_fraction=dense_fraction),
        dtype="auto",
        device="cuda",  # without a heap, whose gaps are larger than this model
        batch_size=1,
        sequence_length=1,
        checkpointing=checkpointing,
        calibration_rows=rows,
    )


def test_where_rounding_is_the_peak_recomputing_saves_nothing(model_folder):
    assert plan(model_folder("llama"), 0.0, "auto", rows=0).checkpointing == "layers"
    assert plan(model_folder("llama"), 0.5, "auto").checkpointing == "none"


def test_rounding_takes_a_float32_copy_of_the_adapted_weights(model_folder):
    plans = [plan(model_folder("llama"), 0.5, "none", rows) for rows in (0, 1)]
    always, later = ({row.name: row.bytes for row in plan.rows} for plan in plans)
    assert always["rounding"] == 0
    largest, weights = 48 * 172, 3 * (2 * 48 * 48 + 2 * 24 * 48 + 3 * 48 * 172)
    hessians = 8 * (2 * (6 * 48**2 + 172**2) + 4 * 172**2)  # and the drift's
    states = 4 * 48 * 4  # one token's, before and behind a layer, rounded and not
    assert later["rounding"] == 4 * weights + 36 * largest + hessians + states
    # One token's step needs less than the rounding between two steps.
    names = ("frozen weights", "other weights", "trained weights", "optimizer", "rounding")
    assert plans[0].training_bytes < plans[1].training_bytes == sum(later[name] for name in names)


def test_a_base_that_is_calibrated_is_dense_before_training(model_folder):
    def integers(rows):
        return plan_memory(
            str(model_folder("llama")),
            weight_format=make_format("int", {"bits": 3}),
            adapter=AdapterConfig(method="qalora", rank=4, grid_rank=4),
            dtype="auto",
            device="cuda",
            batch_size=1,
            sequence_length=8,
            checkpointing="none",
            calibration_rows=rows,
        )

    alone, calibrated = integers(0), integers(128)
    rows = {row.name: row.bytes for row in calibrated.rows}
    assert rows["rounding"] > 128 * 8 * 2 * 48 * 4
    assert alone.training_bytes < calibrated.training_bytes
    assert calibrated.training_bytes == rows["other weights"] + rows["rounding"]
    assert {row.name: row.note for row in alone.rows}["rounding"].startswith("each weight")


def test_a_start_looks_at_the_inputs_of_the_base_as_it_trains(model_folder):
    def looking(rows):
        return plan_memory(
            str(model_folder("llama")),
            weight_format=make_format("nf4"),
            adapter=AdapterConfig(method="qlora", rank=4, init="eva"),
            dtype="auto",
            device="cuda",
            batch_size=1,
            sequence_length=1,
            checkpointing="none",
            looking_rows=rows,
        )

    never, once = looking(0), looking(1)
    rows = {row.name: row.bytes for row in once.rows}
    moments = 8 * (2 * (6 * 48**2 + 172**2) + 4 * 172**2)
    assert rows["looking"] == 36 * 48 * 172 + moments + 4 * 48 * 4
    names = ("frozen weights", "other weights", "trained weights", "looking")
    assert never.training_bytes < once.training_bytes == sum(rows[name] for name in names)
    assert "looking" not in {row.name for row in never.rows}
