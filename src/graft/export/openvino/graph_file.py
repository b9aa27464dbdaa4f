"""Writing OpenVINO's own file of a graph, so that equal graphs give equal bytes."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from graft.files.write import replacing


@contextmanager
def saved_graph(model: Any, graph: Path) -> Iterator[ElementTree.ElementTree[Any]]:
    """Write a model's graph, and its constants beside it; yield the graph, to be changed.

    The file has no indentation, which would be a fifth of it. Raises OSError where OpenVINO cannot
    write.
    """
    import openvino

    try:
        openvino.save_model(model, graph, compress_to_fp16=False)
    except RuntimeError as error:  # also of a full disk
        raise OSError(errno.EIO, f"the graph: {str(error)[:300]}") from error
    tree = ElementTree.parse(graph)
    yield tree
    for element in tree.iter():
        if element.text is not None and not element.text.strip():
            element.text = None
        element.tail = None
    with replacing(graph) as temporary:
        tree.write(temporary, encoding="utf-8", xml_declaration=True)
