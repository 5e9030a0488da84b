"""Open an exported graph in onnxruntime, once its files are known to be sound."""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo
from packaging.version import Version
from parscale_core.error_text import one_line

from parscale_export.runtime.device_weights import upload
from parscale_export.runtime.provider import (
    CPU,
    CUDA,
    choose_provider,
    cuda_options,
    cuda_refusal,
    records_steps,
)

STEP = "_step"  # ends the name of a graph of single steps
NEEDING_CUDNN = ["BiasSoftmaxFusion"]  # of onnxruntime's optimizers
ONLY_ERRORS = 3
# Before it, Attention with grouped heads, a past and a mask fails in float32 and errs in float16.
STANDARD_SINCE = Version("1.25")


def find_graph(path: Path, streams: int | None = None) -> Path:
    """The .onnx file that ``path`` is, or that is in the folder ``path``.

    Args:
        streams: the P that the graph shall have; by default it is model.onnx, or the first.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is another kind of file, or none has so many streams.
    """
    if streams is None:
        return _graph_files(path)[0]
    graphs = find_graphs(path)
    if streams not in graphs:
        there = ", ".join(map(str, graphs))
        raise ValueError(f"{path}: no graph of P={streams}, only of P={there}")
    return graphs[streams]


def find_graphs(path: Path) -> dict[int, Path]:
    """The graphs that ``path`` is or holds by their numbers of streams, in rising order.

    Raises:
        FileNotFoundError, ValueError: as ``find_graph``; or one is not a graph of ours.
    """
    files = reversed(_graph_files(path))  # of two with the same P, the first counts
    graphs = {int(metadata(load_graph(file), file)["streams"]): file for file in files}
    return dict(sorted(graphs.items()))


def _graph_files(path: Path) -> list[Path]:
    """Graphs by name, so that model.onnx comes before model_p2.onnx."""
    if path.is_file():
        if path.suffix != ".onnx":
            raise ValueError(f"{path}: not an .onnx file")
        whole = path.with_stem(path.stem.removesuffix(STEP))
        if whole != path and whole.is_file():
            raise ValueError(f"{path}: a graph of single steps alone; give {whole}")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    found = sorted(path.glob("*.onnx")) or sorted(path.glob("onnx/*.onnx"))
    found = [file for file in found if not file.stem.endswith(STEP)]
    if not found:
        raise FileNotFoundError(f"{path}: no model.onnx in this folder")
    return sorted(found, key=lambda file: file.stem)


def step_file(graph: Path) -> Path:
    """Where the graph of single steps of a graph is, if it has one."""
    return graph.with_stem(graph.stem + STEP)


