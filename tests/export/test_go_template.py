"""Go's templates: what is written survives a Modelfile and renders as the text that it was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.export.ollama.go_template import go_text, render_go


@given(text=st.text(st.sampled_from('a{}" \n\t\r\\\u200b\xa0é🎉\U000e0001'), max_size=30))
def test_any_text_comes_back_through_a_modelfile(parsed, text):
    template = go_text(text)
    assert render_go(template, {}) == text
    ((name, value),) = parsed(f'TEMPLATE """{template}"""\n')
    assert name == "template" and render_go(value, {}) == text


@pytest.mark.parametrize(
    ("text", "template"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("a {{ .b }}", 'a {{ "{{" }} .b }}'),
        ("{", '{{ "{" }}'),
        ('say """', r'say {{ "\"\"\"" }}'),
        ('"two""', '"two""'),
        ("no\xa0break", r'no{{ "\u00a0" }}break'),
        ("tag\U000e0001", r'tag{{ "\U000e0001" }}'),
    ],
)
def test_what_is_written(text, template):
    assert go_text(text) == template


def test_conditions_and_ranges():
    template = (
        "{{ if .System }}[{{ .System }}]{{ else }}none{{ end }}"
        '{{ range .Messages }}{{ if eq .Role "user" }}U{{ .Content }}'
        '{{ else if eq .Role "assistant" }}A{{ .Content }}{{ else }}?{{ end }};{{ end }}end'
    )
    messages = [
        {"Role": "system", "Content": "s"},
        {"Role": "user", "Content": "{{ .System }}"},
        {"Role": "assistant", "Content": "2"},
    ]
    assert render_go(template, {"System": "s", "Messages": messages}) == (
        "[s]?;U{{ .System }};A2;end"
    )
    assert render_go(template, {"System": "", "Messages": []}) == "noneend"
    nested = "{{ if .A }}{{ if .B }}x{{ else }}y{{ end }}{{ else }}{{ if .B }}z{{ end }}{{ end }}"
    found = [render_go(nested, {"A": a, "B": b}) for a in ("", "1") for b in ("", "1")]
    assert found == ["", "z", "y", "x"]


@pytest.mark.parametrize(
    "template", ["{{- .A }}", "{{ len .A }}", "{{ .A.B }}", "{{.A}}", "x{{ end }}"]
)
def test_other_constructs_are_refused(template):
    with pytest.raises(ValueError):
        render_go(template, {"A": "a"})
