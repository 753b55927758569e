"""A run as a folder for ONNX Runtime: Python, JavaScript, C++, C#, Java, on servers, phones and in browsers.

    model.onnx        ids and state → logits and the state after them; large weights are in model.onnx.data
    run.json          the state before a text, the start token, the context length
    tokenizer.json    of the library tokenizers
    README.md         how to use them

The graph is traced from the model's own forward pass by `torch.onnx.export`, so each family needs no second description
of what it computes. Batch, time and cache have free sizes: one graph reads a prompt and steps token by token.

fp16 and int8 are formats of the file. The runtime makes fp32 of them when it opens it, and computes in fp32, so that
all operators and machines have them. int8 has a scale for each row of a matrix (for each column of one that multiplies
from the right).
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from lm.errors import MissingExtraError
from lm.evaluation.perplexity import score
from lm.interop import onnx_layers
from lm.interop.exported import (
    MAX_DIFFERENCE,
    Exported,
    ExportPrecision,
    OpenedModel,
    Proof,
    front_matter,
    ids_there,
    new_folder,
    proof_text,
)
from lm.kernels.dispatch import only_torch
from lm.models.base import LanguageModel, State
from lm.runs.run import Run
from lm.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
OPSET = 18
"""The version of the operators: the first with integer operators on bits."""
MODEL = "model.onnx"
MAX_FILE_BYTES = 1 << 30
"""Of weights in model.onnx; more are in model.onnx.data, as no file of protobuf holds 2 GiB."""
NEXT = "next_"
"""Before the name of a tensor of the state after the ids."""
MAX_INT8_DIFFERENCE = 0.05
"""Nats per token; int8 rounds more than the other formats of the file."""
MIN_ROUNDED = 1024
"""Smaller tensors stay fp32."""
EXAMPLE_ROWS, EXAMPLE_STEPS, EXAMPLE_EARLIER = 2, 6, 5
"""Sizes of the example that is traced; different, and none that a model has a special case for."""

PYTHON = """\
import json, numpy, onnxruntime, tokenizers