def load_graph(file: Path) -> onnx.ModelProto:
    """A graph without its weights.

    Raises:
        ValueError: the file is none.
    """
    try:
        model = onnx.load(str(file), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ValueError(f"{file}: not an ONNX graph") from error
    if not model.graph.node:
        raise ValueError(f"{file}: not an ONNX graph")
    return model


def metadata(graph: onnx.ModelProto, file: Path) -> dict[str, str]:
    """What ``export_onnx`` noted in a graph, without the names' common beginning.

    Raises:
        ValueError: it did not write this graph.
    """
    prefix = "parscale."
    about = {
        entry.key.removeprefix(prefix): entry.value
        for entry in graph.metadata_props
        if entry.key.startswith(prefix)
    }
    if "kv_layout" not in about:
        raise ValueError(f"{file}: not a graph that parscale export-onnx wrote")
    return about


def read_graph(file: Path) -> onnx.ModelProto:
    """An exported graph without its weights, after a look at the file that holds them.

    Raises:
        FileNotFoundError: the external data is missing.
        ValueError: not an ONNX graph, or external data that is truncated or outside its folder.
    """
    model = load_graph(file)
    ends: dict[str, int] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            info = ExternalDataInfo(tensor)
            end = int(info.offset or 0) + int(info.length or 0)
            ends[info.location] = max(end, ends.get(info.location, 0))
    # In the hub's cache graph and data are links to one folder of blobs: onnxruntime takes them.
    folders = (file.parent.resolve(), file.resolve().parent)
    for location, end in ends.items():
        data, written = file.parent / location, Path(location)
        real = data.resolve()
        if (
            written.is_absolute()
            or ".." in written.parts
            or not any(real.is_relative_to(folder) for folder in folders)
        ):
            raise ValueError(f"{file}: its external data {location!r} is outside its folder")
        if not data.is_file():
            raise FileNotFoundError(f"{data}: missing; {file.name} keeps its weights there")
        if data.stat().st_size < end:
            raise ValueError(f"{data}: truncated: {data.stat().st_size} of {end} bytes")
    return model


def attention_heads(graph: onnx.ModelProto) -> int:
    """The query heads of GroupQueryAttention; 0 where a graph does not have it."""
    for node in graph.graph.node:
        if node.op_type == "GroupQueryAttention":
            return next(a.i for a in node.attribute if a.name == "num_heads")
    return 0


def check_operators(file: Path, ops: str) -> None:
    """Refuse standard operators where onnxruntime's own of them are not sound.

    Raises:
        ValueError: the graph has them, and onnxruntime is too old.
    """
    if ops == "standard" and Version(ort.__version__) < STANDARD_SINCE:
        raise ValueError(
            f"{file}: standard operators need onnxruntime {STANDARD_SINCE} or later, this is "
            f"{ort.__version__}; export with `ops=fused`"
        )


class Sessions(NamedTuple):
    """An opened graph.

    Attributes:
        prompts: computes prompts, and whatever else the graph can.
        steps: computes single tokens after a first call; often the same.
        provider: the full name of the provider of both.
    """

    prompts: ort.InferenceSession
    steps: ort.InferenceSession
    provider: str


def start_session(
    file: Path,
    about: dict[str, str],
    asked: str | None,
    *,
    heads: int = 0,
    device_id: int = 0,
    threads: int | None = None,
    cuda_graph: bool | None = None,
) -> Sessions:
    """A session on the asked-for provider, or by default on CUDA where it can run the graph.

    Where there is a CUDA device and it is not used by default, a line on standard error says why.

    Args:
        about: the graph's metadata.
        asked: "cpu", "cuda", a provider's full name, or None.
        heads: the query heads of GroupQueryAttention.

    Raises:
        ValueError: the provider is not there, does not start, or cannot run the graph.
    """
    name, reason = choose_provider(asked)
    refusal = cuda_refusal(about, heads) if name == CUDA else None
    if refusal and asked is not None:
        raise ValueError(f"{file}: {refusal}")
    if refusal:
        name, reason = CPU, refusal
    start = partial(
        open_session, file=file, threads=threads, accuracy_level=about["accuracy_level"]
    )
    if name == CUDA:
        try:
            recording = records_steps(about, name, cuda_graph)
            return _start_cuda(
                file, about, partial(start, device_id=device_id), device_id, recording
            )
        except ValueError as error:
            if asked is not None:
                raise
            name, reason = CPU, str(error)
    if cuda_graph:
        because = f": {reason}" if reason else "; leave it out, or use cuda"
        raise ValueError(f"cuda_graph needs the CUDA provider{because}")
    if name == CPU and about["activations"] == "bf16":
        because = f" ({reason})" if reason else ""
        raise ValueError(
            f"{file}: {name} has no bfloat16; use CUDA{because}, or export fp32 or fp16"
        )
    if reason:
        print(f"running on the CPU, not on CUDA: {reason}", file=sys.stderr)
    session = start(name)
    return Sessions(session, session, name)


def _start_cuda(
    file: Path,
    about: dict[str, str],
    start: Callable[..., ort.InferenceSession],
    device_id: int,
    recording: bool,
) -> Sessions:
    """Sessions on CUDA: one for prompts and, where there is a graph of single steps, one for it."""
    steps = step_file(file)
    if not steps.is_file():
        session = start(CUDA, cuda_graph=recording)
        return Sessions(session, session, CUDA)
    if metadata(read_graph(steps), steps) != about:
        raise ValueError(f"{steps}: not of one export with {file.name}; export it again")
    weights = upload(file, ("cuda", device_id))
    prompts = start(CUDA, weights=weights)
    return Sessions(prompts, start(CUDA, file=steps, weights=weights, cuda_graph=recording), CUDA)


def open_session(
    name: str,
    *,
    file: Path,
    weights: Mapping[str, ort.OrtValue] | None = None,
    device_id: int = 0,
    threads: int | None = None,
    cuda_graph: bool = False,
    accuracy_level: str = "4",
) -> ort.InferenceSession:
    """A session on an execution provider, given by its full name.

    Args:
        weights: tensors of the graph that are in the device's memory already.

    Raises:
        ValueError: the provider does not start, or cannot run the graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it would log comes as an exception
    # For quantised matrices in standard operators, which onnxruntime turns into MatMulNBits.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", accuracy_level)
    # For w8a8 on x86 processors without VNNI: sums of two products that do not saturate.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    for tensor, value in (weights or {}).items():
        options.add_initializer(tensor, value)
    providers: list[Any] = [CPU]
    if name == CUDA:
        # Some of its warnings, about what is sound here, come from no session and know no options.
        ort.set_default_logger_severity(ONLY_ERRORS)
        providers = [(CUDA, cuda_options(device_id, cuda_graph)), *providers]
    elif name != providers[0]:
        providers = [name, *providers]
    try:
        # Without a second try of its own, which would be reported on standard output.
        session = ort.InferenceSession(
            str(file),
            options,
            providers=providers,
            disabled_optimizers=NEEDING_CUDNN if name == CUDA else [],
            enable_fallback=0,
        )
    except Exception as error:  # onnxruntime's exceptions have no common class of their own
        raise ValueError(f"{file}: {name} cannot run this graph: {one_line(error)}") from error
    if session.get_providers()[0] != name:
        raise ValueError(f"{name} was asked for but did not start here; use `provider=cpu`")
    return session
