"""The model that a run learns from beside its rows: looked at before the work, loaded after."""

from __future__ import annotations

from graft.adapters.registry import method_of
from graft.api.config import PlanConfig, TrainConfig
from graft.errors import GraftError
from graft.formats.base import WeightFormat
from graft.formats.registry import make_format
from graft.model.load import LoadedModel, load_model
from graft.model.running.attention import use_own_attention
from graft.model.running.pointwise import use_own_pointwise
from graft.model.running.rotary import use_own_rotary
from graft.model.subject import Subject, open_subject

_SHOWN = 3


def teacher_format(config: TrainConfig | PlanConfig) -> WeightFormat | None:
    """Return what the teacher is quantised to; None leaves it as it lies in its folder."""
    return None if config.teacher_format is None else make_format(config.teacher_format)


def open_teacher(config: TrainConfig, student: Subject) -> Subject:
    """Open the teacher's folder, without weights.

    Raises GraftError where its vocabulary is another than the student's, token by token, as one
    model's probabilities would then be of other words than the other's.
    """
    assert config.teacher is not None
    teacher = open_subject(config.teacher, config.trust_remote_code)
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    differing = sorted(ours.items() ^ theirs.items())
    if differing:
        some = ", ".join(f"{token!r} is {number}" for token, number in differing[:_SHOWN])
        raise GraftError(
            f"--teacher {config.teacher} has another vocabulary than {config.model}: "
            f"{len(differing):,} entries are in one of them alone ({some}); distillation compares "
            "probabilities token by token, so give a teacher with the same tokenizer"
        )
    sizes = [one.config.get_text_config().vocab_size for one in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise GraftError(
            f"--teacher {config.teacher} computes {sizes[1]:,} logits, and {config.model} "
            f"{sizes[0]:,}; give a teacher with as many"
        )
    if config.teacher_format is not None and teacher.formats:
        raise GraftError(
            f"--teacher-format {config.teacher_format}: {config.teacher} is quantised already; "
            "leave it out"
        )
    return teacher


def load_teacher(teacher: Subject, config: TrainConfig) -> LoadedModel:
    """Load the teacher, frozen, and quantised where that is asked for."""
    loaded = load_model(
        teacher,
        weight_format=teacher_format(config),
        dtype=method_of(config).compute_dtype(config.dtype),
        device=config.device,
    )
    loaded.model.requires_grad_(False)
    use_own_attention(loaded.model)
    use_own_pointwise(loaded.model)
    use_own_rotary(loaded.model)
    return loaded