run, tokenizer = json.load(open("PATH/run.json")), tokenizers.Tokenizer.from_file("PATH/tokenizer.json")
session = onnxruntime.InferenceSession("PATH/model.onnx")
first = {name: numpy.full(t["shape"], t["value"], t["type"]) for name, t in run["state"].items()}
state, seen, ids = first, 0, [run["start_id"], *tokenizer.encode("The ", add_special_tokens=False).ids]
new = ids
for _ in range(200):
    if seen == run["context_length"]:  # the window is full: keep its newer half
        state, seen, new = first, 0, ids[-(seen // 2) - 1 :]
    logits, *after = session.run(None, {"ids": numpy.array([new]), **state})
    state, seen, new = dict(zip(first, after)), seen + len(new), [int(logits[0, -1].argmax())]
    ids = ids + new
print(tokenizer.decode(ids[1:], skip_special_tokens=False))
"""


def export(run: Run, path: Path, precision: ExportPrecision = "fp32", *, data_dir: Path | None = None) -> Exported:
    """Write a run as a folder for ONNX Runtime, open it there, and measure it.

    Args:
        run: of any model, and a tokenizer that has a counterpart.
        path: a new folder.
        precision: of the weights in the file.
        data_dir: folder of the named corpora, for the text of the proof.

    Raises:
        UnsupportedExportError: the tokenizer has no counterpart.
        MissingExtraError: a package is not installed.
        RunError: there is something at `path`, or the losses of the two programs differ.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
        import tokenizers
    except ImportError as error:
        raise MissingExtraError(f"This needs {error.name}: pip install '.[export]' in a checkout of Inkling.") from None
    tokenizer, notes = run.tokenizer.to_huggingface(), _notes(run)
    first = run.model.first_state()
    with new_folder(path) as folder:
        tokenizer.save(str(folder / "tokenizer.json"))
        name, split = proof_text(run, data_dir)
        # With their own tokenizer: its ids are a part of the proof.
        their = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        encoded = their.encode(run.tokenizer.decode(split.ids[1:]), add_special_tokens=False).ids
        ids = ids_there(run, split, encoded, f"tokenizers {tokenizers.__version__}")
        graph = traced(run.model, first)
        round_weights(graph, precision)
        save(graph, folder / MODEL)
        (folder / "run.json").write_text(json.dumps(_description(run, first), indent=2) + "\n", "utf-8")
        (folder / "README.md").write_text(_card(run, notes), "utf-8")
        opened: Any = Opened(folder / MODEL, run.model, first)
        loss_there, loss_here = score(opened, ids).loss, score(run.model, split.ids).loss
        proof = Proof(f"onnxruntime {onnxruntime.__version__}", name, split, loss_there, loss_here)
        proof.check(run, MAX_INT8_DIFFERENCE if precision == "int8" else MAX_DIFFERENCE[precision])
        size = sum(file.stat().st_size for file in folder.iterdir())
    if precision == "int8":
        notes = (*notes, f"int8 costs {loss_there - loss_here:+.4f} nats per token on this text.")
    return proof.exported(path, "onnx", precision, size, notes)


class Opened(OpenedModel):
    """A model in ONNX Runtime.

    Args:
        path: of model.onnx.
        model: that was exported.
        first: its first state.
    """

    def __init__(self, path: Path, model: LanguageModel, first: State) -> None:
        import onnxruntime

        super().__init__(model.vocab_size, model.context_length)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.first = first

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `LanguageModel.forward`."""
        before = self.first.select([0] * len(ids)) if state is None else state
        feeds = {"ids": ids.numpy(), **{name: tensor.numpy() for name, tensor in before.tensors.items()}}
        logits, *after = (torch.from_numpy(array) for array in self.session.run(None, feeds))
        return logits, replace(before, tensors=dict(zip(before.tensors, after, strict=True)))


# -- the graph ----------------------------------------------------------------------------------------


class _Flat(torch.nn.Module):
    """A model whose state is given and returned as tensors, in the order of `first`."""

    def __init__(self, model: LanguageModel, first: State) -> None:
        super().__init__()
        self.model = model
        self.first = first

    def forward(self, ids: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Ids (B, T) and the state before → logits (B, T, V) in fp32 and the state after."""
        names = self.first.tensors
        # With rows of different length also, if a row may have any.
        state = replace(self.first, tensors=dict(zip(names, tensors, strict=True)), ragged=bool(self.first.growing))
        with only_torch():
            logits, after = self.model(ids, state)
        return logits.float(), *(after.tensors[name] for name in names)


def traced(model: LanguageModel, first: State) -> Any:
    """The graph (`onnx.ModelProto`) of a model in evaluation; inputs are "ids" and the tensors of the state.

    Args:
        model: on the CPU.
        first: its first state.
    """
    shorter = model.with_layers(onnx_layers.LAYERS)
    if model.equal_blocks is None or shorter is None:
        graph = _traced(model, first, optimize=True)
    else:
        _, blocks = model.equal_blocks
        graph = _traced(shorter, shorter.first_state(), optimize=False)
        weights = {f"model.{name}": tensor.detach().float().numpy() for name, tensor in model.named_parameters()}
        onnx_layers.add_layers(graph, f"model.{blocks}.", weights, [*first.tensors], NEXT)
    for node in graph.graph.node:
        # Notes of the exporter, with lines of code and paths of this machine.
        del node.metadata_props[:]
    del graph.graph.value_info[:]
    return graph


def _traced(model: LanguageModel, first: State, *, optimize: bool) -> Any:
    """`traced` in one piece; `optimize` takes longer than all else, and the runtime optimizes too."""
    ids = torch.zeros((EXAMPLE_ROWS, EXAMPLE_STEPS), dtype=torch.int64)
    with torch.inference_mode():
        _, before = model.eval()(ids[:, :EXAMPLE_EARLIER])
    example = [tensor.detach().clone().contiguous() for tensor in before.tensors.values()]
    rows, time, cached = (torch.export.Dim(name) for name in ("rows", "time", "cached"))
    free = [{0: rows, 1: cached} if name in first.growing else {0: rows} for name in first.tensors]
    with model.traceable(), torch.no_grad(), _quiet():
        program = torch.onnx.export(
            _Flat(model, first).eval(),
            (ids, *example),
            dynamo=True,
            dynamic_shapes=({0: rows, 1: time}, tuple(free)),
            input_names=["ids", *first.tensors],
            output_names=["logits", *(NEXT + name for name in first.tensors)],
            opset_version=OPSET,
            verbose=False,
            optimize=optimize,
        )
    assert program is not None, "the result of dynamo=True"
    graph = program.model_proto
    graph.producer_name, graph.producer_version = "inkling", __version__
    return graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes for its developers."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for log, level in zip(logs, levels, strict=True):
                log.setLevel(level)


def save(graph: Any, path: Path) -> None:
    """Write a graph (`onnx.ModelProto`); large weights go to a second file, which the runtime finds itself."""
    import onnx

    is_large = sum(len(tensor.raw_data) for tensor in graph.graph.initializer) > MAX_FILE_BYTES
    onnx.save(graph, str(path), save_as_external_data=is_large, location=f"{path.name}.data")


# -- weights in fewer bits ----------------------------------------------------------------------------


def round_weights(model: Any, precision: ExportPrecision) -> None:
    """Store the larger weights of a graph (`onnx.ModelProto`) in fp16, or matrices in int8; "fp32" changes nothing."""
    from onnx import numpy_helper

    if precision == "fp32":
        return
    graph = model.graph
    right = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    kept, nodes = [], []
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype != np.float32 or array.size < MIN_ROUNDED:
            kept.append(tensor)
        elif precision == "int8" and array.ndim >= 2:
            codes, scales = rows_in_int8(array, axis=-2 if tensor.name in right else -1)
            parts: dict[str, Any] = {f"{tensor.name}.int8": codes, f"{tensor.name}.scale": scales}
            kept += [numpy_helper.from_array(part, name) for name, part in parts.items()]
            nodes += _restored(tensor.name, *parts)
        else:
            kept.append(numpy_helper.from_array(array.astype(np.float16), f"{tensor.name}.fp16"))
            nodes += _restored(tensor.name, f"{tensor.name}.fp16")
    nodes += graph.node
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)


def rows_in_int8(
    array: npt.NDArray[np.float32], axis: int = -1
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Codes from -127 to 127, and the scales that they are multiplied with: one for all values along `axis`."""
    largest = np.abs(array).max(axis=axis, keepdims=True)
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(array / scales).astype(np.int8), scales


def _restored(name: str, stored: str, scale: str | None = None) -> list[Any]:
    """The nodes that make the fp32 tensor `name` of the tensor `stored`."""
    from onnx import TensorProto, helper

    if scale is None:
        return [helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT)]
    unscaled = f"{name}.unscaled"
    return [
        helper.make_node("Cast", [stored], [unscaled], to=TensorProto.FLOAT),
        helper.make_node("Mul", [unscaled, scale], [name]),
    ]


# -- the other files ----------------------------------------------------------------------------------


def _description(run: Run, first: State) -> Mapping[str, Any]:
    """run.json."""
    return {
        "format_version": FORMAT_VERSION,
        "start_id": run.tokenizer.start_id,
        "end_ids": list(run.tokenizer.end_ids),
        "vocab_size": run.model.vocab_size,
        "context_length": run.model.context_length,
        "state": {
            name: {
                "type": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "value": 0 if tensor.is_floating_point() or tensor.numel() == 0 else int(tensor.flatten()[0]),
            }
            for name, tensor in first.tensors.items()
        },
    }


def _notes(run: Run) -> tuple[str, ...]:
    """What the format does not hold."""
    notes = []
    unknown = run.tokenizer.options.unknown
    if unknown == "error" and run.tokenizer.unknown_id is not None:
        notes.append("Symbols outside the vocabulary become the unknown token there; here they are refused.")
    if unknown == "skip" and run.tokenizer.words is not None:
        notes.append("Words outside the vocabulary become the unknown token there; here they are left out.")
    notes.append(
        f"The first token of a text is predicted from token {run.tokenizer.start_id}: put it before the ids of a text."
    )
    return tuple(notes)


def _card(run: Run, notes: tuple[str, ...]) -> str:
    return f"""{front_matter(run, "onnxruntime")}

# {run.name}

Trained with Inkling {__version__}.

`model.onnx` has the inputs `ids` (B, T) int64 and the tensors of the state, and the outputs `logits` (B, T, V) and the
same tensors after the ids, with `{NEXT}` before their names. `run.json` has the state before a text.

```python
{PYTHON}```

{"".join(f"- {note}{chr(10)}" for note in notes)}
{run.card()}"""
