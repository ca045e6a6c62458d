"""ONNX files of a recommender's stages, each checked against the stage itself with onnxruntime."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys2stage.options import not_installed
from recsys2stage.recommender import Recommender
from recsys2stage.serving.graphs import BATCH, Graph, Port, RankerGraph, RetrieverGraph

OPSET = 20
NEEDED = ("onnx", "onnxscript", "onnxruntime")  # of the extra `onnx`
ITEM_VECTORS = "item_vectors.npy"
TOLERANCE = 1e-5  # of an output's elements, relative to the largest of them if that is above 1
EXAMPLE = (3, 5)  # batch and size that an export is traced with; torch would take an axis of 1 as fixed
MOST_CHARACTERS = 200  # of another library's message
MAX_PROTOBUF = 1 << 30  # bytes of weights in an .onnx file; more lie beside it, in .onnx.data


class CannotExport(ValueError):
    """A model that ONNX cannot express, or that onnxruntime computes differently."""


def check_packages() -> None:
    """Raises a ValueError where the packages of the extra `onnx` are not installed."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(f"export-onnx needs {not_installed(missing)}: pip install 'recsys2stage[onnx]'")


def versions() -> dict[str, str]:
    """Versions of the packages that take part in an export."""
    return {name: version(name) for name in ("torch", *NEEDED)}


def write_graphs(recommender: Recommender, folder: Path) -> dict[str, dict[str, Any]]:
    """Writes the stages of a recommender and checks each file.

    Args:
        recommender: to export.
        folder: where to write.

    Returns:
        For each stage, by name: file, inputs, outputs, and the difference from torch at each checked shape.

    Raises:
        CannotExport: if a stage cannot be exported, or its file computes something else.
    """
    graphs: list[Graph] = [RetrieverGraph(recommender)]
    if recommender.reranker is not None:
        graphs.append(RankerGraph(recommender))
    made = {}
    for graph in graphs:
        path = folder / f"{graph.name}.onnx"
        with quiet():
            inputs = export(graph, path)
        made[graph.name] = {
            "file": path.name,
            "inputs": [port.as_json() for port in inputs],
            "outputs": [graph.output.as_json()],
            "checked": check(graph, path, [port.name for port in inputs]),
        }
    return made


def export(graph: Graph, path: Path) -> list[Port]:
    """Writes a graph as an ONNX file.

    Returns:
        The inputs that it reads; the file has no others.

    Raises:
        CannotExport: if torch cannot export it with axes of any size.
    """
    import onnx_ir

    batch, size = EXAMPLE
    example = graph.random(batch, size if graph.longest is None else min(size, graph.longest), seed=0)
    axes: dict[str, Any] = {BATCH: torch.export.Dim(BATCH)}
    if graph.longest is None or graph.longest > 1:
        axes[graph.free] = torch.export.Dim(graph.free, max=graph.longest)
    names = tuple({n: axis for n, axis in enumerate(port.axes) if axis in axes} for port in graph.inputs)
    shapes = tuple({n: axes[axis] for n, axis in port.items()} for port in names)
    try:
        with torch.no_grad():
            # not by torch.onnx.export alone, which tries again with axes of fixed size
            program = torch.export.export(
                graph,
                tuple(torch.from_numpy(example[port.name]) for port in graph.inputs),
                dynamic_shapes={"values": shapes},
                strict=False,
            )
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[port.name for port in graph.inputs],
                output_names=[graph.output.name],
                dynamic_shapes={"values": names},  # what the axes are called in the file
                verbose=False,
            )
    except Exception as error:  # of many types, from torch, onnxscript and a user's own modules
        raise CannotExport(f"{graph.title} cannot be exported to ONNX: {reason(error)}") from error
    assert exported is not None
    model = exported.model
    drop_unread(model.graph)
    strip(model)
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if weights > MAX_PROTOBUF else None)
    read = {value.name for value in model.graph.inputs}
    return [port for port in graph.inputs if port.name in read]


def drop_unread(graph: Any) -> None:
    """Removes inputs that are not read, or only for the size of the batch, which is then read from the first one."""
    first, *others = list(graph.inputs)
    for value in others:
        uses = list(value.uses())
        if all(node.op_type == "Shape" and _axes_of(node) == (0, 1) for node, _ in uses):
            for node, number in uses:
                node.replace_input_with(number, first)
            graph.inputs.remove(value)


def _axes_of(shape: Any) -> tuple[int | None, int | None]:
    """First and last axis, exclusive, of a Shape operation."""
    start, end = (shape.attributes.get(name) for name in ("start", "end"))
    return start.value if start else 0, end.value if end else None


def strip(model: Any) -> None:
    """Removes what an export notes of each operation: stack traces with the paths of this machine."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()


def check(graph: Graph, path: Path, inputs: list[str]) -> list[dict[str, Any]]:
    """Compares an ONNX file with the recommender at shapes other than the example's.

    Args:
        graph: the stage.
        path: its file.
        inputs: names of the inputs that it reads.

    Returns:
        Batch, size of the free axis, and largest difference of each shape.

    Raises:
        CannotExport: if onnxruntime does not run it, or a difference is above TOLERANCE.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    longest = graph.longest or 37
    checked = []
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for seed, (batch, size) in enumerate([(1, 1), (3, 1), (1, longest), (2, (longest + 1) // 2 | 1), (4, longest)]):
            size = min(size, longest)
            values = graph.random(batch, size, seed)
            expected = graph.reference(values)
            (output,) = session.run(None, {name: values[name] for name in inputs})
            checked.append({BATCH: batch, graph.free: size, "difference": difference(output, expected)})
    except Exception as error:  # onnxruntime's errors share no base class
        raise CannotExport(f"{graph.title} cannot be run by onnxruntime: {reason(error)}") from error
    worst = max(checked, key=lambda shape: shape["difference"])
    if not worst["difference"] <= TOLERANCE:
        raise CannotExport(
            f"the ONNX file of {graph.title} differs from torch by {worst['difference']:.2g} at {BATCH} "
            f"{worst[BATCH]} and {graph.free} {worst[graph.free]}, expected at most {TOLERANCE:g}"
        )
    return checked


def difference(output: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference of two outputs, relative to the largest number if that is above 1; inf for other shapes."""
    finite = np.isfinite(expected)
    if output.shape != expected.shape or not np.array_equal(np.isfinite(output), finite):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = max(1.0, float(np.abs(expected[finite]).max()))
    return float(np.abs(output[finite] - expected[finite]).max()) / scale


def reason(error: Exception) -> str:
    """The first line of an error's text that is not empty, without its period."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0][:MOST_CHARACTERS].removesuffix(".")


@contextmanager
def quiet() -> Iterator[None]:
    """Context without the notes of torch and onnxscript on what they try, which are no concern of a user."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
